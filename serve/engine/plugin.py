"""The endpoint plugin that adds scoring, reranking and labelled metrics to vLLM's own API server.

vLLM loads it if `VLLM_PLUGINS` names `slimserve`, under `slimserve serve` and under a stock launch of vLLM alike:

    VLLM_PLUGINS=slimserve python -m vllm.entrypoints.openai.api_server --model DIR

Routes: `POST /v1/score`, `POST /v1/warm`, `POST /rerank`, `/v1/rerank` and `/v2/rerank`, `GET /metrics`. The engine
gets one request of one token per item through `engine_client.generate`, all at the same time. vLLM's scheduler adds
full blocks to the prefix cache as it allocates them. The first item therefore computes the shared prefix, and the
others, scheduled after it in the same step or later, use the cached blocks.
"""

from __future__ import annotations

import asyncio
import os
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind, SamplingParams
from vllm.utils import random_uuid
from vllm.v1.metrics.prometheus import get_prometheus_registry

from slimserve.core.catalogue import read_catalogue
from slimserve.core.variant import read_manifest
from slimserve.serve.engine.classifier import Classifier
from slimserve.serve.engine.item_ids import ItemTexts
from slimserve.serve.engine.label_logits import LABELS_ALONE
from slimserve.serve.engine.partial_prefix import SHARED_PREFIX_TOKENS, PartialPrefixConnector
from slimserve.serve.engine.prompt_tokenizer import PromptTokenizer
from slimserve.serve.engine.rerank import RerankRequest, as_score_request, rerank_response
from slimserve.serve.engine.score_request import (
    RequestError,
    ScoreRequest,
    WarmRequest,
    time_limit,
    validation_problem,
)
from slimserve.serve.engine.scoring import (
    LabelRead,
    ScoringPlan,
    choose_calibration,
    compares_labels,
    label_logprobs,
    label_reads,
    num_cached_prompt_tokens,
    plan_scoring,
    score_response,
)
from slimserve.serve.engine.warm import ScoresFirst, compute_prefix, warm_prompt, warm_response
from slimserve.serve.policy.engine_environment import VARIANT_VARIABLE
from slimserve.serve.policy.errors import Rejection, error_body, no_such_route, wrong_method
from slimserve.serve.policy.exposition import label_series
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import score_metrics
from slimserve.serve.policy.rerank_templates import load_template

_STATE = "slimserve_scorer"


class Scorer:
    """Answers score requests with the engine of this server."""

    def __init__(self, engine_client: EngineClient, state: State) -> None:
        self._engine_client = engine_client
        self._limits = Limits.from_environment()
        self._models = state.openai_serving_models
        self._renderer = state.online_renderer
        config = engine_client.model_config
        self._vocabulary = config.get_vocab_size()
        self._max_prompt_tokens = config.max_model_len - 1
        self._tokenizer = engine_client.renderer.tokenizer
        if self._tokenizer is None:
            raise ValueError("slimserve's endpoints need a tokenizer; remove --skip-tokenizer-init")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        # A copy, because vLLM's threads change the truncation of their own tokenizer.
        own = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
        self.tokenizer = PromptTokenizer(self._encode, own)
        self._scores_first = ScoresFirst()
        self._block_size = engine_client.vllm_config.cache_config.block_size
        transfer = engine_client.vllm_config.kv_transfer_config
        self._shares_partial_blocks = transfer is not None and transfer.kv_connector == PartialPrefixConnector.__name__
        self.rerank_template = load_template(Path(config.model))
        manifest = read_manifest(Path(config.model))
        self.calibrations = manifest.score_calibrations if manifest else {}
        self._metrics = score_metrics()
        self.item_texts = ItemTexts(
            read_catalogue(Path(config.model)), lambda outcome: self._metrics.unknown_items.labels(outcome).inc()
        )

    async def answer(
        self, request: ScoreRequest, request_id: str
    ) -> tuple[ScoringPlan, list[list[float]], str, list[int]]:
        """Return the plan, each task's label log-probabilities, the model's name and each task's cached prompt tokens.

        Raises RequestError for a request that cannot be scored and after its deadline. All its engine requests are
        aborted if one fails, the deadline passes or this coroutine is cancelled.
        """
        model, lora = self._model(request.model)
        async with time_limit(request.timeout_s):
            plan = await asyncio.to_thread(self._plan, request)
            with self._scores_first.scoring():
                logprobs, cached = await self._logprobs(plan, request, request_id, lora)
        return plan, logprobs, model, cached

    async def warm(self, request: WarmRequest, request_id: str) -> dict[str, Any]:
        """Compute the prefix of coming score requests into the prefix cache, and return the number of its tokens.

        The engine caches full blocks, so a score request computes the tokens after the last full block again. Score
        requests go first (serve/engine/warm.py). Raises RequestError as `answer` does.
        """
        model, lora = self._model(request.model)
        async with time_limit(request.timeout_s):
            tokens = await asyncio.to_thread(self._warm_tokens, request)

            async def compute(end: int) -> int:
                prompt = tokens_input(tokens[:end], cache_salt=request.cache_salt)
                sampling = _sampling(None, {LABELS_ALONE: True})
                stream = self._engine_client.generate(
                    prompt, sampling, f"{request_id}-{end}", lora_request=lora, priority=request.priority
                )
                results = [result async for result in stream]
                return (results[-1].num_cached_tokens or 0) if results else 0

            num_cached = await compute_prefix(len(tokens), self._block_size, self._scores_first, compute)
        self._metrics.tokens.labels("warm").inc(len(tokens) - num_cached)
        return warm_response(model, len(tokens), num_cached)

    def _warm_tokens(self, request: WarmRequest) -> list[int]:
        request = self.item_texts.in_warm_request(request)
        return warm_prompt(request, self.tokenizer, self._vocabulary, self._max_prompt_tokens, self._render)

    def _plan(self, request: ScoreRequest) -> ScoringPlan:
        """Return the plan for this model's tokenizer, template, catalogue and limits."""
        request = self.item_texts.in_score_request(request)
        plan = plan_scoring(
            request, self.tokenizer, self._vocabulary, self._max_prompt_tokens, self._limits.max_items, self._render
        )
        num_labels = max(len(read.next_tokens) for task in plan.tasks for read in label_reads(task))
        if num_labels > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                "labels", f"has {num_labels} labels, but vLLM reads at most {MAX_LOGPROB_TOKEN_IDS}; split the request"
            )
        return plan

    async def _logprobs(
        self, plan: ScoringPlan, request: ScoreRequest, request_id: str, lora: LoRARequest | None
    ) -> tuple[list[list[float]], list[int]]:
        start = time.monotonic()
        reads = [read for task in plan.tasks for read in label_reads(task)]
        extra_args = self._prefix_params(plan)
        if compares_labels(request, plan):
            extra_args[LABELS_ALONE] = True

        async def answer(index: int, read: LabelRead) -> tuple[dict[int, float], int]:
            sampling = _sampling(read.next_tokens, extra_args)
            prompt = tokens_input(read.prompt, cache_salt=request.cache_salt)
            name = f"{request_id}-{index}"
            stream = self._engine_client.generate(prompt, sampling, name, lora_request=lora, priority=request.priority)
            # Read to the end, although there is one result: leaving the stream earlier would send an abort.
            results = [result async for result in stream]
            output = results[-1].outputs[0] if results else None
            if output is None or not output.logprobs:
                raise RuntimeError(f"the engine gave no log-probabilities for {name}")
            logprobs = output.logprobs[0]
            return {token: logprobs[token].logprob for token in read.next_tokens}, results[-1].num_cached_tokens or 0

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(index, read)) for index, read in enumerate(reads)]
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from errors
        answers = iter([task.result() for task in tasks])
        logprobs, cached = [], []
        for task in plan.tasks:
            results = [next(answers) for _ in label_reads(task)]
            logprobs.append(label_logprobs(task, [values for values, _ in results]))
            cached.append(num_cached_prompt_tokens(task, [tokens for _, tokens in results]))
        self._count(plan, time.monotonic() - start)
        return logprobs, cached

    def _model(self, name: str | None) -> tuple[str, LoRARequest | None]:
        """Return the model's name and its LoRA adapter, if it is one; raises RequestError (404) for an unknown name."""
        if not name:
            return self._models.model_name(), None
        if name in self._models.lora_requests:
            return name, self._models.lora_requests[name]
        if not self._models.is_base_model(name):
            served = ", ".join(model.name for model in self._models.base_model_paths)
            raise RequestError("model", f"{name!r} does not exist; this server has {served}", 404)
        return name, None

    def _prefix_params(self, plan: ScoringPlan) -> dict[str, Any]:
        """Return the arguments that tell the connector the number of shared leading tokens; none without it."""
        if not self._shares_partial_blocks or not plan.num_prefix_tokens:
            return {}
        return {"kv_transfer_params": {SHARED_PREFIX_TOKENS: plan.num_prefix_tokens}}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _render(self, content: str, kwargs: dict[str, Any]) -> str:
        """Return the chat template around one user message, up to the start of the answer."""
        settings = self._renderer.default_chat_template_kwargs | kwargs
        reserved = {"tokenize", "add_generation_prompt", "chat_template", "conversation"} & settings.keys()
        if reserved:
            raise RequestError("chat_template_kwargs", f"must not set {', '.join(sorted(reserved))}")
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._renderer.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                **settings,
            )
        except Exception as error:  # a model's template may raise anything
            raise RequestError("apply_chat_template", f"the model's chat template failed ({error})") from error
        return str(text)

    def _count(self, plan: ScoringPlan, seconds: float) -> None:
        self._metrics.items.inc(len(plan.task_of_item))
        self._metrics.computed_items.inc(len(plan.tasks))
        self._metrics.tokens.labels("prefix").inc(plan.num_prefix_tokens)
        self._metrics.tokens.labels("item").inc(sum(len(task.prompt) - plan.num_prefix_tokens for task in plan.tasks))
        self._metrics.seconds.observe(seconds)


_Handler = Callable[[Scorer, Any, str], Awaitable[dict[str, Any]]]
"""Answers a validated request; the arguments are the scorer, the request and its id."""
_PoolingHandler = Callable[[Classifier, bytes, Request, str], Awaitable[dict[str, Any] | Response]]
"""Answers a body for a model with a classification head; the arguments include the HTTP request and its id."""


def _sampling(next_tokens: Sequence[int] | None, extra_args: dict[str, Any]) -> SamplingParams:
    """Return parameters for one token of which only the labels' log-probabilities are read, or nothing without labels.

    `logprobs` stays unset, because with it the sampler would also sort the full vocabulary.
    """
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=list(next_tokens) if next_tokens is not None else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra_args or None,
        skip_clone=True,
        watermarking=False,
    )


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error of a group, which vLLM's handlers can answer."""
    return next(
        (_first_error(error) if isinstance(error, BaseExceptionGroup) else error) for error in errors.exceptions
    )


async def _score(scorer: Scorer, request: ScoreRequest, request_id: str) -> dict[str, Any]:
    calibrate = choose_calibration(request, scorer.calibrations, lambda label: scorer.tokenizer.encode(label, False))
    return score_response(request, *await scorer.answer(request, request_id), calibrate)


async def _warm(scorer: Scorer, request: WarmRequest, request_id: str) -> dict[str, Any]:
    return await scorer.warm(request, request_id)


async def _warm_pairs(scorer: Classifier, body: bytes, raw_request: Request, request_id: str) -> dict[str, Any]:  # noqa: ARG001
    raise RequestError("model", "has a classification head, which reads query and item together; nothing to warm")


def _rerank(api_version: int) -> _Handler:
    async def handle(scorer: Scorer, request: RerankRequest, request_id: str) -> dict[str, Any]:
        scoring = as_score_request(
            request, scorer.rerank_template, scorer.tokenizer.first_tokens_end, scorer.item_texts
        )
        try:
            plan, logprobs, model, cached = await scorer.answer(scoring, request_id)
        except RequestError as error:
            raise error.renamed("items", "documents") from error
        return rerank_response(
            request,
            plan,
            logprobs,
            model=model,
            request_id=request_id,
            api_version=api_version,
            cached_tokens=cached,
        )

    return handle


async def _score_pairs(
    scorer: Classifier,
    body: bytes,
    raw_request: Request,
    request_id: str,  # noqa: ARG001
) -> dict[str, Any] | Response:
    return await scorer.score(body, raw_request)


def _rerank_pairs(api_version: int) -> _PoolingHandler:
    async def handle(scorer: Classifier, body: bytes, raw_request: Request, request_id: str) -> dict[str, Any]:
        return await scorer.rerank(body, raw_request, request_id, api_version)

    return handle


def _route(
    kind: type[BaseModel], handle: _Handler, handle_pairs: _PoolingHandler
) -> Callable[[Request], Awaitable[Response]]:
    """Return a POST handler that validates the body and stops if the client disconnects; errors are OpenAI objects."""

    @with_cancellation
    @load_aware_call
    async def answer(body: bytes, raw_request: Request) -> Response:
        try:
            scorer = getattr(raw_request.app.state, _STATE)
            request_id = f"{kind.__name__.lower()}-{raw_request.headers.get('X-Request-Id') or random_uuid()}"
            if isinstance(scorer, Classifier):
                content = await handle_pairs(scorer, body, raw_request, request_id)
                return content if isinstance(content, Response) else JSONResponse(content)
            return JSONResponse(await handle(scorer, kind.model_validate_json(body), request_id))
        except ValidationError as error:
            param, problem = validation_problem(error, body)
            return JSONResponse(error_body(400, f"{param or 'body'}: {problem}", param=param or None), 400)
        except RequestError as error:
            return JSONResponse(error_body(error.status, str(error), param=error.param), error.status)

    async def route(raw_request: Request) -> Response:
        # The body is read here, because with_cancellation takes every later message for a disconnect.
        response: Response = await answer(await raw_request.body(), raw_request=raw_request)
        return response

    return route


async def http_error(_request: Request, error: Exception) -> Response:
    """Answer the router's own errors with OpenAI's error object; vLLM's handler knows only FastAPI's subclass."""
    assert isinstance(error, HTTPException)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 404:
        rejection = no_such_route()
    elif error.status_code == 405:
        rejection = wrong_method(headers.pop("allow", "other methods"))
    else:
        rejection = Rejection(error.status_code, None, error.detail)
    return JSONResponse(rejection.body(), rejection.status, headers | dict(rejection.headers()))


def _metrics() -> Response:
    """Return vLLM's and our metrics, labelled with the variant's name if the process has one."""
    text = generate_latest(get_prometheus_registry()).decode()
    variant = os.environ.get(VARIANT_VARIABLE)
    return Response(label_series(text, variant) if variant else text, media_type=CONTENT_TYPE_LATEST)


class SlimservePlugin:
    """The entry point of the group `vllm.endpoint_plugins`."""

    name = "slimserve"
    required_tasks = ("generate", "classify")

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; they replace vLLM's own routes with the same path and method."""
        self._post(app, "/v1/score", ScoreRequest, _score, _score_pairs)
        self._post(app, "/v1/warm", WarmRequest, _warm, _warm_pairs)
        for path, api_version in (("/rerank", 1), ("/v1/rerank", 1), ("/v2/rerank", 2)):
            self._post(app, path, RerankRequest, _rerank(api_version), _rerank_pairs(api_version))
        app.add_api_route("/metrics", _metrics, methods=["GET"], include_in_schema=False)
        app.add_exception_handler(HTTPException, http_error)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:  # noqa: ARG002
        """Create the scorer; vLLM calls this once, after it has set up its own state."""
        assert engine_client is not None
        is_generative = engine_client.model_config.runner_type == "generate"
        setattr(state, _STATE, Scorer(engine_client, state) if is_generative else Classifier(state))

    @staticmethod
    def _post(app: FastAPI, path: str, kind: type[BaseModel], handle: _Handler, handle_pairs: _PoolingHandler) -> None:
        schema = {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}
        app.add_api_route(
            path,
            _route(kind, handle, handle_pairs),
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            openapi_extra={"requestBody": schema},
        )
