"""MovieLens with titles as the texts of films, a tenth of which is in no training data (benches/catalogue.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slimserve.workloads.recommendation import Recommendation


@dataclass(frozen=True)
class Titles(Recommendation):
    name: ClassVar[str] = "films-by-title"


WORKLOAD = Titles(item_text="title", holds_out_items=True)
