"""The chunked distillation loss against the plain one: peak extra memory, time, and whether they agree.

    make bench-kd-memory

2,048 tokens, a vocabulary of 49,152, hidden states of 576 (SmolLM2's output layer), float32; forward KL and cross-
entropy, half and half, from a teacher's hidden states, with gradients of hidden states and output layer. Each side
runs in a process of its own, in turn, so that what one allocated is not the other's; its memory is the peak of the
resident set above what stood there with all inputs in place. The gradients, which both sides must hold, are part of
it. Last line: one JSON object. About two minutes.
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
from slimserve.distill.losses import LossSettings

NUM_TOKENS, VOCABULARY, HIDDEN_SIZE = 2048, 49_152, 576
NUM_ROUNDS, NUM_REPEATS = 3, 3
SETTINGS = LossSettings()
_SIDES = ("plain", "chunked")


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(_measure(sys.argv[1])))
        return
    figures: dict[str, list[float]] = {}
    for number in range(NUM_ROUNDS):
        told = {side: in_process("benches.kd_memory", side) for side in (_SIDES if number % 2 == 0 else _SIDES[::-1])}
        for name in ("memory", "time"):
            key = "peak_bytes" if name == "memory" else "seconds"
            figures.setdefault(f"chunked_{name}_ratio", []).append(told["chunked"][key] / told["plain"][key])
        for side, found in told.items():
            figures.setdefault(f"{side}_peak_mib", []).append(found["peak_bytes"] / 2**20)
            figures.setdefault(f"{side}_s", []).append(found["seconds"])
        print_status(f"round {number + 1}: {', '.join(f'{name} {values[-1]:.3g}' for name, values in figures.items())}")
    for name, error in _disagreement().items():
        figures[f"{name}_relative_error"] = [error]
    print(bench_line("kd-memory", figures))


def _measure(side: str) -> dict[str, float]:
    """Peak bytes above the inputs of a first pass, and the median seconds of some more."""
    hidden, head, labels, teacher = _inputs()
    memory = PeakMemory()
    torch.mm(hidden.detach()[:64], head.detach().T)  # the libraries' own buffers
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
    """Relative distance of the two sides' values and gradients."""
    hidden, head, labels, teacher = _inputs()
    found = []
    for side in _SIDES:
        hidden.grad = head.grad = None
        value = _backward(side, hidden, head, labels, teacher)
        assert hidden.grad is not None
        assert head.grad is not None
        found.append((value, hidden.grad, head.grad))
    return {
        name: float((ours - theirs).norm() / theirs.norm())
        for name, theirs, ours in zip(("value", "hidden_gradient", "head_gradient"), *found, strict=True)
    }


if __name__ == "__main__":
    main()
