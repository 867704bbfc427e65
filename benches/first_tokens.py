"""Find out what breaks the attention sink of a pruned model: the calibration data, the cut, or the model.

    make bench-first-tokens

SmolLM2 writes a large activation into the first token of a sequence, to which later tokens attend if they need nothing
(the attention sink). A model is pruned after calibration on sequences that start with a document, as served prompts do,
and on the same documents joined and cut anywhere. Every model then reads 200 frequent tokens, each followed by the same
31 tokens of four documents. A sink is broken if the norm of the first token's hidden state in the middle of the model
is less than half of the dense model's. The rows are two models (instruct and tuned), three cuts (a quarter of the MLP
neurons, one of three KV groups, both) and the two kinds of calibration data. Cuts of KV groups also calibrate on short
sequences with many first tokens. `kl` is KL(dense || variant) over all positions, `kl_broken` that of the sequences
with a broken sink. `served_broken` counts broken sinks among the first tokens of prompts of the workloads' `quality`
split. The last line of output is one JSON object.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.heldout import packed_tokens, write_tokens
from slimserve.compress.build import build_variant
from slimserve.compress.calibration import document_ids
from slimserve.compress.recipe import MIXED, Calibrate, Prune, Recipe
from slimserve.compress.reference import kl_per_token
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.tokenizer import load_tokenizer
from slimserve.workloads import load_workload, workload_names

MODELS = {"instruct": "smollm2-135m-instruct", "tuned": "smollm2-135m-tuned"}
CUTS = {"mlp25": (0.25, 0.0), "kv1": (0.0, 1 / 3), "both": (0.25, 1 / 3)}
"""Fractions of the MLP neurons and of the KV groups that are removed."""
STARTS = ("document", "anywhere")
NUM_SAMPLES, SEQUENCE_LENGTH = 32, 512
NUM_PROMPTS, NUM_FIRST_TOKENS, NUM_CONTINUATIONS, LENGTH = 64, 200, 4, 32
BROKEN_BELOW = 0.5


def main() -> None:
    metrics: dict[str, list[float]] = {}
    table = Table("model", "cut", "sequences start", "broken", "served", "KL", "KL of broken", title="Attention sinks")
    for name, source in MODELS.items():
        model = resolve_model(source)
        served = _served_tokens(model)
        tokens_NT, first_tokens = _sequences(model, served)
        dense = _read(model, tokens_NT)
        for (cut, fractions), start in itertools.product(CUTS.items(), STARTS):
            with tempfile.TemporaryDirectory() as folder:
                recipe = _recipe(model, fractions, start, Path(folder))
                variant = _read(build_variant(source, model, cut, recipe, Path(folder) / "variant"), tokens_NT)
            found = _compared(dense, variant, first_tokens, served)
            print_status(f"{name}, {cut}, {start}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
            # Without a broken sink, kl_broken is undefined and left out.
            known = {key: value for key, value in found.items() if not math.isnan(value)}
            metrics |= {f"{name}_{cut}_{start}_{key}": [value] for key, value in known.items()}
            table.add_row(name, cut, start, *(f"{value:.3f}" for value in found.values()))
    Console(stderr=True).print(table)
    print(bench_line("first-tokens", metrics))


def _recipe(model: Path, fractions: tuple[float, float], start: str, folder: Path) -> Recipe:
    source = MIXED
    if start == "anywhere":
        source = str(folder / "tokens.jsonl")
        write_tokens(packed_tokens(model, "calibration", NUM_SAMPLES, length=SEQUENCE_LENGTH), Path(source))
    mlp, groups = fractions
    return Recipe(
        summary=start,
        calibration=Calibrate(source=source, num_samples=NUM_SAMPLES, sequence_length=SEQUENCE_LENGTH),
        steps=(Prune(step="prune", mlp_remove_frac=mlp, kv_remove_frac=groups),),
    )


def _served_tokens(model: Path) -> set[int]:
    """Return the first tokens of the prompts of all built-in workloads, none of which is calibration data."""
    tokenizer = load_tokenizer(model)
    prompts = [load_workload(name).make_prompts("quality", NUM_PROMPTS, 0) for name in workload_names()]
    return {document_ids(tokenizer, prompt)[0] for prompt in itertools.chain(*prompts)}


def _sequences(model: Path, served: set[int]) -> tuple[Tensor, list[int]]:
    """Return sequences `[tokens x continuations, LENGTH]` and the first token of each, served ones included."""
    heldout = packed_tokens(model, "quality", 32)
    frequent = [token for token, _ in Counter(torch.cat(heldout).tolist()).most_common(NUM_FIRST_TOKENS)]
    first = sorted({*frequent, *served})
    continuations = [row[100 : 100 + LENGTH - 1] for row in heldout[:NUM_CONTINUATIONS]]
    rows = [torch.cat((torch.tensor([token]), rest)) for token in first for rest in continuations]
    return torch.stack(rows), [token for token in first for _ in continuations]


@torch.no_grad()
def _read(directory: Path, tokens_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of the first token's hidden state in the middle of the model, `[N]`, and the logits."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    norms, logits = [], []
    for batch_BT in tokens_NT.split(64):
        output = model(batch_BT, output_hidden_states=True, use_cache=False)
        middle = output.hidden_states[len(output.hidden_states) // 2]
        norms.append(middle[:, 0].norm(dim=-1))
        logits.append(output.logits.bfloat16())
    return torch.cat(norms), torch.cat(logits)


def _compared(
    dense: tuple[Tensor, Tensor], variant: tuple[Tensor, Tensor], first_tokens: list[int], served: set[int]
) -> dict[str, float]:
    is_broken_N = variant[0] < BROKEN_BELOW * dense[0]
    is_served_N = torch.tensor([token in served for token in first_tokens])
    pairs = zip(dense[1], variant[1], strict=True)
    kl_N = torch.stack([kl_per_token(reference.float(), other.float()).mean() for reference, other in pairs])
    return {
        "broken": float(is_broken_N.float().mean()),
        "served_broken": float(is_broken_N[is_served_N].float().mean()),
        "kl": float(kl_N.mean()),
        "kl_broken": float(kl_N[is_broken_N].mean()),
    }


if __name__ == "__main__":
    main()
