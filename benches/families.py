"""Ask stock vLLM about compressed models of every family: does it load them, and does it compute what torch does?

    make bench-families

Each family of `tests/compress/families.py` is a small random model in bfloat16, whose sizes vLLM's kernels take. The
outcomes are the dense model, the model without a third of its MLP neurons, without half of its KV groups, without a
layer, and quantized. An outcome that the family cannot have is left out. `FAMILY_OUTCOME_off_nats` is the mean absolute
difference between vLLM's log-probabilities and those of plain torch in float32; `FAMILY_OUTCOME_noise_nats` is what
bfloat16 alone changes in plain torch. An outcome without the first one does not load, and the reason is printed. The
last line is one JSON object. vLLM runs once for all models, in eager mode.

Then `slimserve` serves the dense model of each family, and `FAMILY_served_off_nats` compares the log-probabilities that
come over HTTP. `FAMILY_score_off` is the absolute difference of a probability of `/v1/score` from plain torch.

Names of families or of outcomes after the command restrict the run; `served` is one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benches.served import our_spec
from slimserve.compare.check import Reference, deviations, model_prompts, reference_logprobs, tolerance
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import AnyStep, Calibrate, Prune, PruneDepth, Quantize, Recipe
from slimserve.core.errors import UserError
from slimserve.core.model_config import read_decoder_config
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir
from slimserve.serve.engine.offline import VllmAnswer, ask_vllm
from slimserve.serve.launch.process import Engine
from tests.compress.conftest import ids_file, save_tokenizer
from tests.compress.families import FAMILIES, tiny_config

_FACTOR = 8
OUTCOMES: dict[str, tuple[AnyStep, ...]] = {
    "dense": (),
    "mlp": (Prune(step="prune", mlp_remove_frac=0.33, multiple=32),),
    "kv": (Prune(step="prune", kv_remove_frac=0.5),),
    "depth": (PruneDepth(step="prune_depth", num_blocks=1),),
    "w8a8": (Quantize(step="quantize", format="w8a8", method="gptq"),),
    "w4a16": (Quantize(step="quantize", format="w4a16", method="gptq", group_size=64),),
}
"""Steps of each outcome."""
SERVED = "served"


def main() -> None:
    chosen = set(sys.argv[1:])
    families = [name for name in FAMILIES if name in chosen] or list(FAMILIES)
    wanted = [name for name in (*OUTCOMES, SERVED) if name in chosen] or [*OUTCOMES, SERVED]
    metrics: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        outcomes = [name for name in OUTCOMES if name in wanted or (name == "dense" and SERVED in wanted)]
        models = {
            f"{family}_{outcome}": directory
            for family in families
            for outcome, directory in _build(family, outcomes, Path(folder))
        }
        # The prompts depend on the vocabulary alone, which is the same in all families.
        prompts = model_prompts(read_decoder_config(next(iter(models.values())))["vocab_size"])
        references = {name: reference_logprobs(directory, prompts) for name, directory in models.items()}
        log = cache_dir("logs") / "bench-families.log"
        answers = list(ask_vllm(list(models.values()), [prompt.tolist() for prompt in prompts], log=log))
        for name, answer in zip(models, answers, strict=False):
            metrics |= _compared(name, references[name], answer)
        for name in list(models)[len(answers) :]:
            print_status(f"{name}: not asked, because vLLM ended before")
        for family in families if SERVED in wanted else ():
            name = f"{family}_dense"
            answer, score = _ask_served(models[name], prompts, log.with_name(f"bench-families-{family}.log"))
            metrics |= _compared(f"{family}_{SERVED}", references[name], answer)
            if not answer.error:
                metrics[f"{family}_score_off"] = [abs(score - float(references[name].exact[-1].exp()))]
    print(bench_line("families", metrics))


def _compared(name: str, reference: Reference, answer: VllmAnswer) -> dict[str, list[float]]:
    """Print how far an answer is from plain torch, and return the metrics; none if the model does not load."""
    if answer.error:
        print_status(f"{name}: does not load: {answer.error[:300]}")
        return {}
    off, noise = deviations(reference, answer)
    verdict = "agrees" if off < tolerance(noise) else "DIFFERS"
    print_status(f"{name}: {verdict}, {off:.3f} nats on average; bfloat16 rounding alone causes {noise:.3f}")
    return {f"{name}_off_nats": [off], f"{name}_noise_nats": [noise]}


def _ask_served(directory: Path, prompts: list[Tensor], log: Path) -> tuple[VllmAnswer, float]:
    """Serve a model as `slimserve serve` does; return its answer and the probability of the last token by a score."""
    *rest, item, label = prompts[-1].tolist()
    spec = our_spec(log, directory)
    try:
        with Engine(replace(spec, extra=("--enforce-eager", "--max-model-len", "64"))) as engine:
            client = openai.OpenAI(base_url=f"{engine.spec.url}/v1", api_key="none", timeout=120)
            rows: list[list[float]] = []
            for prompt in prompts:
                given = client.completions.create(
                    model=spec.name, prompt=prompt.tolist(), max_tokens=1, extra_body={"prompt_logprobs": 0}
                )
                positions: Any = given.choices[0].model_dump()["prompt_logprobs"]
                tokens = prompt.tolist()[1:]
                rows.append([one[str(token)]["logprob"] for token, one in zip(tokens, positions[1:], strict=True)])
            body = {"query": rest, "items": [[item]], "label_token_ids": [label]}
            answer = httpx.post(f"{engine.spec.url}/v1/score", json=body, timeout=120).raise_for_status().json()
            return VllmAnswer(str(directory), rows), float(answer["scores"][0][0])
    except (UserError, openai.APIError, httpx.HTTPError) as error:
        return VllmAnswer(str(directory), error=str(error)), 0.0


def _build(family: str, outcomes: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Build a random model of a family, and yield the name and the directory of each outcome that it can have."""
    torch.manual_seed(7)
    config = tiny_config(family, _FACTOR)
    config.initializer_range = 0.3 / _FACTOR**0.5
    dense = folder / family / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(dense)
    save_tokenizer(dense, config.vocab_size)
    calibration = Calibrate(source=ids_file(dense.parent), num_samples=6, sequence_length=16)
    for outcome in outcomes:
        recipe = Recipe(summary="", calibration=calibration, steps=OUTCOMES[outcome])
        try:
            yield outcome, build_variant(family, dense, outcome, recipe, folder / family / outcome)
        except UserError as error:
            print_status(f"{family}_{outcome}: cannot be built: {error}")


if __name__ == "__main__":
    main()
