import html
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slimserve.compare.results import (
    BaselineOutcome,
    Bottleneck,
    Comparison,
    Difference,
    LoadRun,
    Loss,
    Preset,
    QualityOutcome,
    Requirements,
    Round,
    Signal,
    VariantResult,
    load_comparison,
    spread,
)
from slimserve.compare.verdict import make_verdict
from slimserve.loadtest.rows import Row, encode_row
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.summary import summarize
from slimserve.report.comparison import print_table, write_report
from slimserve.report.comparison_tables import Tables
from slimserve.workloads.interface import Estimate

WORKLOADS = {"recommendation": "auc", "reasoning": "accuracy"}
SLOS = {"recommendation": ("e2e_p99=1500ms",), "reasoning": ("ttft_p99=500ms",)}
WARMUP_S, DURATION_S = 4.0, 20.0


def invented_comparison(
    directory: Path, recipes: dict[str, tuple[float, float]], workloads: tuple[str, ...] = tuple(WORKLOADS)
) -> Comparison:
    """A comparison of the right shape with invented values: per recipe its speed over dense's and quality kept."""
    draw = random.Random(1)
    primary_metrics = {name: WORKLOADS[name] for name in workloads}
    rates = dict.fromkeys(workloads, 2.0)
    comparison = Comparison(
        model="a-model-with-a-rather-long-name-135m-instruct",
        workloads=primary_metrics,
        preset=Preset(
            {"recommendation": 128, "reasoning": 128}, {"recommendation": 4, "reasoning": 8}, DURATION_S, WARMUP_S
        ),
        requirements=Requirements(slos={name: SLOS[name] for name in workloads}),
        started="2026-01-01T00:00:00+00:00",
        reference="dense",
        signals={name: Signal(metric, 0.0, is_informative=True) for name, metric in primary_metrics.items()},
        slo_rates=rates,
        elapsed_s=1234.0,
    )
    quality: dict[str, dict[str, QualityOutcome]] = {}
    for recipe, (speed, kept) in recipes.items():
        variant = VariantResult(
            recipe,
            recipe,
            "what it does",
            f"/models/{recipe}",
            None,
            "hash",
            int(2.7e8 / speed),
            134_000_000,
            61.2,
            True,
        )
        quality[recipe] = {}
        for number in (1, 2):
            one = Round(number, 40.0 + draw.uniform(0, 3), int(2.1e9 / speed**0.5))
            for workload in workloads:
                file = Path(recipe) / f"{workload}-{number}"
                one.capacity[workload] = invented_load(draw, workload, None, speed, directory, file)
                one.at_rate[workload] = [
                    invented_load(draw, workload, rate, speed, directory, Path(f"{file}-{rate}")) for rate in (2.0, 3.2)
                ]
            variant.rounds.append(one)
        for workload, primary_metric in primary_metrics.items():
            value = {"auc": 0.731, "accuracy": 0.21}[primary_metric] * kept
            variant.quality[workload] = {
                primary_metric: Estimate(value, value - 0.03, value + 0.03, 2048),
                "undefined": Estimate(float("nan"), float("nan"), float("nan"), 0),
            }
            whole = value / kept
            if recipe != "dense":
                variant.differences[workload] = {
                    primary_metric: Difference(
                        value - whole, value - whole - 0.004, value - whole + 0.004, 0.04, 128, "bootstrap"
                    )
                }
            quality[recipe][workload] = QualityOutcome(
                primary_metric, kept, min(1.0, max(0.0, (kept - 0.94) / 0.05)), 128, 900
            )
            summary = one.capacity[workload].summary
            variant.bottlenecks[workload] = Bottleneck(
                "prefill", 1200.0 * speed, 1700.0, summary.output_tokens_per_s, 900.0, 0.7
            )
            key = "per_million_items" if workload == "recommendation" else "per_thousand_answers"
            cost = spread(52_000 / speed * draw.uniform(0.97, 1.03) for _ in range(2))
            assert cost is not None
            variant.costs[workload] = {key: cost}
        if "recommendation" in workloads and recipe != "dense":
            variant.rank_agreement["recommendation"] = {
                "kendall_tau": Estimate(0.9 * kept, 0.85 * kept, 0.95 * kept, 80)
            }
        comparison.variants.append(variant)
    comparison.verdict = make_verdict(comparison, quality)
    return comparison


def invented_load(
    draw: random.Random, workload: str, rate: float | None, speed: float, directory: Path, file: Path
) -> LoadRun:
    crowd = 1 if rate is None else rate / 3
    rows = [invented_row(draw, workload, 0.3 * at, crowd / speed) for at in range(80)]
    objectives = [parse_objective(text) for text in SLOS[workload]]
    window = [row for row in rows if WARMUP_S <= row.scheduled_s < WARMUP_S + DURATION_S]
    summary = replace(
        summarize(rows, WARMUP_S, WARMUP_S + DURATION_S),
        output_tokens_per_s=130.0 * speed if workload == "reasoning" else 0.0,
        items_per_s=17.0 * speed * draw.uniform(0.97, 1.03) if workload == "recommendation" else 0.0,
        objectives=[objective.evaluate(window) for objective in objectives],
        goodput_per_s=goodput(window, objectives, DURATION_S),
    )
    path = directory / f"{file}.rows.jsonl"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"".join(map(encode_row, rows)))
    return LoadRun(rate, None if rate else 4, summary, f"{file}.rows.jsonl")


def invented_row(draw: random.Random, workload: str, at: float, slowness: float) -> Row:
    if workload == "recommendation":
        return Row(at, at, at + slowness * draw.lognormvariate(0, 0.3), num_items=16, prompt_tokens=900)
    step = 0.03 * slowness
    arrivals = tuple((at + 0.3 * slowness + step * token + draw.uniform(0, step / 2), 1) for token in range(40))
    return Row(at, at, arrivals[-1][0], arrivals, output_tokens=40, prompt_tokens=220)


RECIPES = {"dense": (1.0, 1.0), "w8a8": (1.7, 0.99), "w4a16": (0.8, 0.98), "prune25-w8a8": (2.0, 0.9)}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return invented_comparison(tmp_path, RECIPES)


def text_of(page: str) -> str:
    """Return the visible text of a page, without its plots."""
    body = re.sub(r"<(svg|style).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", body).split()))


def test_the_verdict_comes_first_and_says_who_by_how_much_and_how_sure(comparison: Comparison, tmp_path: Path) -> None:
    page = write_report(comparison, tmp_path).read_text()
    assert comparison.verdict is not None
    assert comparison.verdict.winner == "w8a8"
    assert page.index("<h1>Ship w8a8</h1>") < page.index("<table")
    first_screen = text_of(page[: page.index("<table")])
    assert "of dense's" in first_screen
    assert "0.99" not in first_screen  # shares are written as percent
    assert "99.0%" in first_screen
    assert f"{comparison.verdict.confidence:.0%}" in first_screen
    assert comparison.verdict.confidence_words in first_screen
    for sentence in comparison.verdict.sentences:
        assert sentence.replace("'", "&#39;") in page


def test_winner_and_dominated_variants_are_named_in_words(comparison: Comparison, tmp_path: Path) -> None:
    tables = Tables(comparison)
    status = {variant.name: tables.status(variant) for variant in comparison.variants}
    assert status["w8a8"] == "SHIP THIS"
    assert "dominated by" in status["w4a16"]
    assert "loses too much quality" in status["prune25-w8a8"]
    page = write_report(comparison, tmp_path).read_text()
    assert re.search(r'<tr class="winner"><th scope="row"><b>w8a8</b><span class="range">SHIP THIS', page)
    assert re.search(r'<tr class="dominated"><th scope="row"><b>w4a16</b><span class="range">[^<]*dominated by', page)


def test_every_variant_has_a_row_with_a_cell_for_every_heading(comparison: Comparison, tmp_path: Path) -> None:
    page = write_report(comparison, tmp_path).read_text()
    tables = re.findall(r'<table class="cards wide">(.*?)</table>', page, flags=re.DOTALL)
    # Overview; two workloads, their signals, their quality and their bottlenecks; the rank agreement.
    assert len(tables) == 10
    for table in tables:
        num_headings = table.count('scope="col"')
        rows = re.findall(r'<tr class="[a-z]*">(.*?)</tr>', table, flags=re.DOTALL)
        assert len(rows) in (len(RECIPES), len(RECIPES) - 1) or ("chance" in rows[0] and len(rows) == 2)
        assert all(row.count("<td") == num_headings - 1 for row in rows)


def test_values_are_medians_over_rounds_with_their_range(comparison: Comparison, tmp_path: Path) -> None:
    rows = Tables(comparison).workload("recommendation").rows
    found = spread(load.items_per_s for load in comparison.variant("w8a8").capacity("recommendation"))
    assert found is not None
    assert rows[1].cells[2] == (f"{found.median:.1f}", f"{found.min:.1f}–{found.max:.1f}")
    assert rows[1].cells[0] == ("0.724", "0.694–0.754")
    assert rows[1].cells[1] == ("−0.007", "−0.011\u00a0to\u00a0−0.003, p\u00a0=\u00a00.04")


def test_one_workload_alone_and_endpoints_without_sizes_are_shown(tmp_path: Path) -> None:
    comparison = invented_comparison(tmp_path, RECIPES, ("reasoning",))
    endpoint = replace(
        comparison.variants[1], name="theirs", recipe="", directory=None, url="https://example.org", disk_bytes=None
    )
    endpoint = replace(
        endpoint,
        build_s=None,
        num_parameters=None,
        rounds=[replace(endpoint.rounds[0], ready_s=None, peak_rss_bytes=None)],
    )
    comparison.variants.append(endpoint)
    page = write_report(comparison, tmp_path).read_text()
    assert "https://example.org, an external server" in page
    assert "Recommendation" not in page
    assert "<h3>Reasoning</h3>" in page
    row = Tables(comparison).overview().rows[-1]
    assert (row.name, row.status) == ("theirs", "not evaluated")
    assert [cell[0] for cell in row.cells[-3:]] == ["–", "–", "–"]


def test_a_comparison_without_a_verdict_or_rows_renders(tmp_path: Path) -> None:
    comparison = invented_comparison(tmp_path, RECIPES)
    comparison.verdict = None
    for file in tmp_path.rglob("*.rows.jsonl"):
        file.unlink()
    comparison.variants[-1].rounds.clear()
    assert "<h1>Not complete" in write_report(comparison, tmp_path).read_text()


def test_no_winner_says_so_in_the_heading(tmp_path: Path) -> None:
    comparison = invented_comparison(tmp_path, {"dense": (0.2, 1.0), "w8a8": (0.3, 0.99)})
    page = write_report(comparison, tmp_path).read_text()
    assert "<h1>Ship none of these variants</h1>" in page
    assert "MISSED" in page


def test_invalid_loads_are_named_before_the_results(comparison: Comparison, tmp_path: Path) -> None:
    run = comparison.variants[0].rounds[0].capacity["reasoning"]
    summary = replace(run.summary, invalid=["the client was late"])
    comparison.variants[0].rounds[0].capacity["reasoning"] = replace(run, summary=summary)
    page = write_report(comparison, tmp_path).read_text()
    status = page.index("INVALID load test (dense, reasoning in closed loop, round 1): the client was late.")
    assert status < page.index("<table")


def test_a_loss_since_the_baseline_is_on_top(comparison: Comparison, tmp_path: Path) -> None:
    loss = Loss("w8a8", "reasoning", "accuracy", "quality", 0.12, 0.05, 0.2, 0.03, fails=True)
    comparison.baseline = BaselineOutcome("results/before", [loss], ["the machine may have changed its speed"])
    page = write_report(comparison, tmp_path).read_text()
    assert page.index("Worse than the baseline") < page.index("<h2>Results</h2>")
    assert "LOSS ABOVE THE LIMIT" in page
    assert "the machine may have changed its speed" in page


def test_the_page_needs_nothing_but_itself(comparison: Comparison, tmp_path: Path) -> None:
    page = write_report(comparison, tmp_path).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert "@import" not in page
    assert "<script" not in page
    assert page.count("<svg") == 10  # each workload: two trade-offs, recovery, over rate, distribution
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_html_in_a_name_is_text(comparison: Comparison, tmp_path: Path) -> None:
    comparison.model = "<script>alert(1)</script>"
    comparison.variants[0].summary = "<script>alert(2)</script>"
    comparison.variants[2].name = "<script>$x$"
    page = write_report(comparison, tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_terminal_names_every_variant_and_ends_with_the_verdict(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(comparison)
    printed = capsys.readouterr().out
    assert all(recipe[:5] in printed for recipe in RECIPES)
    assert "Ship w8a8" in printed


def test_results_are_json_with_origin(comparison: Comparison, tmp_path: Path) -> None:
    document = json.loads(comparison.write(tmp_path).read_text())
    assert [variant["recipe"] for variant in document["variants"]] == list(RECIPES)
    assert document["hardware"]["cpu"]
    assert document["variants"][0]["quality"]["recommendation"]["undefined"]["value"] is None
    again = load_comparison(tmp_path)
    assert Tables(again).overview() == Tables(comparison).overview()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium, which `make test` installs")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_width(comparison: Comparison, tmp_path: Path, width: int) -> None:
    """The page in a frame of that width inside Chromium, which tells how wide its content is."""
    page = write_report(comparison, tmp_path).read_text()
    wrapper = tmp_path / "wrapper.html"
    framed = json.dumps(page).replace("</", "<\\/")
    wrapper.write_text(
        f"""<!doctype html><iframe id="frame" width="{width}" height="900" style="border:0"></iframe><script>
        const frame = document.getElementById("frame");
        frame.onload = () => {{
          const inner = frame.contentDocument;
          const right = [...inner.querySelectorAll("body *")].map(element => element.getBoundingClientRect())
              .filter(box => box.width > 0 && box.right > 0).map(box => box.right);
          document.title = `content ${{inner.documentElement.scrollWidth}} rightmost ${{Math.max(...right)}}`;
        }};
        frame.srcdoc = {framed};
        </script>"""
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    done = subprocess.run(
        [
            "chromium",
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>content (\d+) rightmost ([\d.]+)</title>", done.stdout)
    assert found, done.stderr
    assert int(found.group(1)) <= width
    assert float(found.group(2)) <= width
