"""Put variants side by side: build, serve, judge and load each one, then one report."""
