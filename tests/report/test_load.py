import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.openai_client import Target
from slimserve.core.provenance import provenance
from slimserve.loadtest.rows import Row
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.summary import LoadSummary, ServerCounts, summarize
from slimserve.report.load import print_curve, print_summary, write_curve_html, write_html
from slimserve.report.plots import plot_distribution
from slimserve.workloads.interface import Estimate

TARGET = Target("http://127.0.0.1:8000", "a-model")
SETTINGS = LoadSettings(rate="5", duration_s=20.0, warmup_s=4.0, slos=("e2e_p99=900ms",), price_per_hour=1.5)


def invented_rows(kinds: Sequence[str] = ("reasoning",), num_rows: int = 130) -> list[Row]:
    draw = random.Random(3)
    rows = []
    for number in range(num_rows):
        at = 0.2 * number
        kind = kinds[number % len(kinds)]
        if kind == "recommendation":
            rows.append(Row(at, at, at + draw.uniform(0.3, 0.5), num_items=16, kind=kind, prompt=number))
            continue
        arrivals = tuple((at + 0.1 + 0.02 * token + draw.uniform(0, 0.01), 1) for token in range(30))
        rows.append(Row(at, at, arrivals[-1][0], arrivals, 200, 30, kind=kind, prompt=number, finish_reason="stop"))
    return rows


def summary_of(rows: Sequence[Row], **values: Any) -> LoadSummary:
    objectives = [parse_objective(text) for text in SETTINGS.slos]
    window = [row for row in rows if 4 <= row.scheduled_s < 24]
    return replace(
        summarize(rows, 4.0, 24.0),
        objectives=[objective.evaluate(window) for objective in objectives],
        goodput_per_s=goodput(window, objectives, 20.0),
        **values,
    )


def document_of(suite: str, summary: LoadSummary, **more: Any) -> dict[str, Any]:
    """Return the content of SUITE.json."""
    request = {
        "command": "loadtest",
        "suite": suite,
        "target": asdict(TARGET),
        "settings": SETTINGS.model_dump(mode="json"),
    }
    read: dict[str, Any] = json.loads(json.dumps({**request, **provenance(), "summary": summary.as_dict(), **more}))
    return read


def text_of(page: str) -> str:
    """Return the visible text of a page, without its plots."""
    body = re.sub(r"<(svg|style|title).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", body).split()))


def test_values_of_the_summary_appear_in_page_and_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = invented_rows()
    server = ServerCounts(requests=130, prefix_cache_hit_frac=0.31, ttft_p50_bracket_s=(0.1, 0.25), num_waiting_peak=3)
    quality = {"accuracy": Estimate(0.213, 0.155, 0.271, 100)}
    summary = summary_of(rows, server=server, quality=quality, costs={"per_correct_answer": 0.0123}, num_correct=21)
    page = text_of(write_html(document_of("reasoning", summary), rows, tmp_path).read_text())
    print_summary("reasoning", TARGET, summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert summary.ttft_s.p50 is not None
    assert summary.e2e_s.p99 is not None
    low, high = summary.e2e_s.intervals["p50"]
    for expected in (
        f"{summary.ttft_s.p50 * 1000:.0f}",
        f"{summary.e2e_s.p99 * 1000:.0f}",
        f"{low * 1000:.0f}–{high * 1000:.0f}",
        "100 × stop",
        "0.213 [0.155, 0.271] (n 100)",
        "0.012",
        "31% in its metrics",
        "server: 100 to 250 ms",
        f"met: {summary.e2e_s.p99 * 1000:.0f} ms, at most 900 ms",
    ):
        assert expected in page
        assert expected in printed or len(expected) > 12  # long texts are broken over lines


def test_the_first_sentence_says_whether_objectives_were_met(tmp_path: Path) -> None:
    rows = invented_rows()
    page = text_of(write_html(document_of("reasoning", summary_of(rows)), rows, tmp_path).read_text())
    assert "a-model met the objective under 5 requests/s (Poisson arrivals)." in page
    late = [replace(row, end_s=row.end_s + 1) for row in rows]
    page = text_of(write_html(document_of("reasoning", summary_of(late)), late, tmp_path).read_text())
    assert "a-model missed 1 of 1 objectives under 5 requests/s" in page
    assert re.search(r"e2e_p99=900ms: MISSED: 1,\d{3} ms, more than 900 ms", page)


def test_an_invalid_run_says_so_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = invented_rows()
    summary = summary_of(rows, invalid=["requests were sent up to 81 ms late"])
    page = write_html(document_of("reasoning", summary), rows, tmp_path).read_text()
    first = re.search(r'<div class="verdict bad">\s*<p>(.*?)</p>', page)
    assert first
    assert html.unescape(first[1]).startswith(
        "INVALID: these results do not describe the server. requests were sent up to 81 ms"
    )
    print_summary("reasoning", TARGET, summary)
    assert capsys.readouterr().out.startswith("INVALID: requests were sent up to 81 ms late")


def test_warnings_and_the_clients_own_error_are_shown(tmp_path: Path) -> None:
    rows = invented_rows()
    summary = summary_of(rows, warnings=["not steady: it rose"])
    document = document_of("reasoning", summary, calibration={"ttft_p50_error_ms": 0.21364})
    page = text_of(write_html(document, rows, tmp_path).read_text())
    assert "Warning: not steady: it rose" in page
    assert "ttft p50 error ms 0.2136" in page


def test_a_mixed_run_shows_both_kinds(tmp_path: Path) -> None:
    rows = invented_rows(("recommendation", "reasoning"))
    page = write_html(document_of("mixed", summary_of(rows)), rows, tmp_path).read_text()
    assert "Recommendation only" in page
    assert "Reasoning only" in page
    assert "Distribution of latency, recommendation" in page
    assert "scored items/s" in page
    assert page.count("<svg") == 5  # a distribution of each, requests, flow, output


@pytest.mark.parametrize("rows", [[], [Row(5.0, 5.0, 6.0, error="timeout")]])
def test_a_run_without_a_good_answer_renders(tmp_path: Path, rows: list[Row]) -> None:
    summary = summary_of(rows)
    page = text_of(write_html(document_of("reasoning", summary), rows, tmp_path).read_text())
    assert "MISSED: requests failed, or there is no sample" in page
    assert ("1 × timeout" in page) == bool(rows)
    print_summary("reasoning", TARGET, summary)


def test_the_page_loads_no_other_file(tmp_path: Path) -> None:
    rows = invented_rows()
    page = write_html(document_of("reasoning", summary_of(rows)), rows, tmp_path).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert "@import" not in page
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert all(reference in ids for reference in re.findall(r'href="#([^"]+)"', page))


def test_html_in_a_name_is_escaped(tmp_path: Path) -> None:
    rows = [replace(row, kind=f"<script>{row.prompt % 2}") for row in invented_rows()]
    document = document_of("reasoning", summary_of(rows, warnings=["<script>alert(2)</script>"]))
    document["target"]["model"] = "<script>alert(1)</script>"
    page = write_html(document, rows, tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_curve_marks_the_highest_rate_and_shows_each_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(invented_rows())
    points = [(2.5, summary, True), (5.0, summary, False), (1.25, summary, True), (5.0, summary, True)]
    search = {"rate": 3.5, "is_found": True, "ended": "met at 3.45/s, missed at 3.55/s"}
    page = write_curve_html(document_of("reasoning", summary, max_rate=search), points, tmp_path, 3.5).read_text()
    assert "a-model meets e2e_p99=900ms up to 3.50 requests/s (met at 3.45/s, missed at 3.55/s)." in page
    assert "maximum rate: 3.5/s" in page  # the label of a plot, which matplotlib leaves as a comment
    assert re.findall(r'scope="row"><b>([\d.]+)', page) == ["1.25", "2.50", "5.00", "5.00"]
    print_curve(points)
    printed = capsys.readouterr().out
    assert printed.index("1.25") < printed.index("2.50") < printed.index("MISSED")


def test_a_sweep_says_at_which_rates_objectives_were_met(tmp_path: Path) -> None:
    summary = summary_of(invented_rows())
    points = [(1.0, summary, True), (2.0, summary, False)]
    page = write_curve_html(document_of("reasoning", summary), points, tmp_path).read_text()
    assert "a-model meets e2e_p99=900ms at 1.00 requests/s; 2 rates were tested." in page


def test_plots_use_the_colours_of_the_page_and_draw_names_literally() -> None:
    svg = plot_distribution([("$a$ <b>", [0.1, 0.2]), ("empty", [])], "latency (ms)")
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "var(--blue" in svg
    assert "<b>" not in svg
    assert plot_distribution([("a", [0.1])], "ms") == plot_distribution([("a", [0.1])], "ms")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium, which `make test` installs")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_width_of_the_browser(tmp_path: Path, width: int) -> None:
    """Chromium renders the page in a frame of that width and reports the width of its content."""
    rows = invented_rows(("recommendation", "reasoning"))
    server = ServerCounts(requests=130, output_tokens=12_345, ttft_p50_bracket_s=(0.1, 0.25))
    page = write_html(document_of("mixed", summary_of(rows, server=server)), rows, tmp_path).read_text()
    wrapper = tmp_path / "wrapper.html"
    framed = json.dumps(page).replace("</", "<\\/")
    wrapper.write_text(
        f"""<!doctype html><iframe id="frame" width="{width}" height="900" style="border:0"></iframe><script>
        const frame = document.getElementById("frame");
        frame.onload = () => {{ document.title = `content ${{frame.contentDocument.documentElement.scrollWidth}}`; }};
        frame.srcdoc = {framed};
        </script>"""
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        ["chromium", *flags, profile, "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>content (\d+)</title>", done.stdout)
    assert title, done.stderr
    assert int(title[1]) <= width
