"""The smallest cut of MLP neurons that costs a model enough of a skill for distillation to have something to return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slimserve.core.progress import print_status

CUTS = (0.5, 0.625, 0.75, 0.875)
"""Fractions of the MLP neurons that are removed in turn."""


def smallest_costly_cut(
    build: Callable[[float], Path], skill: Callable[[Path], float], skill_before: float, least_loss: float
) -> tuple[Path, float]:
    """Return the first of `CUTS` whose model loses `least_loss` of its skill, or the largest; and its fraction.

    `build` returns the model without a fraction of the neurons, and `skill` measures it on development data.
    """
    for removed_frac in CUTS:
        directory = build(removed_frac)
        skill_after = skill(directory)
        print_status(f"{directory.name}: {skill_after:.4f} on the development data, uncut {skill_before:.4f}")
        if skill_after <= skill_before - least_loss:
            break
    return directory, removed_frac
