"""Compare the chunked distillation loss with the plain one: peak extra memory, time and numerical agreement.

    make bench-kd-memory

The inputs are 2,048 float32 hidden states of size 576 and a vocabulary of 49,152, as in SmolLM2's output layer. The
loss is half forward KL to a teacher and half cross-entropy, with gradients of the hidden states and the output layer.
Each loss runs in its own process, in turn, so that one does not reuse the memory of the other. Memory is the peak
resident set above the resident set with all inputs in memory. It includes the gradients, which both losses need. The
last line of output is one JSON object. The benchmark takes about two minutes.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import Tensor

from benches.child import in_process
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.distill.chunked import TeacherStates, chunked_loss, plain_losses
from slimserve.distill.cost import PeakMemory
from slimserve.distill.recipe import LossSettings

NUM_TOKENS, VOCABULARY, HIDDEN_SIZE = 2048, 49_152, 576
NUM_ROUNDS, NUM_REPEATS = 3, 3
SETTINGS = LossSettings()
_SIDES = ("plain", "chunked")


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(_measure(sys.argv[1])))
        return
    metrics: dict[str, list[float]] = {}
    for number in range(NUM_ROUNDS):
        order = _SIDES if number % 2 == 0 else _SIDES[::-1]
        results = {side: in_process("benches.kd_memory", side) for side in order}
        for name in ("memory", "time"):
            key = "peak_bytes" if name == "memory" else "seconds"
            metrics.setdefault(f"chunked_{name}_ratio", []).append(results["chunked"][key] / results["plain"][key])
        for side, result in results.items():
            metrics.setdefault(f"{side}_peak_mib", []).append(result["peak_bytes"] / 2**20)
            metrics.setdefault(f"{side}_s", []).append(result["seconds"])
        print_status(f"round {number + 1}: {', '.join(f'{name} {values[-1]:.3g}' for name, values in metrics.items())}")
    for name, error in _disagreement().items():
        metrics[f"{name}_relative_error"] = [error]
    print(bench_line("kd-memory", metrics))


def _measure(side: str) -> dict[str, float]:
    """Return the peak bytes above the inputs in a first pass and the median seconds of `NUM_REPEATS` more passes."""
    hidden, head, labels, teacher = _inputs()
    memory = PeakMemory()
    torch.mm(hidden.detach()[:64], head.detach().T)  # Allocates the libraries' own buffers before the baseline is read.
    before = memory.now_bytes()
    memory.reset()
    _backward(side, hidden, head, labels, teacher)
    peak = memory.peak_bytes() - before
    seconds = []
    for _ in range(NUM_REPEATS):
        hidden.grad = head.grad = None
        begin = time.perf_counter()
        _backward(side, hidden, head, labels, teacher)
        seconds.append(time.perf_counter() - begin)
    return {"peak_bytes": peak, "seconds": sorted(seconds)[NUM_REPEATS // 2]}


def _inputs() -> tuple[Tensor, Tensor, Tensor, TeacherStates]:
    numbers = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    head = 0.1 * draw(VOCABULARY, HIDDEN_SIZE)
    teacher = TeacherStates(draw(NUM_TOKENS, HIDDEN_SIZE), 0.1 * draw(VOCABULARY, HIDDEN_SIZE))
    labels = torch.randint(0, VOCABULARY, (NUM_TOKENS,), generator=numbers)
    return draw(NUM_TOKENS, HIDDEN_SIZE).requires_grad_(), head.requires_grad_(), labels, teacher


def _backward(side: str, hidden: Tensor, head: Tensor, labels: Tensor, teacher: TeacherStates) -> Tensor:
    if side == "chunked":
        total = chunked_loss(hidden, head, labels, teacher, SETTINGS).total
    else:
        total = plain_losses(hidden @ head.T, labels, teacher.hidden_ND @ teacher.head_VD.T, SETTINGS)[0].sum()
    total.backward()
    return total.detach()


def _disagreement() -> dict[str, float]:
    """Return the relative distance between the values and gradients of the two losses."""
    hidden, head, labels, teacher = _inputs()
    outputs = []
    for side in _SIDES:
        hidden.grad = head.grad = None
        value = _backward(side, hidden, head, labels, teacher)
        assert hidden.grad is not None
        assert head.grad is not None
        outputs.append((value, hidden.grad, head.grad))
    return {
        name: float((ours - theirs).norm() / theirs.norm())
        for name, theirs, ours in zip(("value", "hidden_gradient", "head_gradient"), *outputs, strict=True)
    }


if __name__ == "__main__":
    main()
