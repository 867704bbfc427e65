"""Measures compression and distillation on one GPU, in at most eight minutes and without network or vLLM.

(1) Builds of a random Llama: W8A8 and W4A16 by GPTQ, and a quarter of the MLP neurons pruned. (2) A build on the GPU
against the same build on the CPU. (3) The step loop of distillation in bfloat16. The last line is one JSON object.

    python benches/gpu.py                 # 8B parameters, needs 40 GB of disk and a GPU
    python benches/gpu.py --device cpu    # a dry run with a tiny model
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.compress.artifacts import StepFolder
from slimserve.compress.calibration import CalibrationData
from slimserve.compress.checkpoint import CheckpointWriter
from slimserve.compress.decoder import decoder_of
from slimserve.compress.device import peak_gpu_bytes
from slimserve.compress.recipe import AnyStep, Prune, Quantize
from slimserve.compress.runner import StepRunner
from slimserve.compress.steps import bind
from slimserve.core.device import choose_device
from slimserve.distill.chunked import TeacherStates, chunked_loss
from slimserve.distill.recipe import LossSettings

BIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The sizes of Llama 3 8B."""
SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The sizes of SmolLM2-135M."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
STEPS: dict[str, AnyStep] = {
    "w8a8": Quantize(step="quantize", format="w8a8", method="gptq"),
    "w4a16": Quantize(step="quantize", format="w4a16", method="gptq", group_size=128),
    "prune25": Prune(step="prune", mlp_remove_frac=0.25),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, by a part of the device's name."""


def make_model(folder: Path, sizes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Write a random Llama in bfloat16 into `folder`, made on the device; return its config."""
    from transformers import LlamaConfig

    config: dict[str, Any] = LlamaConfig(**sizes, dtype="bfloat16").to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    writer, generator = CheckpointWriter(folder), torch.Generator(device).manual_seed(0)
    for name, shape in decoder_of(config).shapes.items():
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            tensor = values.mul_(shape[1] ** -0.5).bfloat16().cpu()
        writer.add({name: tensor})
    writer.close()
    return config


def run_step(model: Path, work: Path, step: AnyStep, tokens_NT: Tensor, device: torch.device) -> dict[str, Any]:
    """Run one step of a recipe over all blocks of a model; return what it cost. The blocks stay in `work`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    depth = config["num_hidden_layers"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    (bound,) = bind([step], config, 0)
    runner = StepRunner("bench", work, CalibrationData(tokens_NT, "", {}), None, device)
    _, details = runner.walk(step.step, model, bound, StepFolder(work, "0"))
    seconds = time.monotonic() - start
    decoder = decoder_of(config)
    weights = sum(shape[0] * shape[1] for shape in decoder.block_shapes(0).values() if len(shape) == 2)
    # One pass through the layers, and the products of inputs with themselves for the Hessians.
    flops = 2 * weights * tokens_NT.numel() * depth
    inputs = {group[0]: 0 for sublayer in decoder.sublayers[0] for stage in sublayer.stages for group in stage}
    for layer in inputs:
        flops += decoder.block_shapes(0)[f"{layer}.weight"][1] ** 2 * tokens_NT.numel() * depth
    return {
        "seconds": round(seconds, 2),
        "blocks": depth,
        "seconds_per_block": round(seconds / depth, 3),
        "calibration_tokens_per_s": round(tokens_NT.numel() / seconds),
        "peak_gpu_gib": gib(peak_gpu_bytes(device)),
        "share_of_peak": share_of_peak(flops / seconds, device),
        "mean_output_error": mean_error(details),
    }


def mean_error(details: list[dict[str, Any]]) -> float | None:
    values = [value for detail in details for value in detail.get("output_error", {}).values()]
    return round(sum(values) / len(values), 6) if values else None


def compare_devices(folder: Path, sizes: dict[str, Any], tokens_NT: Tensor, device: torch.device) -> dict[str, Any]:
    """Build the same W8A8 model on the device and on the CPU; return how much the weights differ."""
    config = make_model(folder / "same", sizes, device)
    weights: list[dict[str, Tensor]] = []
    seconds = []
    for number, one in enumerate((device, torch.device("cpu"))):
        work = folder / f"same-{number}"
        seconds.append(run_step(folder / "same", work, STEPS["w8a8"], tokens_NT, one)["seconds"])
        weights.append(StepFolder(work, "0").read_block(config["num_hidden_layers"] - 1))
    codes = [name for name, tensor in weights[0].items() if tensor.dtype == torch.int8]
    differing = sum(int((weights[0][name] != weights[1][name]).sum()) for name in codes)
    distance = [
        float((weights[0][name].float() - weights[1][name].float()).norm() / weights[1][name].float().norm())
        for name in codes
    ]
    total = sum(weights[0][name].numel() for name in codes)
    # Sums in another order move values across a rounding boundary, and GPTQ passes each change on to later features.
    return {
        "seconds_device": seconds[0],
        "seconds_cpu": seconds[1],
        "share_of_codes_that_differ": differing / total,
        "relative_distance": max(distance),
        "passed": max(distance) < 0.02,
    }


def distill_steps(
    sizes: dict[str, Any], device: torch.device, num_steps: int, batch: int, length: int
) -> dict[str, Any]:
    """Run the step loop of distillation with a teacher of the same sizes; return tokens per second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16
    with torch.device(device):
        teacher, student = (LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    settings, start = LossSettings(), 0.0
    for step in range(num_steps + 2):
        if step == 2:
            synchronize(device)
            start = time.monotonic()
        tokens_BT = torch.randint(0, sizes["vocab_size"], (batch, length), device=device)
        with torch.no_grad():
            known_ND = teacher.model(tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden_ND = student.model(tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        losses = chunked_loss(
            hidden_ND,
            student.lm_head.weight,
            tokens_BT.roll(-1, 1).flatten(),
            TeacherStates(known_ND, teacher.lm_head.weight),
            settings,
            chunk=4096 if device.type == "cuda" else 64,
        )
        (losses.total / tokens_BT.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    seconds = time.monotonic() - start
    num_tokens = num_steps * batch * length
    parameters = sum(parameter.numel() for parameter in student.parameters())
    # Two FLOPs per weight for the teacher, six for the student's forward and backward pass.
    return {
        "tokens_per_s": round(num_tokens / seconds),
        "share_of_peak": share_of_peak(8 * parameters * num_tokens / seconds, device),
        "peak_gpu_gib": gib(peak_gpu_bytes(device)),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 2**30, 2)


def share_of_peak(flops: float, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    return None if peak is None else round(flops / peak, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]; on a CPU the models are tiny")
    parser.add_argument("--blocks", type=int, default=32, help="decoder blocks of the large model (default 32)")
    parser.add_argument("--short-blocks", type=int, default=4, help="blocks of it for W4A16 and prune25 (default 4)")
    parser.add_argument("--folder", type=Path, help="folder for the models (default: a temporary one)")
    options = parser.parse_args()
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    samples = (128, 512) if on_gpu else (4, 32)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu (dry run with tiny models)",
        "torch": torch.__version__,
        "samples": samples,
    }
    start = time.monotonic()
    try:
        draw = torch.Generator().manual_seed(1)
        for name, step in STEPS.items():
            sizes = dict(BIG) if on_gpu else dict(TINY)
            if on_gpu:
                sizes["num_hidden_layers"] = options.blocks if name == "w8a8" else options.short_blocks
            model = folder / f"model-{sizes['num_hidden_layers']}"
            if not model.is_dir():
                begun = time.monotonic()
                make_model(model, sizes, device)
                results[f"seconds_to_make_{sizes['num_hidden_layers']}_blocks"] = round(time.monotonic() - begun, 1)
            tokens_NT = torch.randint(0, sizes["vocab_size"], samples, generator=draw)
            results[name] = run_step(model, folder / f"work-{name}", step, tokens_NT, device)
            shutil.rmtree(folder / f"work-{name}")
            print(json.dumps({name: results[name]}), flush=True)
            if name == "w8a8" and on_gpu and options.blocks != options.short_blocks:
                shutil.rmtree(model)
        small = {**SMALL, "num_hidden_layers": 2} if on_gpu else TINY
        tokens_NT = torch.randint(0, small["vocab_size"], (16, 256) if on_gpu else samples, generator=draw)
        results["gpu_equals_cpu"] = compare_devices(folder, small, tokens_NT, device)
        results["distill"] = distill_steps(*((SMALL, device, 20, 16, 1024) if on_gpu else (TINY, device, 2, 2, 32)))
        goal = results["w8a8"]["seconds"] <= 300 and (results["w8a8"]["peak_gpu_gib"] or 0) <= 8
        results["goal_met"] = goal if on_gpu else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
