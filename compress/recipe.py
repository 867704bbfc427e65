"""Recipes: what to do to a model, as small TOML files with strict keys.

summary = "A quarter of the MLP neurons cut, then W8A8 INT8"

[[steps]]
step = "prune_mlp"
remove_frac = 0.25

[[steps]]
step = "quantize"
format = "w8a8"
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contracts.errors import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PruneMlp(_Strict):
    """Remove MLP neurons, the same number in every block."""

    step: Literal["prune_mlp"]
    remove_frac: float = Field(gt=0, lt=1)
    """Share of the neurons to remove."""
    method: Literal["magnitude", "peak_magnitude"] = "peak_magnitude"
    multiple: int = Field(default=32, ge=1)
    """The kept width is a multiple of this: 32 suits CPU kernels, 64 or 128 GPU kernels."""


class Quantize(_Strict):
    """Quantize every linear layer of the decoder blocks; embeddings and head stay as they are."""

    step: Literal["quantize"]
    format: Literal["w8a8"]
    method: Literal["rtn"] = "rtn"


class Recipe(_Strict):
    """Steps in the order in which they are applied."""

    summary: str
    steps: tuple[Annotated[PruneMlp | Quantize, Field(discriminator="step")], ...] = ()

    @model_validator(mode="after")
    def _quantize_once_and_last(self) -> Recipe:
        kinds = [step.step for step in self.steps]
        if "quantize" in kinds[:-1]:
            raise ValueError("quantize must be the last step, and stand only once")
        return self


def list_recipes() -> dict[str, Recipe]:
    """The recipes that the package ships, by name."""
    folder = resources.files("compress") / "recipes"
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name: _parse((folder / f"{name}.toml").read_text(encoding="utf-8"), name) for name in names}


def load_recipe(argument: str) -> tuple[str, Recipe]:
    """A recipe and its name, from a shipped name or the path of a `.toml` file."""
    shipped = list_recipes()
    if argument in shipped:
        return argument, shipped[argument]
    path = Path(argument)
    if path.suffix == ".toml" and path.is_file():
        return path.stem, _parse(path.read_text(encoding="utf-8"), argument)
    raise UserError(
        "recipe", argument, "is unknown", f"choose from {', '.join(shipped)}, or give the path of a .toml file"
    )


def _parse(text: str, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError("recipe", origin, f"is not TOML ({error})", "mend the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "steps"
        raise UserError(
            f"recipe key {where}", first["input"], f"is refused: {first['msg']}", f"mend it in {origin}"
        ) from error
