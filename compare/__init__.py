"""Comparison of variants: build, serve, evaluate and load-test each of them, then decide which one to ship."""
