"""Options of `slimserve compress` and `slimserve inspect`."""

from __future__ import annotations

from pathlib import Path

from slimserve.core.config import Settings, setting


class CompressSettings(Settings):
    """Options of `slimserve compress`."""

    recipe: str = setting(
        "w8a8", "Name of a built-in recipe (see --list), or path of a recipe file.", metavar="NAME|FILE.toml"
    )
    workload: str | None = setting(
        None,
        "Workloads whose calibration split the steps read (default: the recipe's, or text that the model writes).",
        metavar="NAME|FILE.toml",
    )
    output: Path | None = setting(
        None,
        "Directory to write. By default the variant goes to the cache, and an earlier build is reused.",
        option=("-o", "--output"),
    )
    changes: tuple[str, ...] = setting(
        (),
        "Change one key of the recipe, as in quantize.group_size=64. Can be given several times.",
        option="--set",
        metavar="TABLE.KEY=VALUE",
    )
    device: str = setting(
        "auto",
        "Device that computes the layers: auto takes a GPU if PyTorch sees one.",
        metavar="auto|cpu|cuda[:N]",
    )
    list_recipes: bool = setting(False, "List the built-in recipes and exit.", option="--list")


class InspectSettings(Settings):
    """Options of `slimserve inspect`."""

    plot: Path | None = setting(None, "Write a chart of the error per layer to this .png or .svg file.")
