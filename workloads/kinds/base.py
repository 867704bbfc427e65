"""What all kinds of workload files have in common: where the data is, its splits, and the sizes of measurements.

A kind is one module with a subclass of `FileSpec`, the keys of the file, and a subclass of `FileWorkload`, which turns
a row into a prompt and evaluates answers.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from slimserve.core.config import Fraction, StrictModel
from slimserve.core.errors import UserError
from slimserve.core.progress import print_once
from slimserve.workloads.interface import LaunchProfile, Prompt, Split, Workload, hash_number
from slimserve.workloads.kinds.rows import Row, Table, Unusable, read_dataset, read_file

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SHOWN = 3
_SPLIT_NAMES: dict[str, Split] = {
    "calibration": "calibration",
    "train": "calibration",
    "quality": "quality",
    "test": "quality",
    "load": "load",
}


class UnusableRowError(Exception):
    """A row cannot be made into a prompt; the message says why."""


class SplitFractions(StrictModel):
    """Fractions of the groups in each split."""

    calibration: Fraction = Field(0.3, ge=0, le=1, description="For recipes, training and validation.")
    quality: Fraction = Field(0.5, gt=0, le=1, description="For the metrics.")
    load: Fraction = Field(0.2, ge=0, le=1, description="For load tests.")


class FileSpec(StrictModel):
    """Keys that every workload file may have."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$", description="Name of the workload (default: the file's name).")
    data: str | list[str] = Field(default=[], description="Data file or files, relative to the workload file.")
    dataset: str | None = Field(None, description="Hugging Face dataset id, in place of `data`.")
    dataset_config: str | None = Field(None, description="Configuration of the dataset.")
    dataset_split: str = Field("test", description="Split of the dataset.")
    group: str | None = Field(
        None, description="Column of the user or query; rows of one group are not independent and share a split."
    )
    split: str | SplitFractions = Field(
        default=SplitFractions.model_validate({}),
        description="Column that names each row's split (calibration, quality, load), or fractions of the groups.",
    )
    max_unusable: Fraction = Field(0.01, ge=0, le=1, description="Largest fraction of rows that cannot be used.")
    primary_metric: str | None = Field(None, description="Metric that decides (default: the kind's own).")
    prompts: dict[Literal["quick", "full"], int] = Field(
        {"quick": 128, "full": 512}, description="Number of quality prompts in each preset of a comparison."
    )
    load_users: int = Field(8, ge=1, description="Number of closed-loop users that measure the capacity of a server.")
    launch_profile: LaunchProfile | None = Field(
        None, description="Phase that takes most of the time: prefill, decode or balanced (default: the kind's own)."
    )


@dataclass
class SplitRows:
    """The usable rows of each split, and what was found about them."""

    rows: dict[Split, list[Any]] = field(default_factory=lambda: {split: [] for split in get_args(Split)})
    unusable: list[Unusable] = field(default_factory=list)
    num_rows: int = 0
    num_groups: int = 0
    leaks: list[tuple[str, str]] = field(default_factory=list)
    """Places of rows whose prompt also occurs in the quality split, with the place there."""


class FileWorkload(Workload):
    """A workload of rows that a user's files hold; subclasses turn a row into a prompt."""

    spec: ClassVar[FileSpec]
    file: ClassVar[Path]
    """The workload file; relative paths in it start in its folder."""
    default_metric: ClassVar[str]
    default_profile: ClassVar[LaunchProfile] = "balanced"
    metric_names: ClassVar[tuple[str, ...]]
    """Metrics that may be primary."""

    @classmethod
    def from_spec(cls, spec: FileSpec, file: Path) -> FileWorkload:
        """Return the workload of a file with these keys; UserError if the keys contradict each other."""
        if (primary := spec.primary_metric or cls.default_metric) not in cls.metric_names:
            choices = ", ".join(cls.metric_names)
            raise UserError("primary_metric", primary, "is not a metric of this kind", f"choose from {choices}")
        return cls._make(spec, file, primary)

    @classmethod
    def _make(cls, spec: FileSpec, file: Path, primary: str) -> FileWorkload:
        facts = {
            "spec": spec,
            "file": file,
            "name": spec.name or re.sub(r"[^\w.-]", "-", file.stem),
            "primary_metric": primary,
            "preset_prompts": {"quick": 128, "full": 512, **spec.prompts},
            "load_users": spec.load_users,
            "launch_profile": spec.launch_profile or cls.default_profile,
            **cls.facts_of(spec, file.parent),
        }
        workload: FileWorkload = type(f"{cls.__name__}File", (cls,), facts)()
        return workload

    @classmethod
    def facts_of(cls, spec: Any, folder: Path) -> dict[str, Any]:  # noqa: ARG003
        """Return further attributes of a kind's workload; UserError if the keys contradict each other."""
        return {}

    @property
    def folder(self) -> Path:
        """Folder of the workload file."""
        return self.file.parent

    @property
    def files(self) -> list[Path]:
        """The workload file and its data files."""
        spec = self.spec
        names = [spec.data] if isinstance(spec.data, str) else list(spec.data)
        return [self.file, *(self.folder / name for name in (*names, *self.further_files()))]

    def further_files(self) -> list[str]:
        """Return data files that a kind names by keys of its own."""
        return []

    @abstractmethod
    def make_prompt(self, row: Row, group: int) -> Prompt:
        """Return the prompt of a row; UnusableRowError if the row cannot be used."""

    @abstractmethod
    def question(self, prompt: Prompt) -> str:
        """Return the text that two prompts have in common if one is the other's copy."""

    def read_rows(self) -> Table:
        """Read all data files or the dataset; UserError if there is none."""
        spec, table = self.spec, Table()
        names = [spec.data] if isinstance(spec.data, str) else list(spec.data)
        if bool(names) == bool(spec.dataset):
            raise UserError(
                "data", names, "needs either `data` or `dataset`", "name the data file in the workload file"
            )
        if spec.dataset:
            return read_dataset(spec.dataset, spec.dataset_config, spec.dataset_split)
        for name in names:
            part = read_file(self.folder / name)
            table.rows += part.rows
            table.unusable += part.unusable
        return table

    @cached_property
    def splits(self) -> SplitRows:
        """The prompts of each split; UserError if too many rows cannot be used."""
        table, result = self.read_rows(), SplitRows()
        result.unusable += table.unusable
        result.num_rows = table.num_read or len(table.rows) + len(table.unusable)
        groups: set[str] = set()
        places: dict[str, dict[Split, str]] = defaultdict(dict)
        for number, row in enumerate(table.rows):
            try:
                key = self._group_of(row, number)
                prompt = self.make_prompt(row, hash_number(key))
                split = self._split_of(row, key)
            except UnusableRowError as error:
                result.unusable.append(Unusable(row.place, str(error)))
                continue
            groups.add(key)
            result.rows[split].append(prompt)
            places[" ".join(self.question(prompt).casefold().split())].setdefault(split, row.place)
        result.num_groups = len(groups)
        for found in places.values():
            if "quality" in found:
                result.leaks += [(place, found["quality"]) for split, place in found.items() if split != "quality"]
        self._check_unusable(result)
        return result

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """Return the first `num_prompts` prompts of a split in the order of `seed`; fewer if it has no more."""
        prompts = list(self.splits.rows[split])
        random.Random(f"{split} {seed}").shuffle(prompts)
        return prompts[:num_prompts]

    def _group_of(self, row: Row, number: int) -> str:
        if self.spec.group is None:
            return f"row {number}"
        return str(column(row, self.spec.group))

    def _split_of(self, row: Row, key: str) -> Split:
        if isinstance(self.spec.split, str):
            name = str(column(row, self.spec.split))
            if name not in _SPLIT_NAMES:
                raise UnusableRowError(f"has the split {name!r}; write {', '.join(_SPLIT_NAMES)}")
            return _SPLIT_NAMES[name]
        fractions = self.spec.split
        total = fractions.calibration + fractions.quality + fractions.load
        place = hash_number(f"split {key}") / 2**48 * total
        if place < fractions.calibration:
            return "calibration"
        return "quality" if place < fractions.calibration + fractions.quality else "load"

    def _check_unusable(self, result: SplitRows) -> None:
        allowed = self.spec.max_unusable * result.num_rows
        shown = "; ".join(f"{one.place} {one.reason}" for one in result.unusable[:_SHOWN])
        if len(result.unusable) > allowed:
            raise UserError(
                "workload",
                self.name,
                f"has {len(result.unusable)} of {result.num_rows} rows that cannot be used: {shown}",
                "correct them, or allow them with max_unusable in the workload file",
            )
        if result.unusable:
            print_once(f"{self.name}: {len(result.unusable)} of {result.num_rows} rows cannot be used: {shown}")
        if not any(result.rows.values()):
            raise UserError("workload", self.name, "has no rows", "check the data files")


def column(row: Row, name: str) -> Any:
    """Return the value of a column; UnusableRowError if the row lacks it or it is null."""
    if name not in row.values:
        raise UnusableRowError(f"has no column {name} (it has {', '.join(map(str, row.values)) or 'none'})")
    if row.values[name] is None:
        raise UnusableRowError(f"has no value in the column {name}")
    return row.values[name]


def text_column(row: Row, name: str) -> str:
    """Return the text of a column; numbers become text, other values are an UnusableRowError."""
    value = column(row, name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UnusableRowError(f"has a {type(value).__name__} in the column {name}, not a text")
    return str(value)


def fill(template: str, row: Row, known: Mapping[str, str] | None = None) -> str:
    """Replace each `{column}` of a template by the row's text; `known` gives further values."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return known[name] if known and name in known else text_column(row, name)

    return _PLACEHOLDER.sub(replaced, template)


def number_of(value: Any, name: str) -> float:
    """Return a finite number; UnusableRowError names the column."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or abs(number) == float("inf"):
        raise UnusableRowError(f"has {value!r} in the column {name}, not a number")
    return number
