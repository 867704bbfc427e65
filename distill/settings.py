"""Options of `slimserve distill` and its subcommands; recipe keys with an option are declared in distill/recipe.py."""

from __future__ import annotations

from pathlib import Path

from slimserve.core.config import Settings, setting
from slimserve.workloads import DEFAULT_TRAINING_WORKLOAD


class ModelSettings(Settings):
    """The options that name the models and the recipe of a training."""

    student: str = setting("", "Model to train, as it is at the start.", metavar="MODEL")
    teacher: str | None = setting(
        None,
        "Model to imitate, or the address of a server of it; without it the student is fine-tuned on the data alone.",
        metavar="MODEL|URL",
    )
    recipe: Path | None = setting(
        None, "Built-in recipe, or path of a recipe file (docs/distill.md).", metavar="NAME|FILE.toml"
    )
    assignments: tuple[str, ...] = setting(
        (), "Change a key of the recipe; may be repeated.", option="--set", metavar="TABLE.KEY=VALUE"
    )
    device: str = setting(
        "auto",
        "Device that trains: auto takes a GPU if PyTorch sees one, and under `accelerate launch` what it gives.",
        metavar="auto|cpu|cuda[:N]",
    )


class DistillSettings(ModelSettings):
    """The options of `slimserve distill`."""

    output: Path | None = setting(
        None, "Directory of the new student; it must not exist yet.", option=("-o", "--output"), metavar="DIR"
    )


class SweepSettings(ModelSettings):
    """The options of `slimserve distill sweep`."""

    student: str = setting(..., "Model to train, as it is at the start.", metavar="MODEL")
    lead_spans: str = setting("0.25,0.5,0.75,1", "Fractions of each sequence to train on, from its start.")
    windows: str = setting("", "Further parts of a sequence, such as right@0.5,middle@0.5.")
    sections: str = setting(
        "all", "Supervised sections, such as all,cot; only the first gets every lead span, the others full sequences."
    )
    controls: bool = setting(
        False, "Train each shorter span again on as many tokens as full sequences have.", option="--controls"
    )
    output: Path = setting(
        ..., "Directory of the students, the table and the plot.", option=("-o", "--output"), metavar="DIR"
    )


class TracesSettings(Settings):
    """The options of `slimserve distill traces`."""

    url: str = setting(..., "Address of the served teacher, such as http://127.0.0.1:8000.")
    model: str | None = setting(None, "Name of the teacher at the server (default: the only model there).")
    workload: str = setting(
        DEFAULT_TRAINING_WORKLOAD, "Workload that supplies and verifies the problems.", metavar="NAME|FILE"
    )
    num_problems: int = setting(500, "Number of problems.", ge=1)
    num_tries: int = setting(4, "Maximum number of replies per problem; the first correct one is kept.", ge=1)
    temperature: float = setting(0.8, "Sampling temperature.", ge=0)
    max_tokens: int = setting(512, "Maximum number of tokens per reply.", ge=1)
    seed: int = setting(0, "Random seed of problems and replies.")
    output: Path = setting(
        ..., "File to which correct replies are appended.", option=("-o", "--output"), metavar="FILE.jsonl"
    )
