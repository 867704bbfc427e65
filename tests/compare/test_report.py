import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compare.report import print_table, write_report
from compare.results import Comparison, VariantResult
from loadtest.rows import Row, write_row
from loadtest.summary import summarize
from workloads.interface import Estimate

RECIPES = ("dense", "w8a8", "prune25-w8a8")


def made_up_comparison(directory: Path) -> Comparison:
    """A comparison of the right shape with invented figures; only its layout is tested."""
    comparison = Comparison(
        model="a-model-with-a-rather-long-name-135m-instruct",
        workloads={"recommendation": "auc", "reasoning": "accuracy"},
        settings={"users": {"recommendation": 2, "reasoning": 8}, "duration_s": 20.0, "warmup_s": 4.0},
        started="2026-01-01T00:00:00+00:00",
    )
    draw = random.Random(1)
    for index, recipe in enumerate(RECIPES):
        name = f"model-{recipe}"
        variant = VariantResult(
            name, recipe, "what it does", "dir", 10**8 // (index + 1), 10**8, 1.5, index > 0, 40.0, 2**31
        )
        for workload in comparison.workloads:
            rows = [made_up_row(draw, workload, at) for at in range(24)]
            (directory / name).mkdir(exist_ok=True)
            with (directory / name / f"{workload}.rows.jsonl").open("w") as file:
                for row in rows:
                    write_row(file, row)
            variant.load[workload] = summarize(rows, 4.0, 24.0)
            headline = comparison.workloads[workload]
            variant.quality[workload] = {
                headline: Estimate(0.7 - index / 10, 0.6 - index / 10, 0.8 - index / 10, 100),
                "undefined": Estimate(float("nan"), float("nan"), float("nan"), 0),
            }
        comparison.variants.append(variant)
    return comparison


def made_up_row(draw: random.Random, workload: str, at: int) -> Row:
    if workload == "recommendation":
        return Row(at, at, at + draw.uniform(0.5, 1), num_items=16)
    arrivals = tuple((at + 0.1 + 0.03 * token + draw.uniform(0, 0.02), 1) for token in range(20))
    return Row(at, at, arrivals[-1][0], arrivals, output_tokens=20)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = write_report(made_up_comparison(tmp_path), tmp_path).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert "@import" not in page
    assert page.count("<svg") == 4
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids


def test_every_variant_has_a_column_and_every_figure_a_row(tmp_path: Path) -> None:
    page = write_report(made_up_comparison(tmp_path), tmp_path).read_text()
    for recipe in RECIPES:
        assert f'<th scope="col">{recipe}</th>' in page
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    labels = [label for label, _ in rows]
    assert "scored candidates per second" in labels
    assert "time between tokens, p50 / p90 / p99, ms" in labels
    assert all(cells.count("<td") == 3 for _, cells in rows)


def test_the_statements_are_ratios_to_the_first_variant(tmp_path: Path) -> None:
    comparison = made_up_comparison(tmp_path)
    page = write_report(comparison, tmp_path).read_text()
    before, after = (variant.load["recommendation"].items_per_s for variant in comparison.variants[:2])
    assert f"w8a8 against dense: 50% of the bytes on disk; {after / before:.2f}× the scored candidates" in page
    assert "recommendation auc 0.600 against 0.700 (the 95% intervals overlap)" in page


def test_html_in_a_name_is_text(tmp_path: Path) -> None:
    comparison = made_up_comparison(tmp_path)
    comparison.model = "<script>alert(1)</script>"
    assert "<script" not in write_report(comparison, tmp_path).read_text()


def test_the_terminal_table_names_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(made_up_comparison(tmp_path))
    printed = capsys.readouterr().out
    assert all(recipe in printed for recipe in RECIPES)


def test_results_are_json_with_origin(tmp_path: Path) -> None:
    document = json.loads(made_up_comparison(tmp_path).write(tmp_path).read_text())
    assert [variant["recipe"] for variant in document["variants"]] == list(RECIPES)
    assert document["hardware"]["cpu"]
    assert document["variants"][0]["quality"]["recommendation"]["auc"]["n"] == 100
    assert document["variants"][0]["quality"]["recommendation"]["undefined"]["value"] is None
    assert document["variants"][0]["load"]["reasoning"]["ttft_s"]["p50"] > 0


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium, which `make test` installs")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_width(tmp_path: Path, width: int) -> None:
    """The page in a frame of that width inside Chromium, which tells how wide its content is."""
    page = write_report(made_up_comparison(tmp_path), tmp_path).read_text()
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
