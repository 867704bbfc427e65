"""Calibration of label scores: a monotone map from a model's scores to probabilities that hold on a workload.

A label's score is its share of the labels' probability after a prompt. Language models are over- or underconfident, and
quantization and pruning change by how much, so each variant has a map of its own in its manifest. Two labels have one
strictly increasing map of the first label's score; the second label gets the rest. More labels share a temperature.
Both keep every order: that of the items by a label's score with two labels, and that of the labels of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from slimserve.core.config import StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SMALLEST = 1e-15
"""Scores are kept this far from 0 and 1, so that their logits are finite."""


class Fit(StrictModel):
    """Agreement of scores with outcomes."""

    calibration_error: float
    """Expected calibration error over ten bins of equal width."""
    brier: float


class LabelMap(StrictModel):
    """A map from the labels' shares of one item to probabilities, which keeps orders."""

    method: Literal["isotonic", "logistic", "temperature"]
    logits: list[float] = Field(default_factory=list)
    """Knots of the map: logits of scores, ascending."""
    calibrated_logits: list[float] = Field(default_factory=list)
    """Logits of the probabilities at the knots, ascending; between knots the map is linear in logits."""
    outer_slope: Annotated[float, Field(gt=0)] = 1.0
    """Slope of the map in logits before the first and after the last knot."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The labels' log-probabilities are divided by it; only the method `temperature` uses it."""

    def apply(self, shares: Sequence[float]) -> list[float]:
        """Return the calibrated probabilities of the labels from their shares, both in the same order."""
        if self.method == "temperature":
            import numpy as np

            logs = np.log(np.clip(np.asarray(shares, dtype=np.float64), _SMALLEST, 1.0)) / self.temperature
            weights = np.exp(logs - logs.max())
            return [float(value) for value in weights / weights.sum()]
        first = float(self.apply_map([shares[0]])[0])
        return [first, 1.0 - first]

    def apply_map(self, scores: Sequence[float]) -> NDArray[np.float64]:
        """Return the calibrated probabilities of the first of two labels from its scores."""
        return map_scores(scores, self.logits, self.calibrated_logits, self.outer_slope)


class ScoreCalibration(LabelMap):
    """The calibration of one variant's label scores on one workload."""

    workload: str
    labels: list[str] = Field(min_length=2)
    """Label texts, in the order of the shares; a request must score the same ones."""
    num_items: int
    """Number of scored items that the map was fitted on."""
    num_groups: int
    """Number of users or queries that they come from."""
    before: Fit
    """Agreement of the uncalibrated scores on these items."""
    after: Fit
    """Agreement of the calibrated scores on the same items, each by a map that was fitted without its group."""


def logits_of(scores: Sequence[float]) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of each score."""
    import numpy as np

    clipped = np.clip(np.asarray(scores, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    result: NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return result


def map_scores(
    scores: Sequence[float], knots: Sequence[float], values: Sequence[float], outer_slope: float
) -> NDArray[np.float64]:
    """Return the probabilities of a map that is linear in logits between knots and has one slope outside of them."""
    import numpy as np

    x = logits_of(scores)
    y = np.interp(x, knots, values)
    y = y + outer_slope * (np.minimum(x - knots[0], 0) + np.maximum(x - knots[-1], 0))
    result: NDArray[np.float64] = 1 / (1 + np.exp(-y))
    return result
