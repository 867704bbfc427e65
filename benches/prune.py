"""Compare OSSCAR with simpler pruning methods and torch-pruning: held-out loss, seconds and prefill speed in vLLM.

    make bench-prune          # or .venv/bin/python -m benches.prune --taylor, which adds torch-pruning's Taylor method

From SmolLM2-135M each method removes 25% or 50% of the MLP neurons, 1 of 3 KV groups, or 25% of the neurons and a KV
group, with each of three calibration seeds. The loss is the mean negative log-likelihood of held-out tokens, half from
recommendation and half from reasoning. torch-pruning runs in its own environment on top of this one. Then vLLM serves
the dense and the pruned models in turn and prefills prompts of random tokens. Finished measurements are kept in the
cache, so an interrupted run resumes. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.heldout import negative_log_likelihood, packed_tokens, write_tokens
from benches.peers.environment import peer_python, peer_variables
from benches.peers.measure import measure
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.core.model_files import count_parameters, model_hash
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, sha256_of_files, write_atomically
from slimserve.serve.launch.plan import plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port

MODEL = "smollm2-135m-instruct"
NUM_SEEDS = 3
NUM_SAMPLES, SEQUENCE_LENGTH = 16, 512
NUM_HELDOUT = 32
NUM_THREADS = 2
NUM_ALTERNATIONS = 2
PREFILL_TOKENS, NUM_PREFILLS, NUM_REPEATS = 512, 16, 3
_TOKEN_IDS = range(100, 49_000)
_HERE = Path(__file__).parent
_PEER_SCRIPT = _HERE / "peers" / "torch_pruning_llm.py"


@dataclass(frozen=True)
class Cut:
    """The sizes that are removed from every block."""

    mlp_frac: float
    num_kv_groups: int
    """Number of KV groups to remove, of the model's three."""


CUTS = {"mlp25": Cut(0.25, 0), "mlp50": Cut(0.5, 0), "kv1": Cut(0, 1), "both": Cut(0.25, 1)}
_IMPORTANCES = {"torchpruning": "magnitude", "torchpruning_taylor": "taylor"}
"""Importance measures of torch-pruning by the name of their metrics."""
BASELINES = ("magnitude", "refit", "wanda", "wanda_refit", "torchpruning")
_TAYLOR = "torchpruning_taylor"
_SEEDLESS = frozenset({"magnitude", "torchpruning"})
"""Deterministic methods without data: they run once, and their result is repeated for every seed."""
_SEEDS_OF = {_TAYLOR: 1}
"""Number of seeds of optional methods; the gradients of Taylor importance take minutes."""
_BEST = "best"
"""Stands for the method that a recipe uses if it names none."""
_SERVED = "osscar"
"""Method whose pruned model is served; all methods leave the same shapes."""

Cell = dict[str, float]


class _Results:
    """Finished measurements by name, in a file that survives an interruption."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cells: dict[str, Cell] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if self._cells:
            print_status(f"resuming after {len(self._cells)} finished measurements in {file}")

    def get(self, name: str, measure_cell: Callable[[], Cell]) -> Cell:
        """Return the measurement of that name; measure it now if it does not exist."""
        if name not in self._cells:
            self._cells[name] = measure_cell()
            write_atomically(self._file, json.dumps(self._cells, indent=1))
            print_status(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in self._cells[name].items()))
        return self._cells[name]

    def close(self) -> None:
        """Rename the file, so that the next run measures again."""
        self._file.replace(self._file.with_stem("finished"))


@dataclass(frozen=True)
class _Bench:
    """Inputs that all measurements share."""

    model: Path
    peer: Path
    tokens: list[Path]
    """Files of calibration tokens by seed."""
    heldout: list[Tensor]
    folder: Path

    def prune(self, cut_name: str, method: str, seed: int, output: Path) -> float:
        """Prune the model into `output` and return the seconds of the complete process."""
        cut = CUTS[cut_name]
        shutil.rmtree(output, ignore_errors=True)
        if method in _IMPORTANCES:
            arguments = [str(self.tokens[seed]), str(output), _IMPORTANCES[method]]
            script = [str(self.peer), str(_PEER_SCRIPT), str(self.model)]
            command = [*script, *arguments, str(cut.mlp_frac), str(cut.num_kv_groups)]
        else:
            recipe = self.folder / "recipe.toml"
            recipe.write_text(_recipe(cut, method, seed, self.tokens[seed]), encoding="utf-8")
            command = [sys.executable, "-m", "slimserve", "compress", str(self.model)]
            command += ["--recipe", str(recipe), "-o", str(output)]
        return measure(command, self.folder / "last.log", peer_variables(NUM_THREADS)).wall_s

    def evaluate(self, cut_name: str, method: str, seed: int) -> Cell:
        """Return loss, seconds and size of one pruned model, and delete it unless it will be served."""
        is_served = method == _SERVED and seed == 0
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            output = self.served(cut_name) if is_served else Path(scratch) / "pruned"
            seconds = self.prune(cut_name, method, seed, output)
            return self.loss(output) | {"s": seconds}

    def loss(self, directory: Path) -> Cell:
        return {
            "nll": negative_log_likelihood(directory, self.heldout),
            "parameters": count_parameters(directory),
        }

    def served(self, cut_name: str) -> Path:
        return self.folder / f"{cut_name}-{_SERVED}"

    def prefill(self, name: str) -> Cell:
        """Return the prompts per second that vLLM prefills; a pruned model that is missing is built again."""
        directory = self.model if name == "dense" else self.served(name)
        if not directory.exists():
            self.prune(name, _SERVED, 0, directory)
        log = self.folder / f"vllm-{name}.log"
        spec = EngineSpec(directory, "model", plan_launch(directory, probe_hardware()), log, free_port())
        with Engine(spec):
            return {"requests_per_s": asyncio.run(_median_rate(spec.url))}


def main() -> None:
    optional = [_TAYLOR] if "--taylor" in sys.argv[1:] else []
    methods = ["random", *BASELINES, *optional, "osscar", "osscar_search", _BEST]
    model = resolve_model(MODEL)
    peer = peer_python("torch_pruning", on_top_of_ours=True)
    folder = cache_dir("bench") / f"prune-{_content_key(model)}"
    folder.mkdir(exist_ok=True)
    tokens = [folder / f"tokens-{seed}.jsonl" for seed in range(NUM_SEEDS)]
    for seed, file in enumerate(tokens):
        write_tokens(packed_tokens(model, "calibration", NUM_SAMPLES, seed=seed, length=SEQUENCE_LENGTH), file)
    bench = _Bench(model, peer, tokens, packed_tokens(model, "quality", NUM_HELDOUT), folder)
    results = _Results(folder / "cells.json")

    dense = results.get("dense", partial(bench.loss, model))
    metrics: dict[str, list[float]] = {}
    for cut_name in CUTS:
        metrics[f"{cut_name}_dense_nll"] = [dense["nll"]] * NUM_SEEDS
        for method in methods:
            num_seeds = _SEEDS_OF.get(method, NUM_SEEDS)
            cells = [_cell(results, bench, cut_name, method, seed) for seed in range(num_seeds)]
            metrics[f"{cut_name}_{method}_nll"] = [cell["nll"] for cell in cells]
            metrics[f"{cut_name}_{method}_s"] = [cell["s"] for cell in cells]
            metrics[f"{cut_name}_removed_params_frac"] = [1 - cells[0]["parameters"] / dense["parameters"]]
        _add_margins(metrics, cut_name)
    for number in range(NUM_ALTERNATIONS):
        speeds = {}
        names = ["dense", *CUTS]
        for name in names if number % 2 == 0 else reversed(names):
            speeds[name] = results.get(f"prefill {number} {name}", partial(bench.prefill, name))
        for cut_name in CUTS:
            ratio = speeds[cut_name]["requests_per_s"] / speeds["dense"]["requests_per_s"]
            metrics.setdefault(f"{cut_name}_prefill_speedup", []).append(ratio)
    results.close()
    for cut_name in CUTS:
        shutil.rmtree(bench.served(cut_name), ignore_errors=True)
    _print_tables(metrics, methods)
    print(bench_line("prune", metrics))


def _cell(results: _Results, bench: _Bench, cut_name: str, method: str, seed: int) -> Cell:
    seed = 0 if method in _SEEDLESS else seed
    return results.get(f"{cut_name} {method} {seed}", partial(bench.evaluate, cut_name, method, seed))


def _add_margins(metrics: dict[str, list[float]], cut_name: str) -> None:
    """Add the loss of the best baseline minus OSSCAR's, and OSSCAR's minus that with local search, for each seed."""
    baselines = zip(*(metrics[f"{cut_name}_{method}_nll"] for method in BASELINES), strict=True)
    plain, searched = metrics[f"{cut_name}_osscar_nll"], metrics[f"{cut_name}_osscar_search_nll"]
    metrics[f"{cut_name}_osscar_margin_nll"] = [
        min(others) - ours for others, ours in zip(baselines, plain, strict=True)
    ]
    metrics[f"{cut_name}_search_gain_nll"] = [before - after for before, after in zip(plain, searched, strict=True)]


def _recipe(cut: Cut, method: str, seed: int, tokens: Path) -> str:
    choice = "" if method == _BEST else f'method = "{method}"\n'
    mlp = f"mlp_remove_frac = {cut.mlp_frac}\n" if cut.mlp_frac else ""
    groups = f"kv_remove_frac = {cut.num_kv_groups / 3:.2f}\n" if cut.num_kv_groups else ""
    return (
        f'summary = "{method}, for bench-prune"\n'
        f'[calibration]\nsource = "{tokens}"\nnum_samples = {NUM_SAMPLES}\n'
        f"sequence_length = {SEQUENCE_LENGTH}\nseed = {seed}\n"
        f'[[steps]]\nstep = "prune"\n{choice}{mlp}{groups}'
    )


def _content_key(model: Path) -> str:
    """Return a key of all that results depend on: the code of pruning and of this benchmark, and the model."""
    own = [Path(__file__), _HERE / "heldout.py", *(_HERE / "peers").glob("torch_pruning*")]
    digest = sha256_of_files(sorted([*own, *(_HERE.parent / "compress").rglob("*.py")]))
    return f"{digest[:8]}-{model_hash(model)[:8]}"


async def _median_rate(url: str) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=2)) as client:

        async def prefill() -> None:
            prompt = random.choices(_TOKEN_IDS, k=PREFILL_TOKENS)
            body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            (await client.post("/v1/completions", json=body)).raise_for_status()

        await prefill()
        rates = []
        for _ in range(NUM_REPEATS):
            start = time.perf_counter()
            await asyncio.gather(*(prefill() for _ in range(NUM_PREFILLS)))
            rates.append(NUM_PREFILLS / (time.perf_counter() - start))
        return sorted(rates)[NUM_REPEATS // 2]


def _print_tables(metrics: dict[str, list[float]], methods: Sequence[str]) -> None:
    console = Console(stderr=True)
    losses = Table("", *CUTS, title="Held-out negative log-likelihood per token, three seeds (seconds)")
    for method in ("dense", *methods):
        row = []
        for cut_name in CUTS:
            shown = " ".join(f"{nll:.3f}" for nll in metrics[f"{cut_name}_{method}_nll"])
            seconds = metrics.get(f"{cut_name}_{method}_s")
            row.append(f"{shown} ({sorted(seconds)[len(seconds) // 2]:.0f} s)" if seconds else shown)
        losses.add_row(method, *row)
    console.print(losses)
    gains = Table("", "parameters removed", "prefill speed-up in vLLM", title="Size and speed after pruning")
    for cut_name in CUTS:
        removed, speedups = metrics[f"{cut_name}_removed_params_frac"][0], metrics[f"{cut_name}_prefill_speedup"]
        gains.add_row(cut_name, f"{removed:.1%}", " ".join(f"{value:.2f}x" for value in speedups))
    console.print(gains)


if __name__ == "__main__":
    main()
