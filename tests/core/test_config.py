"""Tests of settings on the command line, in TOML files and with --set."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from slimserve.core.config import (
    Duration,
    Fraction,
    Settings,
    load_toml,
    parse_duration,
    set_value,
    setting,
    takes_settings,
    validated,
)
from slimserve.core.errors import UserError


class Requests(Settings):
    history: str = setting("24", "Number of items in a history.", panel="Requests")


class Load(Settings):
    arrival: Literal["constant", "poisson"] = setting("poisson", "Distribution of gaps.")
    users: int = setting(4, "Number of users.", ge=1)
    duration_s: Duration = setting(60.0, "Length of the window.", option="--duration")
    loss: Fraction = setting(0.03, "Maximum quality loss.", option="--max-quality-loss")
    slos: tuple[str, ...] = setting((), "Objective; repeatable.", option="--slo")
    price: float | None = setting(None, "Price per hour.")
    output: Path | None = setting(None, "Output folder.", option=("-o", "--output"))
    exact: bool = setting(False, "Generate exactly the maximum number of tokens.")
    internal: int = setting(0, "Never on the command line.", option="")
    requests: Requests = Requests()


def run(*arguments: str, only_given: bool = False) -> Any:
    app, seen = typer.Typer(), []

    @app.command()
    @takes_settings(Load, only_given=only_given)
    def load(suite: Annotated[str, typer.Argument()], settings: Any) -> None:
        seen.append(settings)

    result = CliRunner().invoke(app, ["chat", *arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    return seen[0] if seen else result.output


def test_defaults_are_those_of_the_model() -> None:
    assert run() == Load()


def test_every_kind_of_option_reaches_its_field() -> None:
    arguments = "--users 2 --duration 1.5m --slo a --slo b --history 3 --exact -o x --max-quality-loss 5% --price 2"
    expected = Load(
        users=2, duration_s=90.0, slos=("a", "b"), exact=True, output=Path("x"), loss=0.05, price=2.0,
        requests=Requests(history="3"),
    )  # fmt: skip
    assert run(*arguments.split()) == expected


def test_only_given_options_are_passed_on_to_be_merged_over_a_file() -> None:
    assert run("--users", "2", "--history", "9", only_given=True) == {"users": 2, "requests": {"history": "9"}}
    assert run(only_given=True) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--users 0", "--users: '0' is invalid"),
        ("--duration 2q", "--duration: '2q' is invalid: this is not a duration"),
        ("--arrival gamma", "'constant' or 'poisson'"),
        ("--max-quality-loss lots", "this is not a fraction"),
    ],
)
def test_a_bad_value_names_its_option(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments.split())


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("500ms", 0.5), ("1h", 3600), ("2s", 2)])
def test_durations_are_read_with_their_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1 day", "1e3"])
def test_text_that_is_not_a_duration_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_the_help_shows_defaults_in_the_users_units_and_hides_internal_fields() -> None:
    text = run("--help")
    assert "[default: 60s]" in text
    assert "[default: 3%]" in text
    assert "--internal" not in text


def test_set_changes_keys_of_tables_and_arrays() -> None:
    document: dict[str, Any] = {"stages": [{"steps": 1}]}
    for assignment in ("stages.0.steps=100", "loss.kind=forward_kl", "seed=7"):
        set_value(document, assignment)
    assert document == {"stages": [{"steps": 100}], "loss": {"kind": "forward_kl"}, "seed": 7}


@pytest.mark.parametrize("assignment", ["seed", "stages.3.steps=1", "seed.x=1"])
def test_set_rejects_a_path_that_does_not_exist(assignment: str) -> None:
    with pytest.raises(UserError, match="--set"):
        set_value({"stages": [{}], "seed": 1}, assignment)


def test_a_toml_file_with_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "load.toml"
    file.write_text("user = 3\n")
    with pytest.raises(UserError, match=r"load key user: '3' is invalid.*load\.toml"):
        validated(Load, load_toml(file, "load"), "load", file)
    file.write_text("user = \n")
    with pytest.raises(UserError, match="cannot be read"):
        load_toml(file, "load")
