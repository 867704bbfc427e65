"""Tests of `slimserve inspect`, which shows a manifest as lines and as a plot."""

from pathlib import Path

import pytest

from slimserve.compress.build import build_variant
from slimserve.compress.inspect import describe_variant, layer_errors, plot_errors
from slimserve.compress.recipe import Prune, Quantize, Recipe
from slimserve.core.errors import UserError
from slimserve.core.variant import read_manifest

from .conftest import TinyModel


@pytest.fixture
def variant(tiny_llama: TinyModel, tmp_path: Path) -> Path:
    steps = (
        Prune(step="prune", mlp_remove_frac=0.3, multiple=4, method="peak_magnitude"),
        Quantize(step="quantize", format="w8a8"),
    )
    return build_variant("tiny", tiny_llama.directory, "own", Recipe(summary="", steps=steps), tmp_path / "variant")


def test_inspect_describes_steps_and_errors(variant: Path) -> None:
    text = "\n".join(describe_variant(variant))
    assert "neurons before 44, neurons after 32" in text
    assert "format w8a8, method rtn" in text
    manifest = read_manifest(variant)
    assert manifest is not None
    worst = max(layer_errors(manifest)["mlp.up_proj"])
    assert f"{worst:.4f} in block" in text


def test_inspect_writes_a_plot(variant: Path, tmp_path: Path) -> None:
    plot_errors(variant, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"neither \.png nor \.svg"):
        plot_errors(variant, tmp_path / "errors.pdf")


def test_a_directory_without_a_manifest_is_rejected(tiny_llama: TinyModel) -> None:
    with pytest.raises(UserError, match=r"has no slimserve\.json"):
        list(describe_variant(tiny_llama.directory))
