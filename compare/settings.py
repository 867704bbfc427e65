"""Settings of `slimserve compare`, for the command line and for the [compare] table of a pipeline alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ValidationInfo, field_validator

from slimserve.core.config import Fraction, Settings, StrictModel, Text, setting
from slimserve.core.errors import UserError
from slimserve.workloads import is_workload, load_workload, workload_names

_VARIANT_NAME = re.compile(r"[\w.-]+")
"""Names of variants are also names of folders."""
_SHIP, _BASELINE = "Requirements for shipping", "Comparison with an earlier run"


@dataclass(frozen=True)
class Endpoint:
    """A running server that is compared as one more variant."""

    name: str
    url: str
    model: str | None
    """Name of the model on the server; None selects the only one."""


@dataclass(frozen=True)
class ExistingModel:
    """A model that is already built and compared as one more variant."""

    name: str
    model: str
    """A model argument: directory, hub id, GGUF file or built-in name."""


@dataclass(frozen=True)
class WorkloadRates:
    """Open-loop rates of one workload in requests/s, ascending."""

    workload: str
    rates: tuple[float, ...]


@dataclass(frozen=True)
class WorkloadSlo:
    """One service-level objective of one workload."""

    workload: str
    objective: str


_OfWorkload = TypeVar("_OfWorkload", WorkloadRates, WorkloadSlo)


def _parse_names(value: Any) -> Any:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _parse_existing_model(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name, _, model = value.partition("=")
    if not _VARIANT_NAME.fullmatch(name) or not model:
        raise ValueError("this is not a named model; write NAME=DIR, or NAME= and any other model argument")
    return ExistingModel(name, model)


def _parse_endpoint(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name, _, rest = value.partition("=")
    url, _, model = rest.partition("#")
    if not _VARIANT_NAME.fullmatch(name) or not url.startswith(("http://", "https://")):
        raise ValueError("this is not an endpoint; write NAME=http://HOST:PORT or NAME=URL#MODEL")
    return Endpoint(name, url, model or None)


def _parse_rates(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    workload, _, text = value.partition("=")
    try:
        rates = sorted({float(rate) for rate in text.split(",")})
    except ValueError:
        rates = []
    if not is_workload(workload) or not rates or not rates[0] > 0:
        example = workload_names()[0]
        raise ValueError(
            f"this is not a rate of a workload; write WORKLOAD=RATE, such as {example}=2 or {example}=1,2,4"
        )
    return WorkloadRates(workload, tuple(rates))


def _parse_slo(value: Any) -> Any:
    from slimserve.loadtest.slo import parse_objective

    if not isinstance(value, str):
        return value
    workload, _, objective = value.partition(":")
    if not is_workload(workload):
        raise ValueError(f"this names no workload; write WORKLOAD:SLO, such as {workload_names()[0]}:e2e_p99=2s")
    try:
        return WorkloadSlo(workload, parse_objective(objective).text)
    except UserError as error:
        raise ValueError(f"the objective {error.value!r} {error.problem}; {error.remedy}") from None


Names = Annotated[tuple[str, ...], BeforeValidator(_parse_names), Text("NAME[,NAME…]", ",".join)]
"""A tuple of names; on the command line separated by commas."""


class BaselineSettings(StrictModel):
    """An earlier comparison and the losses that are allowed relative to it."""

    path: Path | None = setting(
        None,
        "Folder or results.json of an earlier comparison. A loss above a limit below ends with exit code 1.",
        option="--baseline",
        panel=_BASELINE,
        metavar="DIR",
    )
    max_quality_loss_frac: Fraction = setting(
        0.01,
        "Maximum relative quality loss versus the baseline.",
        option="--baseline-quality-loss",
        panel=_BASELINE,
        ge=0,
        lt=1,
    )
    max_goodput_loss_frac: Fraction = setting(
        0.05,
        "Maximum relative loss of throughput or goodput versus the baseline.",
        option="--baseline-goodput-loss",
        panel=_BASELINE,
        ge=0,
        lt=1,
    )


class ComparisonSettings(Settings):
    """Settings of a comparison that do not depend on where its variants come from."""

    workloads: Names = setting(
        tuple(workload_names()),
        "Workloads, separated by commas: built-in names, or TOML files that describe your data.",
    )
    quick: bool = setting(False, "Run one round with fewer prompts; intervals become wider.")
    rates: tuple[Annotated[WorkloadRates, BeforeValidator(_parse_rates)], ...] = setting(
        (),
        "Open-loop rates of a workload in requests/s (default 50% and 80% of the reference's capacity).",
        option="--rate",
        metavar="WORKLOAD=RATE[,RATE…]",
    )
    slos: tuple[Annotated[WorkloadSlo, BeforeValidator(_parse_slo)], ...] = setting(
        (),
        "Objective that a variant must meet to be shipped, such as reasoning:ttft_p95=1s.",
        option="--slo",
        panel=_SHIP,
        metavar="WORKLOAD:SLO",
    )
    max_quality_loss_frac: Fraction = setting(
        0.03,
        "Maximum relative quality loss versus the reference model.",
        option="--max-quality-loss",
        panel=_SHIP,
        ge=0,
        lt=1,
    )
    confidence: Fraction = setting(
        0.9,
        "Least probability with which no variant that loses more is shipped; counts all variants together.",
        panel=_SHIP,
        gt=0.5,
        lt=1,
    )
    prompts: int | None = setting(
        None, "Number of quality prompts of each workload (default: chosen by the workload).", ge=1
    )
    calibrate: int = setting(
        0,
        "Fit the label scores of variants without a calibration on this number of prompts of the calibration split.",
        ge=0,
    )
    until_decided: bool = setting(
        False, "Stop asking a variant as soon as its quality is decided, at the latest after --prompts (default 2000)."
    )
    price_per_hour: float | None = setting(
        None,
        "Price of the machine per hour, in any currency (default: costs are in machine-seconds).",
        panel=_SHIP,
        ge=0,
    )
    baseline: BaselineSettings = BaselineSettings()

    @field_validator("rates", "slos")
    @classmethod
    def _are_compared(cls, given: tuple[_OfWorkload, ...], info: ValidationInfo) -> tuple[_OfWorkload, ...]:
        compared = {load_workload(name).name for name in info.data.get("workloads", ())} if given else set()
        for one in given:
            if load_workload(one.workload).name not in compared:
                raise ValueError(f"this names {one.workload}, which is not compared; add it to --workloads")
        return given

    def rates_by_workload(self) -> dict[str, tuple[float, ...]]:
        """Return the rates that the user gave, by the workload's name."""
        return {load_workload(one.workload).name: one.rates for one in self.rates}

    def slos_by_workload(self) -> dict[str, tuple[str, ...]]:
        """Return the objectives of each workload, by its name."""
        objectives: dict[str, tuple[str, ...]] = {}
        for one in self.slos:
            name = load_workload(one.workload).name
            objectives[name] = (*objectives.get(name, ()), one.objective)
        return objectives


class CompareSettings(ComparisonSettings):
    """Options of `slimserve compare`."""

    recipes: Names = setting(("dense", "w8a8", "prune25-w8a8"), "Recipes, separated by commas; each makes one variant.")
    variants: tuple[Annotated[ExistingModel, BeforeValidator(_parse_existing_model)], ...] = setting(
        (), "Existing model as one more variant.", option="--variant", metavar="NAME=MODEL"
    )
    endpoints: tuple[Annotated[Endpoint, BeforeValidator(_parse_endpoint)], ...] = setting(
        (), "Running server as one more variant.", option="--endpoint", metavar="NAME=URL[#MODEL]"
    )
