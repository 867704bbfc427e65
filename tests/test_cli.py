"""Tests of the command line: help, and one clear line for every mistake."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slimserve.serve.launch.process import free_port
from tests.conftest import SMOLLM2, measures_time

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert ";" in errors[0], "the error names a remedy"
    for word in words:
        assert word in errors[0]


@measures_time
def test_help_answers_at_once_and_names_every_command(run_cli: RunCli) -> None:
    run_cli("--help")
    start = time.monotonic()
    done = run_cli("--help")
    assert time.monotonic() - start < 1.0
    assert done.returncode == 0
    for command in ("compress", "serve", "loadtest", "compare"):
        assert command in done.stdout
        assert run_cli(command, "--help").returncode == 0


def test_importing_slimserve_imports_no_heavy_library() -> None:
    heavy = ("torch", "vllm", "locust", "transformers", "matplotlib")
    code = f"import slimserve, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_recipes_are_listed(run_cli: RunCli) -> None:
    done = run_cli("compress", "--list")
    assert done.returncode == 0
    assert re.search(r"^prune25-w8a8 +\S", done.stdout, flags=re.MULTILINE)


def test_compress_writes_the_variant_and_prints_its_directory(run_cli: RunCli, smollm2: Path, tmp_path: Path) -> None:
    done = run_cli("compress", SMOLLM2, "--recipe", "w8a8", "--set", "quantize.method=rtn", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert {"config.json", "model.safetensors", "slimserve.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_every_launch_choice_is_explained(run_cli: RunCli, smollm2: Path) -> None:
    done = run_cli("serve", SMOLLM2, "--explain", "--port", str(free_port()))
    assert done.returncode == 0, done.stderr
    assert "--block-size=32" in done.stdout
    assert "OMP_NUM_THREADS=" in done.stdout


@pytest.mark.parametrize("command", [("serve",), ("compress",), ("compare", "--model")])
def test_a_model_that_does_not_exist_is_one_clear_line(run_cli: RunCli, command: tuple[str, ...]) -> None:
    assert_one_clear_line(run_cli(*command, "/no/such/model"), "model: '/no/such/model' does not exist", "smollm2")


def test_a_directory_without_config_is_one_clear_line(run_cli: RunCli, tmp_path: Path) -> None:
    assert_one_clear_line(run_cli("serve", str(tmp_path)), f"model: '{tmp_path}' has no config.json")


def test_a_corrupt_safetensors_file_is_one_clear_line(run_cli: RunCli, smollm2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(smollm2, tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(10_000_000)
    assert_one_clear_line(run_cli("compress", str(model)), "weights file:", "corrupt or cut short", "again")


def test_an_unknown_recipe_is_one_clear_line(run_cli: RunCli) -> None:
    assert_one_clear_line(run_cli("compress", SMOLLM2, "--recipe", "w3"), "recipe: 'w3' is unknown", "prune25")
    done = run_cli("compare", "--model", SMOLLM2, "--recipes", "dense,w3")
    assert_one_clear_line(done, "recipe: 'w3' is unknown")


def test_a_port_in_use_is_one_clear_line(run_cli: RunCli) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = str(owner.getsockname()[1])
        assert_one_clear_line(run_cli("serve", SMOLLM2, "--port", port), "port:", port, "--port")


def test_a_target_that_is_not_running_is_one_clear_line(run_cli: RunCli) -> None:
    done = run_cli("loadtest", "reasoning", "--url", f"http://127.0.0.1:{free_port()}")
    assert_one_clear_line(done, "url:", "does not answer", "slimserve serve MODEL")


def test_an_unknown_suite_is_one_clear_line(run_cli: RunCli, fake_url: str) -> None:
    done = run_cli("loadtest", "chess", "--url", fake_url, "--model", "good")
    assert_one_clear_line(done, "suite: 'chess' is unknown; choose from recommendation, reasoning")


def test_a_missing_model_is_one_clear_line(run_cli: RunCli) -> None:
    assert_one_clear_line(run_cli("compress"), "MODEL")


@pytest.mark.parametrize("arguments", [("serve", SMOLLM2, "--port", "many"), ("loadtest",), ("nonsense",)])
def test_misused_options_are_usage_errors(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Usage" in done.stderr


def test_a_port_out_of_range_names_the_port(run_cli: RunCli) -> None:
    assert_one_clear_line(run_cli("serve", SMOLLM2, "--port", "70000"), "port: '70000' is invalid", "65535")
