"""Code that runs inside vLLM's API server process: middleware, scoring, reranking, metrics and launch entry point."""
