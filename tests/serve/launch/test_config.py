"""Tests of the serve configuration: valid files and command lines, and the error for each invalid one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.serve.launch.config import Alias, load_serve_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that looks like a model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    return directory


def write(folder: Path, text: str, model: Path) -> Path:
    file = folder / "serve.toml"
    file.write_text(text.replace("MODEL", str(model)))
    return file


def test_a_single_model_is_the_only_variant_and_the_default(model: Path) -> None:
    config = load_serve_config([str(model)])
    assert [(variant.name, variant.directory) for variant in config.variants] == [("tiny", model)]
    assert config.default == "tiny"
    assert (config.host, config.port) == ("127.0.0.1", 8000)


def test_the_command_line_sets_names_aliases_and_options(model: Path) -> None:
    config = load_serve_config(
        [f"a={model}", f"b={model}"],
        aliases=["chat=a:3,b:1", "both=a,b"],
        vllm_args=["--enforce-eager"],
        limits={"max_running": 7},
        profile="decode",
        port=9000,
        host=None,
    )
    assert [variant.name for variant in config.variants] == ["a", "b"]
    assert {variant.profile for variant in config.variants} == {"decode"}
    assert config.variants[0].vllm_args == ("--enforce-eager",)
    assert [alias.shares for alias in config.aliases] == [(("a", 0.75), ("b", 0.25)), (("a", 0.5), ("b", 0.5))]
    assert config.default is None
    assert (config.port, config.limits.max_running) == (9000, 7)
    assert config.aliases_of("b") == ("chat", "both")


def test_a_file_sets_the_same_and_more_specific_vllm_arguments_come_later(tmp_path: Path, model: Path) -> None:
    text = """
        port = 9001
        default = "chat"
        profile = "decode"
        vllm_args = ["--all"]
        [variants.a]
        model = "MODEL"
        [variants.b]
        model = "MODEL"
        profile = "prefill"
        vllm_args = ["--own"]
        [aliases.chat]
        a = 95
        b = 5
        [limits]
        drain_s = 5
    """
    config = load_serve_config([], write(tmp_path, text, model), vllm_args=["--last"])
    a, b = config.variants
    assert (a.profile, b.profile) == ("decode", "prefill")
    assert (a.vllm_args, b.vllm_args) == (("--all", "--last"), ("--all", "--own", "--last"))
    assert config.default == "chat"
    assert (config.port, config.limits.drain_s) == (9001, 5)
    assert config.aliases[0].shares == (("a", 0.95), ("b", 0.05))


BAD_LINES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "nothing": ([], {}, "MODEL: '' is missing; write: slimserve serve MODEL"),
    "no name": (["a=MODEL", "MODEL"], {}, "has no name; several models need names; write: NAME="),
    "a name twice": (["a=MODEL", "a=MODEL"], {}, "uses the name a a second time"),
    "a bad name": (["a=MODEL", "b/c=MODEL"], {}, "has no name"),
    "no such model": (["a=MODEL", "b=/nowhere"], {}, "/nowhere"),
    "an alias of a variant's name": (["a=MODEL", "b=MODEL"], {"aliases": ["a=b"]}, "is also the name of a variant"),
    "an alias of nothing known": (["a=MODEL", "b=MODEL"], {"aliases": ["x=c:1"]}, "names c, which is not a variant"),
    "a weight of 0": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a:0"]}, "has no weight above 0 for one variant in 'a:0'"),
    "no weight": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a:much"]}, "write: --alias NAME=V1:95,V2:5"),
    "weight of nan": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a:nan"]}, "alias"),
    "an infinite weight": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a:inf"]}, "finite"),
    "a variant twice": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a:1,a:2"]}, "for one variant"),
    "an alias of no target": (["a=MODEL", "b=MODEL"], {"aliases": ["x"]}, "--alias"),
    "an alias twice": (["a=MODEL", "b=MODEL"], {"aliases": ["x=a", "x=b"]}, "uses the name x a second time"),
    "an unknown default": (
        ["a=MODEL", "b=MODEL"],
        {"default": "c"},
        "nor an alias; choose from a, b",
    ),
    "an unknown profile": (["a=MODEL"], {"profile": "fast"}, "profile: 'fast' is invalid"),
    "a bad limit": (["a=MODEL"], {"limits": {"max_running": 0}}, "max_running: '0' is invalid"),
    "a key file that is not there": (["a=MODEL"], {"api_key_file": "/nowhere"}, "API key file: '/nowhere'"),
}


@pytest.mark.parametrize(("models", "options", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_mistake_on_the_command_line_is_reported_in_one_line(
    models: list[str], options: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load_serve_config([text.replace("MODEL", str(model)) for text in models], **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


ONE = '[variants.a]\nmodel = "MODEL"\n'
BAD_FILES = {
    "no toml": ("variants = [", "cannot be read"),
    "no variant": ("", "variants"),
    "an empty table": ("[variants]\n", "variants"),
    "variants are a list": ("variants = 3\n", "variants"),
    "an unknown key": (f"ports = 1\n{ONE}", "ports: '1' is invalid"),
    "an unknown key of a variant": (f"{ONE}modle = 1\n", "variants.a.modle"),
    "a port of text": (f'port = "9"\n{ONE}', "port: '9'"),
    "a port too large": (f"port = 70000\n{ONE}", "port: '70000'"),
    "an unknown limit": (f"{ONE}[limits]\nmax = 1\n", "max: '1'"),
    "a limit of text": (f'{ONE}[limits]\nmax_running = "1"\n', "max_running"),
    "an alias without weights": (f"{ONE}[aliases.x]\n", "alias: 'x' has no variants"),
    "a negative weight": (f"{ONE}[aliases.x]\na = -1\n", "aliases.x.a: '-1'"),
    "a bad name of a variant": ('[variants."a b"]\nmodel = "MODEL"\n', "name: 'a b' is not a valid name"),
    "no model": ("[variants.a]\n", "variants.a.model"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_mistake_in_the_file_is_reported_in_one_line(text: str, message: str, tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_serve_config([], write(tmp_path, text, model))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conflicts_between_the_file_and_the_command_line_are_rejected(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path, f"port = 9\n{ONE}[limits]\nmax_running = 3\n", model)
    assert load_serve_config([], file, port=9, limits={"max_running": 3, "max_queued": 1}).limits.max_queued == 1
    with pytest.raises(UserError, match="port: '10' is 9 in .*leave one of the two out"):
        load_serve_config([], file, port=10)
    with pytest.raises(UserError, match="max_running: '4' is 3 in"):
        load_serve_config([], file, limits={"max_running": 4})
    with pytest.raises(UserError, match="cannot be combined with --config"):
        load_serve_config([f"b={model}"], file)


def test_an_invalid_file_ends_the_command_with_one_line_and_no_traceback(
    run_cli: Any, tmp_path: Path, model: Path
) -> None:
    done = run_cli("serve", "--config", str(write(tmp_path, f"ports = 1\n{ONE}", model)))
    assert done.returncode == 2
    assert "ports: '1' is invalid" in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_weights_move_only_the_share_of_users_that_changes() -> None:
    usable = frozenset({"a", "b"})
    users = [f"user {index}" for index in range(2000)]
    few = Alias("chat", (("a", 0.95), ("b", 0.05)))
    more = Alias("chat", (("a", 0.90), ("b", 0.10)))
    before = [few.pick(user, usable) for user in users]
    after = [more.pick(user, usable) for user in users]
    assert 60 <= Counter(before)["b"] <= 145
    assert all(now == "b" for was, now in zip(before, after, strict=True) if was == "b"), "no user moves back"
    assert 60 <= sum(was != now for was, now in zip(before, after, strict=True)) <= 145
    other = Alias("other", few.shares)
    assert [other.pick(user, usable) for user in users] != before, "another alias selects other users for its canary"


def test_users_of_a_lost_variant_are_spread_over_the_others_and_the_rest_stay() -> None:
    alias = Alias("chat", (("a", 0.5), ("b", 0.25), ("c", 0.25)))
    users = [f"user {index}" for index in range(1000)]
    for user in users:
        usual = alias.pick(user, frozenset("abc"))
        assert alias.pick(user, frozenset("bc")) == usual or usual == "a"
    moved = Counter(alias.pick(user, frozenset("bc")) for user in users)
    assert 400 <= moved["b"] <= 600
    assert alias.pick("x", frozenset()) in {"a", "b", "c"}, (
        "without a usable variant it still picks one, whose 503 is returned"
    )
