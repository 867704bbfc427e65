"""Facts that an engine writes into its log: the kernels that vLLM chose and the phases of the start."""

from __future__ import annotations

import re

_KERNEL_LINE = re.compile(
    r"(?:Using|Selected) (\w*(?:Kernel|Experts)\w*) for (\w[\w. -]*?)\.?(?:\x1b\[0m)?\s*$", re.MULTILINE
)
_PHASE = "slimserve.start: {phase} after {seconds:.1f} s"
_PHASE_LINE = re.compile(r"^slimserve\.start: (.+) after ([\d.]+) s$", re.MULTILINE)


def phase_line(phase: str, seconds: float) -> str:
    """Return the log line that says how many seconds after its start the engine reached a phase."""
    return _PHASE.format(phase=phase, seconds=seconds)


def start_phases(log: str) -> list[tuple[str, float]]:
    """Return each phase of an engine's start with the seconds after which it was reached."""
    return [(phase, float(seconds)) for phase, seconds in _PHASE_LINE.findall(log)]


def chosen_kernels(log: str) -> dict[str, str]:
    """Return the kernel of each layer format as vLLM's log names them; empty if all layers are plain matrices."""
    return {layer.strip(): kernel for kernel, layer in _KERNEL_LINE.findall(log)}
