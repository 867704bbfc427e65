"""Tests of routing to fake engines, and of answers that the gateway combines from all engines."""

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slimserve.core.variant import BaseModelRecord, Manifest, write_manifest
from slimserve.serve.gateway.supervisor import State
from slimserve.serve.launch.config import Alias
from tests.serve.fake_engine import Message, answer, run, served, until

CANARY = Alias("chat", (("a", 0.75), ("b", 0.25)))


def test_a_request_reaches_the_variant_that_its_body_names() -> None:
    async def scenario() -> None:
        async with served("a", "b") as gateway, await gateway.connect() as client:
            for name in ("a", "b", "b", "a"):
                response = await client.ask("/v1/completions", {"prompt": "x" * 1000, "model": name, "user": None})
                assert response.json()["engine"] == name

    run(scenario())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "c", "prompt": "x"}, 404, 404),
        ({"model": "../a", "prompt": "x"}, 404, 404),
        ({"prompt": "x"}, 400, "model_missing"),
        ({"model": None}, 400, "model_missing"),
        ({"model": ""}, 400, "model_missing"),
        ({"model": ["a"]}, 400, "invalid_body"),
        ({"model": "a", "user": 7}, 400, "invalid_body"),
        ([], 400, "invalid_body"),
        (b"{", 400, "invalid_body"),
        (b'{"model":"\xff"}', 400, "invalid_body"),
        (b"[" * 90_000, 400, "invalid_body"),
        (b"", 400, "model_missing"),
    ],
)
def test_a_body_that_names_no_variant_gets_an_error_in_openais_form(body: object, status: int, code: object) -> None:
    async def scenario() -> None:
        async with served("a", "b") as gateway:
            response = await gateway.ask("/v1/completions", body, method="POST")
            error = response.json()["error"]
            assert (response.status, error["code"]) == (status, code)
            assert error.keys() == {"message", "type", "param", "code"}
            if code == "model_missing":
                assert "a, b" in error["message"], "the message lists the variants"
            assert not any(engine.requests for engine in gateway.engines.values())

    run(scenario())


def test_the_default_variant_gets_requests_without_model_and_a_ready_engine_answers_a_get() -> None:
    async def scenario() -> None:
        async with served("a", "b", default="b") as gateway:
            assert (await gateway.ask("/v1/completions", {"prompt": "x"})).json()["engine"] == "b"
        async with served("a", "b") as gateway:
            gateway.supervised["a"].state = State.RESTARTING
            assert (await gateway.ask("/version")).json()["engine"] == "b", "the first ready engine answers"

    run(scenario())


def test_an_alias_splits_by_weight_and_keeps_each_user_on_one_variant() -> None:
    async def scenario() -> None:
        async with served("a", "b", aliases=(CANARY,)) as gateway, await gateway.connect() as client:
            engine_of = {}
            for index in range(400):
                response = await client.ask("/v1/completions", {"model": "chat", "user": f"user {index}"})
                engine_of[index] = response.json()["engine"]
            assert 70 <= sum(name == "b" for name in engine_of.values()) <= 130, "about a quarter"
            for index in range(0, 400, 10):
                response = await client.ask("/v1/completions", {"model": "chat", "user": f"user {index}"})
                assert response.json()["engine"] == engine_of[index]
            anonymous = [(await client.ask("/v1/completions", {"model": "chat"})).json()["engine"] for _ in range(100)]
            assert {"a", "b"} == set(anonymous)

    run(scenario())


def test_an_alias_avoids_a_variant_that_is_down() -> None:
    async def scenario() -> None:
        async with served("a", "b", aliases=(CANARY,)) as gateway, await gateway.connect() as client:
            gateway.supervised["a"].state = State.RESTARTING
            for index in range(20):
                response = await client.ask("/v1/completions", {"model": "chat", "user": f"user {index}"})
                assert response.json()["engine"] == "b"
            gateway.supervised["b"].state = State.STOPPED
            assert (await client.ask("/v1/completions", {"model": "chat"})).status == 503

    run(scenario())


@pytest.mark.parametrize("state", [State.STARTING, State.RESTARTING, State.STOPPED])
def test_a_variant_that_is_down_gives_503_with_retry_after_and_the_other_still_answers(state: State) -> None:
    async def scenario() -> None:
        async with served("a", "b") as gateway:
            gateway.supervised["a"].state = state
            response = await gateway.ask("/v1/completions", {"model": "a"})
            assert (response.status, response.json()["error"]["code"]) == (503, "model_unavailable")
            assert 1 <= int(response.header("retry-after") or 0) <= 60
            assert (await gateway.ask("/v1/completions", {"model": "b"})).status == 200
            ready = await gateway.ask("/ready")
            assert (ready.status, ready.json()["variants"]["a"]["state"]) == (503, state.value)
            assert (await gateway.ask("/health")).status == 200, "one variant is enough"
            assert (await gateway.ask("/live")).status == 200

    run(scenario())


def test_an_engine_that_refuses_connections_gives_503() -> None:
    async def scenario() -> None:
        async with served("a") as gateway:
            gateway.engines["a"].stop()
            response = await gateway.ask("/v1/completions", {"model": "a"})
            assert (response.status, response.json()["error"]["code"]) == (503, "model_unavailable")

    run(scenario())


def test_models_are_the_engines_own_entries_with_size_base_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    manifest = Manifest(
        name="small", recipe="prune25", base=BaseModelRecord(model="smol", sha256="0"), steps=[], num_parameters=7
    )
    write_manifest(tmp_path, manifest)

    async def scenario() -> None:
        async with served("a", "b", aliases=(CANARY,), directory=tmp_path) as gateway:

            async def models(request: Message, writer: asyncio.StreamWriter) -> None:
                entries = [{"id": name, "object": "model", "max_model_len": 99} for name in ("a", "chat")]
                await answer(writer, {"object": "list", "data": entries})

            gateway.engines["a"].script = models
            gateway.supervised["b"].state = State.RESTARTING
            response = (await gateway.ask("/v1/models", headers="Authorization: Bearer k\r\n")).json()
            (received,) = gateway.engines["a"].requests
            assert received.header("authorization") == "Bearer k", "engines need the key, too"
            assert [entry["id"] for entry in response["data"]] == ["a", "b", "chat"], "the alias is listed once"
            first, second, alias = response["data"]
            assert first["max_model_len"] == 99
            size = sum(file.stat().st_size for file in tmp_path.iterdir())
            facts = {"size_bytes": size, "num_parameters": 7, "base": "smol", "recipe": "prune25"}
            assert first["slimserve"] == {**facts, "state": "ready"}
            assert second["slimserve"]["state"] == "restarting"
            assert alias["slimserve"]["alias_of"] == {"a": 0.75, "b": 0.25}
            assert (await gateway.ask("/v1/models/chat")).json() == alias
            assert (await gateway.ask("/v1/models/c")).status == 404

    run(scenario())


def test_metrics_of_all_engines_are_one_page_with_a_variant_label() -> None:
    page = (
        "# HELP vllm:num_requests_running Number.\n# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0"} 3.0\n'
        "# HELP slimserve_score_items_total Items.\n# TYPE slimserve_score_items_total counter\n"
        "slimserve_score_items_total 12.0\n"
    )

    async def scenario() -> None:
        async with served("a", "b", "c") as gateway:

            async def metrics(request: Message, writer: asyncio.StreamWriter) -> None:
                head = f"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {len(page)}\r\n\r\n"
                writer.write((head + page).encode())

            for name in ("a", "b"):
                gateway.engines[name].script = metrics
            gateway.engines["c"].stop()  # a stopped engine only loses its own series
            await gateway.ask("/v1/completions", {"model": "a"})
            response = await gateway.ask("/metrics")
            assert response.status == 200
            assert (response.header("content-type") or "").startswith("text/plain")
            text = response.body.decode()
            families = {family.name: family for family in text_string_to_metric_families(text)}
            running = families["vllm:num_requests_running"].samples
            assert {(sample.labels["variant"], sample.value) for sample in running} == {("a", 3.0), ("b", 3.0)}
            assert {s.labels["variant"] for s in families["slimserve_score_items"].samples} == {"a", "b"}
            num_requests = {
                (sample.labels["variant"], sample.labels["status"]): sample.value
                for sample in families["slimserve_gateway_requests"].samples
                if sample.name.endswith("_total")
            }
            assert num_requests["a", "200"] == 1
            assert {s.labels["variant"] for s in families["slimserve_variant_up"].samples} == {"a", "b", "c"}
            types = [line for line in text.splitlines() if line.startswith("# TYPE")]
            assert len(types) == len(set(types)), "each family has one header"

    run(scenario())


@pytest.mark.parametrize("header", ["", "Authorization: Bearer wrong\r\n", "Authorization: Basic right\r\n"])
@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/score", "/v1/models", "/v1/models/a", "/version", "/docs", "/nonsense", "//metrics"],
)
def test_every_route_except_the_open_ones_requires_a_valid_key(path: str, header: str) -> None:
    async def scenario() -> None:
        async with served("a", keys=frozenset({"right", "other"})) as gateway:
            for method in ("GET", "POST"):
                response = await gateway.ask(path, {"model": "a"}, header, method)
                assert (response.status, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert not gateway.engines["a"].requests

    run(scenario())


def test_every_valid_key_is_accepted_and_the_open_routes_need_none() -> None:
    async def scenario() -> None:
        async with served("a", keys=frozenset({"right", "other"})) as gateway:
            for header in (
                "Authorization: Bearer right\r\n",
                "authorization: bearer other\r\n",
                "X-Api-Key: right\r\n",
            ):
                assert (await gateway.ask("/v1/completions", {"model": "a"}, header)).status == 200
            for path in ("/health", "/live", "/ready", "/ping", "/metrics"):
                assert (await gateway.ask(path)).status == 200

    run(scenario())


def test_an_invalid_key_is_rejected_before_the_body_is_sent() -> None:
    async def scenario() -> None:
        async with served("a", keys=frozenset({"right"})) as gateway, await gateway.connect() as client:
            client.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 50000\r\n\r\n")
            assert (await client.answer()).status == 401

    run(scenario())


def test_ready_and_other_variants_answer_at_once_while_an_engine_is_silent() -> None:
    async def scenario() -> None:
        async with served("a", "b") as gateway:

            async def silence(request: Message, writer: asyncio.StreamWriter) -> None:
                await asyncio.sleep(60)

            gateway.engines["a"].script = silence
            clients = [await gateway.connect() for _ in range(64)]
            for client in clients:
                client.send("/v1/completions", {"model": "a"})
            await until(lambda: len(gateway.engines["a"].requests) == 64)
            async with asyncio.timeout(0.5):
                assert (await gateway.ask("/ready")).status == 200
                assert (await gateway.ask("/v1/completions", {"model": "b"})).status == 200
            assert gateway.registry.get_sample_value("slimserve_gateway_in_flight", {"variant": "a"}) == 64
            for client in clients:
                client.writer.close()

    run(scenario())


def test_the_access_log_holds_the_id_and_the_variant_but_no_key_and_no_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with served("a", keys=frozenset({"secret-key"})) as gateway:
            headers = "Authorization: Bearer secret-key\r\nX-Request-Id: mine-7\r\n"
            await gateway.ask("/v1/completions?api_key=secret-key", {"model": "a", "prompt": "secret prompt"}, headers)
            await gateway.ask("/v1/secret%20prompt/x", {"model": "secret prompt"}, headers)

    caplog.set_level(logging.DEBUG, "slimserve")
    run(scenario())
    line = r"request_id=mine-7 method=POST route=/v1/completions status=200 duration_ms=\S+ variant=a"
    assert re.search(line, caplog.text)
    assert "route=other" in caplog.text
    assert "secret" not in caplog.text


def test_requests_during_a_drain_are_rejected_with_retry_after() -> None:
    async def scenario() -> None:
        async with served("a", default="a") as gateway:
            gateway.gateway.is_draining = True
            for path, body in (("/v1/completions", {"model": "a"}), ("/v1/models", None)):
                response = await gateway.ask(path, body)
                assert (response.status, response.json()["error"]["code"]) == (503, "draining")
                assert (response.header("retry-after"), response.header("connection")) == ("5", "close")
            assert json.loads((await gateway.ask("/ready")).body)["status"] == "draining"
            assert (await gateway.ask("/live")).status == 200
            assert (await gateway.ask("/metrics")).status == 200

    run(scenario())
