"""Measure the peak memory of compressing a model that is larger than the memory budget.

    make bench-memory

The model is a randomly initialised Llama of 1.5B parameters (3.1 GB in bf16). It is written to the cache once and kept.
It is compressed by w4a16 GPTQ and by OSSCAR pruning of a quarter of the MLP neurons, each with 4 and with 16
calibration samples of random tokens. Peak memory is that of the complete process. The compressed models are deleted.
The benchmark needs 6 GB of disk. The last line is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benches.heldout import write_tokens
from benches.peers.environment import peer_variables
from benches.peers.measure import measure
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status, progress
from slimserve.core.provenance import bench_line
from slimserve.core.storage import atomic_directory, cache_dir

NUM_SAMPLES = (4, 16)
SEQUENCE_LENGTH = 512
NUM_THREADS = 2
STEPS = {
    "w4a16": 'step = "quantize"\nformat = "w4a16"\nmethod = "gptq"\ngroup_size = 128\nsymmetric = true\n',
    "prune25": 'step = "prune"\nmlp_remove_frac = 0.25\nmethod = "osscar"\n',
}
"""TOML of the single step of each recipe."""
HIDDEN, NEURONS, NUM_BLOCKS, VOCABULARY = 2048, 5632, 32, 32_000
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 4, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_TOKENIZER_OF = "smollm2-135m-instruct"
_STANDARD_DEVIATION = 0.02
_BLOCKS_PER_SHARD = 8


def main() -> None:
    model = _random_model()
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=cache_dir("bench")) as folder:
        for recipe, step in STEPS.items():
            peaks = []
            for num_samples in NUM_SAMPLES:
                peak_gib, wall_s = _compress(model, recipe, step, num_samples, Path(folder))
                print_status(f"{recipe} with {num_samples} samples: peak {peak_gib:.2f} GiB, {wall_s:.0f} s")
                peaks.append(peak_gib)
                metrics[f"{recipe}_{num_samples}_samples_peak_rss_gib"] = [peak_gib]
                metrics[f"{recipe}_{num_samples}_samples_s"] = [wall_s]
            metrics[f"{recipe}_peak_rss_gib"] = [max(peaks)]
            metrics[f"{recipe}_rss_growth_frac"] = [peaks[-1] / peaks[0] - 1]
    print(bench_line("memory", metrics))


def _compress(model: Path, recipe: str, step: str, num_samples: int, folder: Path) -> tuple[float, float]:
    """Return the peak memory in GiB and the seconds of one compression, and delete the compressed model."""
    name = f"{recipe}-{num_samples}"
    tokens_file, recipe_file, output = folder / f"{name}.jsonl", folder / f"{name}.toml", folder / name
    generator = torch.Generator().manual_seed(num_samples)
    tokens_NT = torch.randint(VOCABULARY, (num_samples, SEQUENCE_LENGTH), generator=generator)
    write_tokens(list(tokens_NT), tokens_file)
    recipe_file.write_text(
        f'summary = "{recipe}, for bench-memory"\n'
        f'[calibration]\nsource = "{tokens_file}"\nnum_samples = {num_samples}\nsequence_length = {SEQUENCE_LENGTH}\n'
        f"[[steps]]\n{step}",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "slimserve", "compress", str(model), "--recipe", str(recipe_file)]
    with progress(f"{recipe} with {num_samples} samples", None, "s"):
        usage = measure([*command, "-o", str(output)], folder / f"{name}.log", peer_variables(NUM_THREADS))
    shutil.rmtree(output)
    return usage.peak_rss_gib, usage.wall_s


def _random_model() -> Path:
    """Return the directory of the random model, which is written if it does not exist."""
    target = cache_dir("models") / "random-llama-1.5b-v1"
    if target.exists():
        print_status(f"random model: reused from {target}")
        return target
    tokenizer_files = [file for file in resolve_model(_TOKENIZER_OF).iterdir() if file.stem.startswith("token")]
    num_shards = 1 + NUM_BLOCKS // _BLOCKS_PER_SHARD
    with atomic_directory(target) as directory, progress("random model: writing", num_shards, "shards") as tick:
        weight_map, num_bytes = {}, 0
        for number, tensors in enumerate(_shards(), start=1):
            name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
            save_file(tensors, directory / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            tick(number)
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
        for file in tokenizer_files:
            shutil.copyfile(file, directory / file.name)
    return target


def _shards() -> Iterator[dict[str, Tensor]]:
    """Yield the bf16 tensors of one shard after another: embedding and head, then eight blocks per shard."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, _STANDARD_DEVIATION, generator=generator)

    def ones(width: int) -> Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    queries, keys = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    yield {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": ones(HIDDEN),
    }
    shapes = {
        "self_attn.q_proj": (queries, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (NEURONS, HIDDEN),
        "mlp.up_proj": (NEURONS, HIDDEN),
        "mlp.down_proj": (HIDDEN, NEURONS),
    }
    for start in range(0, NUM_BLOCKS, _BLOCKS_PER_SHARD):
        shard: dict[str, Tensor] = {}
        for block in range(start, start + _BLOCKS_PER_SHARD):
            prefix = f"model.layers.{block}."
            shard |= {f"{prefix}{layer}.weight": normal(*shape) for layer, shape in shapes.items()}
            shard |= {
                f"{prefix}{norm}.weight": ones(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")
            }
        yield shard


if __name__ == "__main__":
    main()
