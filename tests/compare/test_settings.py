from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slimserve.compare.settings import CompareSettings, Endpoint, ExistingModel

FILE = Path(__file__).parents[2] / "examples" / "checked_sums.py"


def settings_of(**options: Any) -> CompareSettings:
    return CompareSettings.model_validate(options)


def test_existing_models_have_a_name() -> None:
    assert settings_of(variants=["student=models/a=b"]).variants == (ExistingModel("student", "models/a=b"),)


@pytest.mark.parametrize("text", ["student", "student=", "=dir", "a b=dir"])
def test_a_model_without_a_valid_name_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError, match="not a named model; write NAME=DIR"):
        settings_of(variants=[text])


def test_endpoints_are_named_urls_and_may_select_a_model() -> None:
    settings = settings_of(endpoints=["prod=http://h:8000", "a.b-1=https://h/x#org/model"])
    assert settings.endpoints == (
        Endpoint("prod", "http://h:8000", None),
        Endpoint("a.b-1", "https://h/x", "org/model"),
    )


@pytest.mark.parametrize("text", ["http://h:8000", "prod=h:8000", "=http://h", "a/b=http://h", "prod"])
def test_a_malformed_endpoint_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError, match="not an endpoint"):
        settings_of(endpoints=[text])


def test_rates_and_objectives_are_grouped_by_workload() -> None:
    settings = settings_of(
        rates=["recommendation=4,2", "reasoning=0.5"], slos=["reasoning:itl_p99=50ms", "reasoning:errors=1%"]
    )
    assert settings.rates_by_workload() == {"recommendation": (2.0, 4.0), "reasoning": (0.5,)}
    assert settings.slos_by_workload() == {"reasoning": ("itl_p99=50ms", "errors=1%")}


def test_rates_and_objectives_of_a_workloads_file_belong_to_its_name() -> None:
    slos = [f"{FILE}:itl_p99=50ms", f"{FILE}:errors=1%"]
    settings = settings_of(workloads=str(FILE), rates=[f"{FILE}=2"], slos=slos)
    assert settings.rates_by_workload() == {"checked_sums": (2.0,)}
    assert settings.slos_by_workload() == {"checked_sums": ("itl_p99=50ms", "errors=1%")}


@pytest.mark.parametrize("options", [{"rates": ["reasoning=2"]}, {"slos": ["reasoning:errors=1%"]}])
def test_a_rate_or_an_objective_of_a_workload_that_is_not_compared_is_rejected(options: dict[str, list[str]]) -> None:
    with pytest.raises(ValidationError, match="names reasoning, which is not compared; add it to --workloads"):
        settings_of(workloads="recommendation", **options)


@pytest.mark.parametrize("text", ["2", "chess=2", "reasoning=", "reasoning=0", "reasoning=x"])
def test_a_malformed_rate_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError, match="not a rate of a workload"):
        settings_of(rates=[text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e2e_p99=2s", "names no workload"),
        ("chess:e2e_p99=2s", "names no workload"),
        ("reasoning:e2e_p99", "the objective 'e2e_p99'"),
    ],
)
def test_a_malformed_objective_is_rejected(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings_of(slos=[text])


def test_a_maximum_loss_is_a_percentage_or_a_fraction() -> None:
    assert settings_of(max_quality_loss_frac="3%").max_quality_loss_frac == pytest.approx(0.03)
    assert settings_of(max_quality_loss_frac="0.05").max_quality_loss_frac == 0.05


@pytest.mark.parametrize("text", ["3", "-1%", "100%", "a lot"])
def test_a_maximum_loss_outside_of_0_to_1_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError):
        settings_of(max_quality_loss_frac=text)
