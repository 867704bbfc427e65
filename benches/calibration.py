"""Compare calibration sources: what each costs on three tasks, for pruning, two quantization formats, and a budget.

    make bench-calibration

From `smollm2-135m-tuned`, which ranks films and adds sums, each recipe is built with each source and seed: one of the
two tasks' workloads, `mixed` (both in turn), and `self-generated` (the model's own answers to general requests). The
divergence KL(dense || variant) is measured where a model answers: at the labels of film histories, and on the tokens of
replies with sums and of replies to twelve requests that are not among those of `self-generated`. The dense model wrote
the latter replies at temperature 1. Histories and sums are of the `quality` split. The cache keeps finished
measurements, so an interrupted run resumes. The last line of output is one JSON object.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slimserve.compress.build import build_variant
from slimserve.compress.calibration import document_ids
from slimserve.compress.recipe import MIXED, SELF_GENERATED, Recipe, load_recipe
from slimserve.compress.reference import kl_per_token, reference_logits
from slimserve.compress.self_generated import request_ids, self_generated_documents
from slimserve.core.chat_template import render_chat
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, cached_result, sha256_of_files
from slimserve.core.tokenizer import load_tokenizer
from slimserve.distill.sections import label_token
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChatPrompt, ScoringPrompt

MODEL = "smollm2-135m-tuned"
NUM_SEEDS = 2
SOURCES = ("recommendation", "reasoning", MIXED, SELF_GENERATED)
RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "prune25": ("prune25", ()),
    "w8a8": ("w8a8", ()),
    "w4a16": ("w4a16", ()),
    "keep85": ("prune25", ("prune.mlp_remove_frac=0", "prune.keep={ parameters = 0.85 }")),
}
"""Recipe and changes by the name of a variant; the one that builds for longest is last."""
NUM_DOCUMENTS, MAX_TOKENS = {"recommendation": 24, "reasoning": 64, "chat": 48}, 512
_CHAT_SEED = 0
_REQUESTS = (
    "Explain why the sky is blue.",
    "How do I learn to play the guitar?",
    "Write a poem about the sea.",
    "What is a database index?",
    "Give me three ideas for a birthday present.",
    "Who was Marie Curie?",
    "Plan a weekend in a big city.",
    "How does a bicycle stay upright?",
    "Correct the grammar of this sentence: he go to school yesterday.",
    "What is the difference between a virus and a bacterium?",
    "List five fruits and their colours.",
    "Write a SQL query that counts the customers of each country.",
)

AnsweredTokens = tuple[list[int], list[int]]
"""Token ids, and the positions whose next token the model answers."""


def main() -> None:
    model = resolve_model(MODEL)
    folder = cache_dir("bench-calibration")
    tasks = _tasks(model)
    code = sha256_of_files((Path(__file__).parent.parent / "compress").rglob("*.py"))
    metrics: dict[str, list[float]] = {}
    for name, source, seed in itertools.product(RECIPES, SOURCES, range(NUM_SEEDS)):
        base, changes = RECIPES[name]
        recipe = load_recipe(base, (*changes, f'calibration.source="{source}"', f"calibration.seed={seed}"))[1]
        inputs = (code, model_hash(model), recipe, tasks)
        measure = partial(_measure, model, name, recipe, folder / "variant", tasks)
        for task, value in cached_result(folder, f"{name}-{source}-{seed}", inputs, measure).items():
            metrics.setdefault(f"{name}_{source}_{task}", []).append(value)
    for name in RECIPES:
        table = Table("calibrated on", *tasks, title=f"{name}: KL to the dense model, {NUM_SEEDS} seeds")
        for source in SOURCES:
            cells = [" ".join(f"{value:.4f}" for value in metrics[f"{name}_{source}_{task}"]) for task in tasks]
            table.add_row(source, *cells)
        Console(stderr=True).print(table)
    print(bench_line("calibration", metrics))


def _measure(
    model: Path, name: str, recipe: Recipe, output: Path, tasks: Mapping[str, list[AnsweredTokens]]
) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    variant = build_variant(MODEL, model, name, recipe, output)
    results = {task: _divergence(model, variant, sequences) for task, sequences in tasks.items()}
    print_status(f"{name}: " + ", ".join(f"{task} {value:.4f}" for task, value in results.items()))
    return results


def _divergence(dense: Path, variant: Path, sequences: Sequence[AnsweredTokens]) -> float:
    """Return the mean KL(dense || variant) over the answered positions of all sequences, in nats."""
    tokens = [torch.tensor(ids) for ids, _ in sequences]
    streams = (reference_logits(dense, tokens), reference_logits(variant, tokens))
    values = [
        kl_per_token(reference_TV[answered], other_TV[answered])
        for (_, answered), reference_TV, other_TV in zip(sequences, *streams, strict=True)
    ]
    return float(torch.cat(values).double().mean())


def _tasks(model: Path) -> dict[str, list[AnsweredTokens]]:
    """Return held-out sequences by task."""
    tokenizer = load_tokenizer(model)
    histories, sums = (
        load_workload(name).make_prompts("quality", NUM_DOCUMENTS[name], 0) for name in ("recommendation", "reasoning")
    )
    assert isinstance(histories[0], ScoringPrompt)
    labels = {label_token(tokenizer, label) for label in histories[0].labels}
    ranking = []
    for prompt in histories:
        ids = document_ids(tokenizer, prompt)[:MAX_TOKENS]
        ranking.append((ids, [at - 1 for at, token in enumerate(ids) if token in labels]))
    reasoning = []
    for prompt in sums:
        assert isinstance(prompt, ChatPrompt)
        asked = render_chat(tokenizer, prompt.messages, "a sum", add_generation_prompt=True)
        num_prompt = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        reasoning.append(_reply(document_ids(tokenizer, prompt)[:MAX_TOKENS], num_prompt))
    written = self_generated_documents(model, tokenizer, _CHAT_SEED, "cpu", _REQUESTS)
    lengths = [len(request_ids(tokenizer, request)) for request in _REQUESTS]
    replies = itertools.islice(zip(written, itertools.cycle(lengths), strict=False), NUM_DOCUMENTS["chat"])
    return {
        "recommendation": ranking,
        "reasoning": reasoning,
        "chat": [_reply(ids, num_prompt) for ids, num_prompt in replies],
    }


def _reply(ids: list[int], num_prompt: int) -> AnsweredTokens:
    return ids, list(range(num_prompt - 1, len(ids) - 1))


if __name__ == "__main__":
    main()
