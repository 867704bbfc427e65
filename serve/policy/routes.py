"""Classes of HTTP paths: who may call them, and which ones occupy the engine."""

from __future__ import annotations

OPEN_PATHS = frozenset({"/health", "/live", "/metrics", "/ping", "/ready"})
"""Paths that need no API key; all other paths, /version and /docs included, need one if the server has keys."""
INFERENCE_PATHS = frozenset(
    {
        *("/classify", "/cohere/v2/chat", "/generative_scoring", "/inference/v1/generate", "/invocations", "/pooling"),
        *("/rerank", "/score", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/chat/completions"),
        *("/v1/chat/completions/batch", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/rerank"),
        *("/v1/responses", "/v1/score", "/v1/systemone", "/v1/warm", "/v2/embed", "/v2/rerank"),
    }
)
"""Paths whose POST requests take one of the engine's slots."""
CLOSED_PATHS = frozenset({"/is_scaling_elastic_ep", "/scale_elastic_ep"})
"""vLLM's administration, closed even with a key: a key to query the model must not allow rebuilding its engine."""
BODY_METHODS = frozenset({"DELETE", "PATCH", "POST", "PUT"})
"""Methods whose requests have a body."""
_OTHER_PATHS = frozenset({"/detokenize", "/docs", "/load", "/openapi.json", "/tokenize", "/v1/models", "/version"})
_KNOWN_PATHS = OPEN_PATHS | INFERENCE_PATHS | _OTHER_PATHS


def is_inference(method: str, path: str) -> bool:
    """Return whether a request takes one of the engine's slots."""
    return method == "POST" and path in INFERENCE_PATHS


def is_known(path: str) -> bool:
    """Return whether a route with this path usually exists; models and plugins may add others."""
    return path in _KNOWN_PATHS


def route_label(path: str) -> str:
    """Return the path as a metric label; unknown paths become `other`, so that the set of labels stays small."""
    return path if path in _KNOWN_PATHS else "other"
