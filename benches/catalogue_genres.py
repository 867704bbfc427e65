"""MovieLens with titles and genres as the texts of films, a tenth of which is in no training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slimserve.workloads.recommendation import Recommendation


@dataclass(frozen=True)
class Genres(Recommendation):
    name: ClassVar[str] = "films-by-genres"


WORKLOAD = Genres(item_text="genres", holds_out_items=True)
