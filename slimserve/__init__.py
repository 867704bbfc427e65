"""Make a small language model smaller, serve it on vLLM, load it with real traffic, and compare the variants.

The parts are folders of the repository's top level and appear here under one name: `slimserve.compress` is `compress/`.
"""
