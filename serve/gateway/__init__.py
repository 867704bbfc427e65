"""The gateway process: the proxy, the routing between variants, and the supervisor of their engines."""
