import json
import math
from pathlib import Path

import pytest

from slimserve.compare.results import BaselineOutcome, Bottleneck, Difference, Loss, load_comparison, spread
from slimserve.compare.verdict import make_verdict
from slimserve.core.errors import UserError
from slimserve.workloads.interface import Estimate
from tests.compare.invented import RATE, comparison, kept, variant


def test_a_comparison_survives_a_round_trip(tmp_path: Path) -> None:
    variants = [variant(name, [50.0, 60.0], Estimate(0.7, 0.6, 0.8, 9), [0.5, math.inf]) for name in ("dense", "w8a8")]
    written = comparison(variants)
    written.verdict = make_verdict(written, {"dense": kept(1, 1), "w8a8": kept(1, 0.5)})
    variants[1].differences = {"recommendation": {"auc": Difference(0.1, 0.0, 0.2, 0.04, 9, "bootstrap")}}
    variants[1].bottlenecks = {"recommendation": Bottleneck("prefill", 1.0, 2.0, 3.0, None, 0.5)}
    written.baseline = BaselineOutcome("b", [Loss("w8a8", "recommendation", "auc", "quality", 0, 0, 0, 1, False)], [])
    file = written.write(tmp_path)
    read = load_comparison(file)
    assert read == load_comparison(tmp_path)
    assert read == written
    assert read.rates("recommendation") == [RATE]
    assert len(read.variant("w8a8").at_rate("recommendation", RATE)) == 1


def test_undefined_values_become_null_and_come_back(tmp_path: Path) -> None:
    nan = math.nan
    file = comparison([variant("dense", [50.0], Estimate(nan, nan, nan, 0), [0.5])]).write(tmp_path)
    assert json.loads(file.read_text())["variants"][0]["quality"]["recommendation"]["auc"]["value"] is None
    assert math.isnan(load_comparison(file).variants[0].quality["recommendation"]["auc"].low)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 1, "command": "compare", "commit": "", "hardware": {}, "versions": {}}']
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="is not a comparison of this version"):
        load_comparison(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results: .*results\.json' cannot be read"):
        load_comparison(tmp_path)


def test_a_spread_leaves_out_unknown_values() -> None:
    values = spread([3.0, None, 1.0, math.nan, 2.0])
    assert values is not None
    assert (values.median, values.min, values.max, values.n) == (2.0, 1.0, 3.0, 3)
    assert spread([None]) is None
