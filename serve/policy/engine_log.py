"""Facts that an engine writes into its log: the kernels that vLLM chose, the phases of the start, and why it ended.

vLLM runs in several processes, and the one that exits last tells only that another one failed: "Engine core
initialization failed. See root cause above." The cause is the last exception of the process that failed first, often
a hundred lines above the end of the log.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

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


_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LINE = re.compile(
    r"(?:\((?P<process>[^()]* pid=\d+)\) ?)?"
    r"(?P<record>(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?(?P<text>.*)"
)
"""A line of vLLM's log: its process, the header of its record, which every line of a message repeats, and its text."""
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):$")
_PROCESS_HEADER = re.compile(r"Process ([\w-]+):$")
_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_]\w*(?:\.\w+)*)(?::\s?(?P<message>.*))?$")
_IS_SERVER = re.compile(r"$|api_?server", re.IGNORECASE)
"""Names of the processes that serve HTTP; output without a name is theirs as well."""
_LINKS = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_NOT_OF_MESSAGE = re.compile(
    r"$|\S+\.py:\d+: \w*Warning|(?:INFO|WARNING|ERROR|CRITICAL)\b|\[|slimserve\.|Process |frame #|Exception "
)
_IGNORED = ("Exception ignored in", "Error in atexit", "--- Logging error ---")
_ELSEWHERE = re.compile(
    r"see (?:the )?(?:root cause|stack ?trace|traceback|error|logs?)\b|check the logs|Engine core initialization failed"
    r"|EngineCore encountered an issue|background process|died unexpectedly",
    re.IGNORECASE,
)
"""Messages of processes that only report the failure of another one."""
_CONSEQUENCES = {
    *("CancelledError", "KeyboardInterrupt", "SystemExit", "EngineDeadError", "BrokenPipeError", "EOFError"),
    *("ConnectionResetError", "ContextTerminated", "DistBackendError", "DistNetworkError"),
}
"""Exceptions of processes and threads that are ended, or lose a connection, because another one failed."""
_LOST_PEER = re.compile(r"Connection closed by peer|Broken pipe|Connection reset by peer|^cancelled$")
_LOOKUPS = {"KeyError", "IndexError", "AttributeError", "StopIteration", "LookupError"}
"""Exceptions that are raised and handled in normal operation; the one that follows explains them."""
_FAILED_PROCESSES = re.compile(r"Failed core proc\(s\): \{([^}]*)\}")
_NATIVE = re.compile(
    r"what\(\):\s+(?P<what>.+)|Fatal Python error: (?P<fatal>.+)|!+ (?P<segfault>Segfault encountered) !+"
)
_USAGE_ERROR = re.compile(r"\S+: error: (.+)")
_SERVER_ERROR = re.compile(r"(?:ERROR|CRITICAL):\s+(\S.*)")
_COMPILE_ERROR = re.compile(r"(?:fatal )?error: .+")
_PYDANTIC_HEAD = re.compile(r"^\d+ validation errors? for (\w+) (?:Value error, )?")
_PYDANTIC_DETAILS = re.compile(r"\s*\[type=.*$|^\s*For further information visit .*$", re.MULTILINE)
_MAX_CHARACTERS = 360
_SIGNALS = {
    signal.SIGKILL: "as the system does when memory runs out",
    signal.SIGILL: "because the CPU lacks an instruction that this build of vLLM uses",
}


@dataclass
class _Line:
    process: str
    record: str
    """Header of the log record, the same for all lines of one message; empty for other output."""
    level: str
    text: str


@dataclass
class _Failure:
    """An exception in the log."""

    process: str
    type: str
    message: str
    at: int
    """Number of its line."""
    root: _Failure | None = None
    """First exception of the chain that led to it; None if it is the first."""
    rest: str = ""
    """Output of the same process that follows the message."""

    @property
    def is_consequence(self) -> bool:
        return (
            self.type in _CONSEQUENCES
            or _ELSEWHERE.search(self.message) is not None
            or _LOST_PEER.search(self.message) is not None
        )

    def __str__(self) -> str:
        message = self.message
        if "compile error" in message.lower() and (error := _COMPILE_ERROR.search(self.rest)):
            message += f" ({error[0]})"
        return _shortened(f"{self.type}: {message}" if message else self.type)


def failure_reason(log: str, exit_status: int, name: str = "the server") -> str:
    """Return one sentence that says why an engine ended, from its log and the exit status of its server, or of `name`.

    This is the exception, native crash or signal of the process that failed first, with the exception that caused it
    if both tell something. Warnings, and exceptions that vLLM handled before, are not reasons.
    """
    lines = [_parse(line) for line in _ANSI.sub("", log).split("\n")]
    failures = sorted(_failures(lines), key=lambda failure: failure.at)
    causes = [failure for failure in failures if not failure.is_consequence]
    native = next(
        (_shortened(match["what"] or match["fatal"] or match["segfault"]) for match in _NATIVE.finditer(log)), ""
    )
    is_of_engine = any(failure.is_consequence and _ELSEWHERE.search(failure.message) for failure in failures)
    killed = _killed_process(log) or ((name, -exit_status) if exit_status < 0 else None)
    if killed:
        return native or _signal_text(*killed)
    if is_of_engine:
        of_engine = [failure for failure in causes if not _IS_SERVER.match(failure.process)]
        if of_engine or native:
            return _with_root(of_engine[-1]) if of_engine else native
    if causes:
        return _with_root(causes[-1])
    return native or _last_message(lines) or "no output"


def _parse(line: str) -> _Line:
    match = _LINE.fullmatch(line.rstrip("\r"))
    assert match is not None  # every part of the pattern may be empty
    return _Line(match["process"] or "", match["record"] or "", match["level"] or "", match["text"])


def _failures(lines: list[_Line]) -> Iterator[_Failure]:
    """Yield the exceptions of each process; the lines of several processes may be mixed."""
    for process in dict.fromkeys(line.process for line in lines):
        yield from _failures_of([(at, line) for at, line in enumerate(lines) if line.process == process], process)


def _failures_of(lines: list[tuple[int, _Line]], process: str) -> Iterator[_Failure]:
    before = ""  # the last line with text above the traceback
    root: _Failure | None = None
    owner = process
    number = 0
    while number < len(lines):
        at, line = lines[number]
        number += 1
        if not _TRACEBACK.search(line.text):
            if header := _PROCESS_HEADER.match(line.text):
                owner = header[1]
            before = line.text.strip() or before
            continue
        while number < len(lines) and (lines[number][1].text[:1] in {" ", "|"} or not lines[number][1].text.strip()):
            number += 1
        if number == len(lines) or not (match := _EXCEPTION.match(lines[number][1].text)):
            continue
        at, line = lines[number]
        end = number + 1
        message = [match["message"] or ""]
        while end < len(lines) and lines[end][1].record == line.record:
            text = lines[end][1].text
            if _NOT_OF_MESSAGE.match(text) or _TRACEBACK.search(text) or text in _LINKS:
                break
            message.append(text)
            end += 1
        if before not in _LINKS:
            root = None
            owner = owner if before.startswith("Process ") else process
        text = " ".join(_PYDANTIC_DETAILS.sub("", "\n".join(message)).split())
        text = _PYDANTIC_HEAD.sub(r"\1: ", text)
        rest = "\n".join(line.text for _, line in lines[end : end + 200])
        failure = _Failure(owner, match["type"].rpartition(".")[2], text, at, root, rest)
        if not before.startswith(_IGNORED):
            yield failure
        root, before, number = root or failure, "", end


def _with_root(failure: _Failure) -> str:
    root = failure.root
    if (
        root is None
        or root.is_consequence
        or root.type in _LOOKUPS
        or not root.message
        or root.message in failure.message
    ):
        return str(failure)
    return f"{failure}; caused by {root}"


def _killed_process(log: str) -> tuple[str, int] | None:
    """Return the name of a process that a signal ended and the signal's number, from the server's last message."""
    for processes in reversed(_FAILED_PROCESSES.findall(log)):
        for name, status in re.findall(r"'([^']+)': -(\d+)", processes):
            return f"the process {name}", int(status)
    return None


def _signal_text(name: str, number: int) -> str:
    known = signal.Signals(number) if number in set(signal.Signals) else None
    why = _SIGNALS.get(known) if known else None
    return f"{name} was ended by {known.name if known else f'signal {number}'}" + (f", {why}" if why else "")


def _last_message(lines: list[_Line]) -> str:
    """Return the last error message without a traceback, else the last line."""
    for line in reversed(lines):
        if match := _USAGE_ERROR.match(line.text) or _SERVER_ERROR.match(line.text):
            return _shortened(match[1])
        if line.level in {"ERROR", "CRITICAL"} and line.text.strip():
            return _shortened(line.text)
    return _shortened(next((line.text for line in reversed(lines) if line.text.strip()), ""))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 2].rstrip() + " …"
