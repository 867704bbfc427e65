"""The measurements of a comparison: it serves every variant once per round and keeps every result immediately.

Odd rounds serve the variants in order and even rounds in reverse order, so that a change of the machine's speed favours
none of them. A round loads every workload: first in a closed loop, which measures capacity, then with Poisson arrivals
at rates that are the same for all variants. The first round also measures quality and the rates that only draw a curve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from slimserve.compare.backend import Backend
from slimserve.compare.bottleneck import EnergyMeter, find_bottleneck, read_rooflines
from slimserve.compare.calibrate import calibrate_target, can_calibrate, keep_calibration
from slimserve.compare.decision import Ruling
from slimserve.compare.evaluation import answers_file, decide_quality, kept_answers, look_prompts, quality_outcomes
from slimserve.compare.plan import load_seed, round_rates
from slimserve.compare.quality import ask_quality, ask_text, count_prompts, write_answers
from slimserve.compare.results import TEXT, Comparison, LoadRun, Round, VariantResult
from slimserve.core.hardware import probe_hardware
from slimserve.core.openai_client import CONCURRENCY, ENGINE_CONCURRENCY, Target
from slimserve.core.progress import print_status
from slimserve.core.variant import read_manifest
from slimserve.loadtest.settings import LoadSettings, SuiteOptions

_OVERLOAD_FACTOR = 1.5
"""A rate above this multiple of the capacity is not run on a CPU. Larger batches gain little there, so the queue would
only grow, and it takes minutes to drain."""
_MAX_LOADS = 10
"""More load tests than a workload has in one round."""
_PROMPTS_PER_LOAD = 340
"""About the number of prompts of one load test. Tests of one start use different prompts, so none hits the prefix cache
because of an earlier test."""
_TIMEOUT_S = 60.0
"""Maximum wait for an answer under load."""


class Measurement:
    """Serves every variant in rounds, measures what is missing and writes results.json after every measurement."""

    def __init__(
        self, comparison: Comparison, folder: Path, targets: Mapping[str, Target], backend: Backend, begin: float
    ) -> None:
        self._comparison = comparison
        self._folder = folder
        self._targets = targets
        self._backend = backend
        self._begin = begin
        self._seconds_before = comparison.elapsed_s
        self._meter = EnergyMeter()

    def write(self) -> Path:
        """Write results.json with the measurements so far."""
        self._comparison.elapsed_s = self._seconds_before + time.monotonic() - self._begin
        return self._comparison.write(self._folder)

    def run(self) -> None:
        self.write()
        order = [(variant, False) for variant in self._comparison.variants]
        for variant in self._comparison.baseline_variants:  # directly after today's variant of the same name
            place = next(index for index, (one, _) in enumerate(order) if one.name == variant.name)
            order.insert(place + 1, (variant, True))
        num_rounds = self._comparison.preset.num_rounds
        for number in range(1, num_rounds + 1):
            for place, (variant, is_baseline) in enumerate(order if number % 2 else order[::-1], start=1):
                name = f"{variant.name} of the baseline" if is_baseline else variant.name
                title = f"round {number} of {num_rounds}, {place} of {len(order)}: {name}"
                self._run_round(variant, number, is_baseline, title)

    def _run_round(self, variant: VariantResult, number: int, is_baseline: bool, title: str) -> None:
        one = next((one for one in variant.rounds if one.number == number), None)
        if one is None:
            one = Round(number)
            variant.rounds.append(one)
        folder = self._folder / (f"{variant.name}-baseline" if is_baseline else variant.name)
        is_asked = is_baseline or number > 1 or self._is_asked(variant)
        if is_asked and (self._is_loaded(one) or self._is_lost(variant)):
            print_status(f"--- {title}: measured earlier, reused ---")
            return
        print_status(f"--- {title} ---")
        with self._served(variant, one, folder / f"engine-{number}.log") as target:
            if not is_asked:
                self._ask(variant, target)
            if self._is_lost(variant):
                print_status(f"{variant.name}: loses too much quality, so a quick comparison does not load it")
            else:
                for workload in self._comparison.workloads:
                    self._load(variant, one, target, workload, folder)
        self.write()

    @contextmanager
    def _served(self, variant: VariantResult, one: Round, log: Path) -> Iterator[Target]:
        if variant.directory is None:
            yield self._targets[variant.name]
            return
        with self._backend.serve(Path(variant.directory), log) as served:
            one.ready_s = served.ready_s
            yield served.target
            one.peak_rss_bytes = max(one.peak_rss_bytes or 0, served.peak_rss_bytes())

    def _is_asked(self, variant: VariantResult) -> bool:
        """Whether all quality prompts of a variant are answered, or as many as decide its quality."""
        preset = self._comparison.preset
        if preset.num_texts and not answers_file(self._folder, variant.name, TEXT).exists():
            return False
        if self._missing_calibrations(variant):
            return False
        counts = {name: self._num_answers(variant, name) for name in self._comparison.workloads}
        if all(count >= self._num_prompts(name) for name, count in counts.items()):
            return True
        is_reference = variant.name == self._comparison.reference
        return bool(preset.looks) and not is_reference and all(counts.values()) and self._ruling(variant) != "undecided"

    def _num_answers(self, variant: VariantResult, workload: str) -> int:
        answers = kept_answers(self._folder, variant.name, workload)
        return len(answers.answers) if answers else 0

    def _num_prompts(self, workload: str) -> int:
        """Return the number of quality prompts; fewer than the preset's if the workload has no more."""
        preset = self._comparison.preset
        return count_prompts(workload, preset.quality_prompts[workload], preset.seed)

    def _ruling(self, variant: VariantResult) -> Ruling:
        return decide_quality(self._comparison, quality_outcomes(self._comparison, self._folder, variant.name))

    def _is_lost(self, variant: VariantResult) -> bool:
        """Whether the preset saves the load tests of a variant, because it has lost too much quality.

        Then a baseline's variant of the same name needs none either.
        """
        if self._comparison.preset.loads_losers or variant.name == self._comparison.reference:
            return False
        return self._ruling(variant) == "loses"

    def _ask(self, variant: VariantResult, target: Target) -> None:
        """Ask the quality prompts, in batches until the quality is decided if the preset has looks.

        The reference answers all prompts, because every other variant is compared with it.
        """
        preset = self._comparison.preset
        is_reference = variant.name == self._comparison.reference
        concurrency = CONCURRENCY if variant.directory is None else ENGINE_CONCURRENCY
        for look in (1.0,) if is_reference or not preset.looks else preset.looks:
            for workload in self._comparison.workloads:
                known = kept_answers(self._folder, variant.name, workload)
                until = look_prompts(self._comparison, workload, look)
                num_prompts = preset.quality_prompts[workload]
                answers = ask_quality(target, workload, num_prompts, preset.seed, known, until, concurrency)
                write_answers(answers_file(self._folder, variant.name, workload), answers)
            self.write()
            if not is_reference and preset.looks and self._ruling(variant) != "undecided":
                break
        text_file = answers_file(self._folder, variant.name, TEXT)
        if preset.num_texts and not text_file.exists():
            write_answers(text_file, ask_text(target, preset.num_texts, preset.text_tokens, preset.seed))
        for workload in self._missing_calibrations(variant):
            calibration = calibrate_target(target, workload, preset.calibration_prompts, preset.seed)
            variant.calibrations[workload] = calibration
            if variant.directory is not None and read_manifest(Path(variant.directory)):
                keep_calibration(Path(variant.directory), calibration)
            self.write()

    def _missing_calibrations(self, variant: VariantResult) -> list[str]:
        """Return the workloads whose label scores the variant has no calibration for, if the preset fits them."""
        if not self._comparison.preset.calibration_prompts:
            return []
        names = [name for name in self._comparison.workloads if can_calibrate(name)]
        return [name for name in names if name not in variant.calibrations]

    def _is_loaded(self, one: Round) -> bool:
        return all(
            workload in one.capacity and not self._missing_rates(one, workload)
            for workload in self._comparison.workloads
        )

    def _missing_rates(self, one: Round, workload: str) -> list[float]:
        done = {run.rate_rps for run in one.at_rate.get(workload, [])} | set(one.overloaded.get(workload, []))
        return [rate for rate in round_rates(self._comparison, workload, one.number) if rate not in done]

    def _load(self, variant: VariantResult, one: Round, target: Target, workload: str, folder: Path) -> None:
        """Measure capacity first: the reference's capacity in the first round sets the rates of all variants."""
        users = self._comparison.preset.users[workload]
        index = _MAX_LOADS * list(self._comparison.workloads).index(workload)
        load_folder = folder / f"round-{one.number}" / workload
        if workload not in one.capacity:
            rooflines = read_rooflines(target)
            run = self._run_load(workload, target, one, index, load_folder / "capacity", users=users)
            one.capacity[workload] = run
            if one.number == 1:
                variant.bottlenecks[workload] = find_bottleneck(run.summary, users, rooflines)
            self.write()
        capacity = one.capacity[workload].summary.requests_per_s
        for step, rate in enumerate(round_rates(self._comparison, workload, one.number), start=1):
            if rate not in self._missing_rates(one, workload):
                continue
            if variant.directory is not None and not probe_hardware().gpus and rate > _OVERLOAD_FACTOR * capacity:
                print_status(
                    f"{variant.name}: skips {rate:g} {workload} requests/s, which far exceed its capacity of "
                    f"{capacity:.2g} requests/s"
                )
                one.overloaded.setdefault(workload, []).append(rate)
            else:
                run = self._run_load(workload, target, one, index + step, load_folder / f"{rate:g}-per-s", rate=rate)
                one.at_rate.setdefault(workload, []).append(run)
            self.write()

    def _run_load(
        self,
        workload: str,
        target: Target,
        one: Round,
        index: int,
        folder: Path,
        *,
        users: int | None = None,
        rate: float | None = None,
    ) -> LoadRun:
        preset = self._comparison.preset
        settings = LoadSettings(
            rate=f"{rate:g}" if rate is not None else "",
            users=users or 1,
            duration_s=preset.duration_s,
            warmup_s=preset.warmup_s,
            cooldown_s=preset.cooldown_s,
            timeout_s=_TIMEOUT_S,
            seed=load_seed(preset, one.number, index),
            suite=SuiteOptions(
                prompt_seed=load_seed(preset, one.number, 0), first_prompt=index % _MAX_LOADS * _PROMPTS_PER_LOAD
            ),
        )
        with self._meter.running():
            summary = self._backend.run_load(workload, target, settings, folder)
        rows_file = (folder / f"{workload}.rows.jsonl").relative_to(self._folder)
        return LoadRun(rate, users, summary, str(rows_file), self._meter.joules)
