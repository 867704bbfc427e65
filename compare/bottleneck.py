"""The bottleneck of a load: tokens/s compared with the rooflines that the server reports, and the energy it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from slimserve.compare.results import Bottleneck
from slimserve.core.openai_client import Target, auth_headers
from slimserve.loadtest.summary import LoadSummary

_TIMEOUT_S = 10.0
_POWERCAP = Path("/sys/class/powercap")
_METRICS = "slimserve_{}_roofline_tokens_per_second"


@dataclass(frozen=True)
class Rooflines:
    """Tokens/s that the hardware allows, as docs/metrics.md defines them; None if the server does not report them."""

    prefill: float | None = None
    decode: float | None = None
    """Roofline of one stream."""


def read_rooflines(target: Target) -> Rooflines:
    """Read the rooflines from the server's /metrics page; servers of other projects do not report them."""
    values: dict[str, float] = {}
    with contextlib.suppress(httpx.HTTPError, ValueError):
        response = httpx.get(f"{target.url}/metrics", headers=auth_headers(), timeout=_TIMEOUT_S)
        for family in text_string_to_metric_families(response.text if response.status_code == 200 else ""):
            values |= {sample.name: sample.value for sample in family.samples}
    # A gauge that was never set reads 0.
    return Rooflines(values.get(_METRICS.format("prefill")) or None, values.get(_METRICS.format("decode")) or None)


def find_bottleneck(summary: LoadSummary, num_streams: int, rooflines: Rooflines) -> Bottleneck:
    """Return the phase that limits this load, and the fraction of the roofline that it reaches.

    Only computed prompt tokens count. The cached fraction comes from the answers, or else from the server's counters.
    Decoding steps of `num_streams` streams share each read of the weights, so their roofline is one stream's times
    `num_streams`; it ignores attention over the context and is therefore optimistic. `roofline_frac` is the sum of the
    fractions of a second that both phases would take at their rooflines.
    """
    cached = summary.cached_frac
    if cached is None:
        cached = summary.server.prefix_cache_hit_frac
    prefill = None
    if summary.prompt_tokens_mean:
        prefill = summary.requests_per_s * summary.prompt_tokens_mean * (1 - (cached or 0.0))
    decode_roofline = rooflines.decode * num_streams if rooflines.decode else None
    prefill_frac = prefill / rooflines.prefill if prefill is not None and rooflines.prefill else None
    decode_frac = summary.output_tokens_per_s / decode_roofline if decode_roofline else None
    is_known = prefill_frac is not None and decode_frac is not None
    return Bottleneck(
        limited_by=("prefill" if (prefill_frac or 0) >= (decode_frac or 0) else "decode") if is_known else None,
        prefill_tokens_per_s=prefill,
        prefill_roofline_tokens_per_s=rooflines.prefill,
        decode_tokens_per_s=summary.output_tokens_per_s,
        decode_roofline_tokens_per_s=decode_roofline,
        roofline_frac=(prefill_frac or 0.0) + (decode_frac or 0.0) if is_known else None,
    )


class EnergyMeter:
    """Reads the energy of the machine's processors (RAPL), if the kernel lets this user read it."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._packages = sorted(powercap.glob("intel-rapl:[0-9]"))
        self.joules: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set `joules` to the energy used within the context; None if it cannot be read."""
        before = self._read("energy_uj")
        try:
            yield
        finally:
            after, wraps = self._read("energy_uj"), self._read("max_energy_range_uj")
            self.joules = None
            if before and after and wraps:
                # A counter below its first reading has wrapped around once.
                used = [
                    now - then + (wrap if now < then else 0)
                    for then, now, wrap in zip(before, after, wraps, strict=True)
                ]
                self.joules = sum(used) / 1e6

    def _read(self, name: str) -> list[int]:
        try:
            return [int((package / name).read_text(encoding="utf-8")) for package in self._packages]
        except (OSError, ValueError):
            return []
