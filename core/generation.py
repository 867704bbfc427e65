"""A generation_config.json that stock tools can read and write again.

transformers reads contradictory settings with a warning and refuses to save them, which would end a training at its
very last step. So they are repaired before any work.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.model_config import GENERATION_FILE, read_generation_config

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Settings that vLLM takes over as defaults of a request."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def repair_generation_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a model's generation_config.json as transformers saves them, and a line per repair.

    Sampling settings without `do_sample` get `do_sample: true`, since vLLM samples with them. A setting that is still
    refused is left out. Raises UserError if the file is no JSON object, or if the rest cannot be saved either.
    """
    settings, file = read_generation_config(directory), directory / GENERATION_FILE
    if file.is_file() and not settings:
        return {}, [f"{file}: is empty and is left out"]
    problem, notes = _problem(settings), []
    sampled = {**settings, "do_sample": True}
    if problem and settings.get("temperature") != 0 and _problem(sampled) != problem:
        settings, problem = sampled, _problem(sampled)
        notes.append(f"{file}: do_sample is set to true, because transformers does not save sampling settings without")
    for name in list(settings):
        fewer = {key: value for key, value in settings.items() if key != name}
        if problem and _problem(fewer) != problem:
            notes.append(f"{file}: {name} {json.dumps(settings[name])} is left out, because transformers refuses it")
            settings, problem = fewer, _problem(fewer)
    if problem:
        raise UserError(GENERATION_FILE, file, f"cannot be saved ({problem})", "correct or delete the file")
    return settings, notes


def write_generation_config(source: Path, output: Path) -> None:
    """Write the repaired settings of the model in `source` to `output`; an empty file is not written."""
    settings, notes = repair_generation_config(source)
    if notes:
        (output / GENERATION_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    elif settings:
        (output / GENERATION_FILE).write_bytes((source / GENERATION_FILE).read_bytes())


def _problem(settings: dict[str, Any]) -> str | None:
    """Return why transformers would refuse to save the settings, or vLLM to start with them; None if neither does."""
    for name, value in settings.items():
        if name in _SAMPLING and value is not None and not (_is_number(value) and math.isfinite(value)):
            return f"`{name}` is not a number"
        tokens = value if isinstance(value, list) else [0 if value is None else value]
        if name in _TOKENS and not all(type(one) is int for one in tokens):
            return f"`{name}` is not a token id"
    from transformers import GenerationConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        GenerationConfig.from_dict(settings).validate(strict=True)
    except Exception as error:  # values of a wrong type raise other types than ValueError
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        logging.set_verbosity(verbosity)
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
