"""Search for the shape that meets a budget at the least output error.

The errors of many blocks do not simply add up. The search therefore ranks all shapes by the sum of their error curves,
builds the best few, and keeps the one whose next-token distributions are nearest to the dense model's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slimserve.compress import budget
from slimserve.compress.artifacts import StepFolder
from slimserve.compress.calibration import load_calibration
from slimserve.compress.families import with_sizes
from slimserve.compress.recipe import Prune, Quantize, Recipe
from slimserve.compress.reference import divergences
from slimserve.compress.runner import StepRunner
from slimserve.compress.steps import ErrorProfile, bind
from slimserve.core.errors import UserError
from slimserve.core.model_config import read_decoder_config
from slimserve.core.model_files import count_parameters, weight_files
from slimserve.core.progress import print_status
from slimserve.core.storage import write_atomically
from slimserve.core.variant import StepRecord, read_manifest

_NUM_EVALUATION_SEQUENCES = 8
"""Calibration sequences on which the finalists are compared; no build has seen them."""
_TIMING_TOLERANCE = 1.03
"""Factor by which a finalist that is timed again may exceed the limit."""

BuildFinalist = Callable[[str, Recipe, Path], Path]
"""Builds a variant from (recipe name, recipe, target) and returns its directory."""


@dataclass(frozen=True)
class BudgetSearch:
    """The search of one build."""

    runner: StepRunner
    directory: Path
    """The dense model."""
    recipe: Recipe
    step: Prune
    """First step of the recipe, with `keep`."""

    def run(self, build: BuildFinalist) -> tuple[Path, list[StepRecord]]:
        """Return the pruned checkpoint that meets the budget, and the records of the search and its steps."""
        assert self.step.keep is not None
        start = time.monotonic()
        dense = budget.Shape.of(with_sizes(read_decoder_config(self.directory)))
        folder = StepFolder(self.runner.work, "budget")
        record = folder.path / "finalists.json"
        if not record.is_file():
            write_atomically(record, json.dumps(self._find_finalists(folder)))
        # Read back from the file: after an interruption, new timings might rank other shapes first.
        results = json.loads(record.read_text(encoding="utf-8"))
        finalists, limit = results["finalists"], results["limit"]
        built = []
        for number, raw in enumerate(finalists, start=1):
            candidate = budget.ShapeCandidate.read(raw)
            print_status(f"{self.runner.name}: finalist {number} of {len(finalists)}: {candidate.shape}")
            concrete = self.recipe.model_copy(update={"steps": tuple(candidate.steps(self.step, dense))})
            built.append(build(f"finalist-{number}", concrete, folder.path / f"finalist-{number}"))
        sequences = self._evaluation_sequences()
        # One variant at a time, so that memory holds the output layers of two models only.
        losses = [divergences(self.directory, [variant], sequences)[0] for variant in built]
        fitting = [index for index, raw in enumerate(finalists) if raw["cost"] <= limit * _TIMING_TOLERANCE]
        best = min(fitting or range(len(built)), key=lambda index: (losses[index], index))
        manifest = read_manifest(built[best])
        assert manifest is not None
        detail = {
            **results,
            "keep": self.step.keep.model_dump(exclude_none=True),
            "finalists": [
                {**raw["shape"], "estimated_error": raw["estimated_error"], "cost": raw["cost"], "kl": kl}
                for raw, kl in zip(finalists, losses, strict=True)
            ],
            "chosen": finalists[best]["shape"],
        }
        if not fitting:
            detail["fallback"] = "no finalist reached the speedup when it was timed again; kept the most accurate one"
            print_status(f"{self.runner.name}: {detail['fallback']}")
        seconds = max(0.0, time.monotonic() - start - manifest.build_s)
        search = StepRecord(name="fit_budget", seconds=seconds, detail=detail)
        return built[best], [search, *(step for step in manifest.steps if step.name != "write")]

    def _find_finalists(self, folder: StepFolder) -> dict[str, Any]:
        """Return the shapes of least estimated error with their costs, and the limit; plain JSON."""
        assert self.step.keep is not None
        config = with_sizes(read_decoder_config(self.directory))
        last = self.recipe.steps[-1]
        num_bytes = sum(file.stat().st_size for file in weight_files(self.directory))
        allowance = budget.Budget(
            self.step.keep,
            config,
            count_parameters(self.directory),
            num_bytes,
            last if isinstance(last, Quantize) else None,
        )
        shapes = self._usable_shapes(allowance, config)
        profile = ErrorProfile(self.step, config, allowance.roles)
        _, curves = self.runner.walk(f"{self.runner.name}: error curves", self.directory, profile, folder)
        finalists = budget.rank(shapes, allowance.dense, curves)[: budget.NUM_FINALISTS]
        return {
            "limit": allowance.limit,
            "shapes_that_fit": len(shapes),
            "finalists": [{**asdict(candidate), "cost": allowance.measure(candidate.shape)} for candidate in finalists],
        }

    def _usable_shapes(self, allowance: budget.Budget, config: dict[str, Any]) -> list[budget.Shape]:
        """Return the shapes within the budget that the later steps accept; UserError if there is none."""
        shapes, refusal = [], None
        for shape in allowance.shapes(self.step.multiple):
            try:
                bind(self.recipe.steps[1:], shape.apply_to(config), self.recipe.calibration.seed)
            except UserError as error:
                refusal = error
            else:
                shapes.append(shape)
        if refusal is not None and not shapes:
            raise refusal
        return shapes

    def _evaluation_sequences(self) -> list[Tensor]:
        """Return calibration sequences that no build sees; if the source has no more, the last ones that they see."""
        settings = self.recipe.calibration
        num_wanted = settings.num_samples + _NUM_EVALUATION_SEQUENCES
        sizes = (num_wanted, settings.sequence_length)
        data = load_calibration(self.directory, settings.source, *sizes, settings.seed, self.runner.device)
        unseen_NT = data.tokens_NT[settings.num_samples :]
        if len(unseen_NT):
            return list(unseen_NT)
        print_status(
            f"{self.runner.name}: {settings.source} has no more text, so the finalists are compared on sequences that "
            "they were built with"
        )
        return list(data.tokens_NT[-_NUM_EVALUATION_SEQUENCES:])
