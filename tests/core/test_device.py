"""Tests of the choice of a device; a GPU is not needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slimserve.compare.check import check_variant
from slimserve.core.device import choose_device
from slimserve.core.errors import UserError
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill


def test_auto_takes_a_gpu_only_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto").type == expected


@pytest.mark.parametrize(
    ("name", "message"), [("cuda:7", "PyTorch sees 1 CUDA devices"), ("tpu", "is no device"), ("meta", "is no device")]
)
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        choose_device(name)


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: distill("none", None, DistillRecipe(), folder / "student", device="tpu"),
        lambda folder: next(check_variant(folder, "tpu")),
    ],
    ids=["distill", "check"],
)
def test_commands_refuse_an_unknown_device_before_any_work(command: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device"):
        command(tmp_path)
    assert not any(tmp_path.iterdir())
