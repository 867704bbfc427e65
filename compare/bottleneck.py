"""What a load asks of the hardware: tokens a second against the roofs that the server names, and the energy it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from slimserve.compare.results import Regime
from slimserve.core.openai_client import Target, auth_headers
from slimserve.loadtest.summary import LoadSummary

_TIMEOUT_S = 10.0
_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Roofs:
    """Tokens a second that the hardware allows, as docs/metrics.md defines them; None where the server does not say."""

    prefill: float | None = None
    decode: float | None = None
    """Of one stream."""


def read_roofs(target: Target) -> Roofs:
    """The roofs on the server's /metrics page; unknown for servers other than ours."""
    found: dict[str, float] = {}
    with contextlib.suppress(httpx.HTTPError, ValueError):
        response = httpx.get(f"{target.url}/metrics", headers=auth_headers(), timeout=_TIMEOUT_S)
        for family in text_string_to_metric_families(response.text if response.status_code == 200 else ""):
            for sample in family.samples:
                if sample.name.endswith("_roof_tokens_per_second"):
                    found[sample.name] = sample.value
    # A gauge that nobody has set yet reads 0.
    return Roofs(
        found.get("slimserve_prefill_roof_tokens_per_second") or None,
        found.get("slimserve_decode_roof_tokens_per_second") or None,
    )


def regime_of(summary: LoadSummary, num_streams: int, roofs: Roofs) -> Regime:
    """Which of prompts and single tokens binds this load, and how near the roof it comes.

    Prompt tokens are those that were computed: the share that came from a cache is the answers' own account of it,
    else the server's counters. Decoding steps of `num_streams` share the reading of the weights, so their roof is one
    stream's times the streams; context is not counted, so it is kind. `achieved_frac` adds up the shares of a second
    that either would have taken at its roof.
    """
    cached = summary.cached_frac
    if cached is None:
        cached = summary.server.prefix_cache_hit_frac
    prefill = None
    if summary.prompt_tokens_mean:
        prefill = summary.requests_per_s * summary.prompt_tokens_mean * (1 - (cached or 0.0))
    decode_roof = roofs.decode * num_streams if roofs.decode else None
    prefill_share = prefill / roofs.prefill if prefill is not None and roofs.prefill else None
    decode_share = summary.output_tokens_per_s / decode_roof if decode_roof else None
    is_known = prefill_share is not None and decode_share is not None
    return Regime(
        bound=("prefill" if (prefill_share or 0) >= (decode_share or 0) else "decode") if is_known else None,
        prefill_tokens_per_s=prefill,
        prefill_roof_tokens_per_s=roofs.prefill,
        decode_tokens_per_s=summary.output_tokens_per_s,
        decode_roof_tokens_per_s=decode_roof,
        achieved_frac=(prefill_share or 0.0) + (decode_share or 0.0) if is_known else None,
    )


class EnergyMeter:
    """Joules of the machine's processors (RAPL), where the kernel lets this user read them."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._packages = sorted(powercap.glob("intel-rapl:[0-9]"))
        self.joules: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set `joules` to what was counted meanwhile; None where nothing counts."""
        before = self._read("energy_uj")
        try:
            yield
        finally:
            after, wraps = self._read("energy_uj"), self._read("max_energy_range_uj")
            self.joules = None
            if before and after and wraps:
                # A counter that is below where it began went over its end, once.
                counted = [
                    now - then + (wrap if now < then else 0)
                    for then, now, wrap in zip(before, after, wraps, strict=True)
                ]
                self.joules = sum(counted) / 1e6

    def _read(self, name: str) -> list[int]:
        try:
            return [int((package / name).read_text(encoding="utf-8")) for package in self._packages]
        except (OSError, ValueError):
            return []
