"""Measure the cost of distillation steps on the first half of each sequence, relative to the full sequence.

    make bench-distill-cost

The costs are time, memory and FLOPs. SmolLM2-135M teaches its variant with a quarter fewer MLP neurons. The loss is
forward KL and cross-entropy on all tokens of texts of 2,048 tokens, with bfloat16 products. A step is one pass over
four sequences, at lead spans 1.0 and 0.5. Each span runs in its own process, in turn. Step memory is the peak above the
weights, gradients and optimizer state, which a first step on a short text allocates; `total_memory_ratio` includes
them. The last line of output is one JSON object. The benchmark takes about ten minutes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from benches.child import in_process
from benches.heldout import packed_tokens
from benches.served import MODEL, built
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.distill.batches import Batch, make_batches
from slimserve.distill.cost import ModelShape, PeakMemory, training_flops
from slimserve.distill.models import load_model
from slimserve.distill.recipe import LossSettings
from slimserve.distill.sections import Example, Section
from slimserve.distill.student import OnlineTeacher, StudentLoss
from slimserve.distill.supervision import Supervision

NUM_SEQUENCES, SEQUENCE_LENGTH = 4, 2048
SPANS = (1.0, 0.5)
NUM_ROUNDS, NUM_STEPS = 3, 2
_WARM_UP_TOKENS = 32


def main() -> None:
    restart_with_fast_allocator()
    if len(sys.argv) > 1:
        print(json.dumps(_measure(float(sys.argv[1]))))
        return
    built("prune25")
    metrics: dict[str, list[float]] = {}
    for number in range(NUM_ROUNDS):
        order = SPANS if number % 2 == 0 else SPANS[::-1]
        results = {span: in_process("benches.distill_cost", str(span)) for span in order}
        full, half = (results[span] for span in SPANS)
        for name, key in (
            ("time", "seconds"),
            ("memory", "step_bytes"),
            ("total_memory", "peak_bytes"),
            ("flops", "flops"),
        ):
            metrics.setdefault(f"{name}_ratio", []).append(half[key] / full[key])
        for span, result in results.items():
            metrics.setdefault(f"seconds_{span:g}", []).append(result["seconds"])
            metrics.setdefault(f"step_gib_{span:g}", []).append(result["step_bytes"] / 2**30)
            metrics.setdefault(f"gflops_per_s_{span:g}", []).append(result["flops"] / result["seconds"] / 1e9)
        print_status(f"round {number + 1}: {', '.join(f'{name} {values[-1]:.3g}' for name, values in metrics.items())}")
    print(bench_line("distill-cost", metrics))


def _measure(span: float) -> dict[str, float]:
    """Return the seconds of the fastest step, the peak memory in bytes and the FLOPs of a step."""
    student_directory = built("prune25")
    teacher = OnlineTeacher(load_model(resolve_model(MODEL), torch.bfloat16))
    module = StudentLoss(load_model(student_directory, torch.float32))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    packed = packed_tokens(student_directory, "calibration", NUM_SEQUENCES, length=SEQUENCE_LENGTH)
    texts = [tokens.tolist() for tokens in packed]
    memory = PeakMemory()
    _step(module, teacher, optimizer, _batch([texts[0][:_WARM_UP_TOKENS]], 1.0))
    baseline = memory.now_bytes()
    batch = _batch(texts, span)
    seconds = []
    memory.reset()
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        _step(module, teacher, optimizer, batch)
        seconds.append(time.perf_counter() - begin)
    peak = memory.peak_bytes()
    student: Any = module.student
    flops = training_flops(ModelShape.of(student.config.to_dict()), batch.lengths, batch.num_targets)
    return {
        "seconds": min(seconds),
        "step_bytes": peak - baseline,
        "peak_bytes": peak,
        "flops": flops + teacher.flops(batch),
    }


def _batch(texts: list[list[int]], span: float) -> Batch:
    examples = [Example("text", tuple(tokens), (Section.COT,) * len(tokens)) for tokens in texts]
    sequences = Supervision(lead_span=span).apply_all(examples)
    (batch,) = make_batches(sequences, range(len(texts)), sum(map(len, texts)))
    return batch


def _step(module: StudentLoss, teacher: OnlineTeacher, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    output = teacher.predict(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses: Any = module(batch, output, LossSettings())
    (losses.total / batch.num_targets).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


if __name__ == "__main__":
    main()
