"""Every shipped recipe on SmolLM2-135M: does stock vLLM load the outcome and compute what plain torch does?

    make bench-load

Builds each variant (or reuses it from the cache), then looks at it as `slimserve check` does: shapes, transformers,
stock vLLM, greedy text. Figures: 1 per recipe where everything passed, else 0, and the seconds of each build.
Last line: one JSON object.
"""

from __future__ import annotations

from slimserve.compare.check import check_variant
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import list_recipes, load_recipe
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.variant import read_manifest

MODEL = "smollm2-135m-instruct"


def main() -> None:
    model = resolve_model(MODEL)
    figures: dict[str, list[float]] = {}
    for name in list_recipes():
        print_status(f"--- {name} ---")
        variant = build_variant(MODEL, model, *load_recipe(name), None)
        manifest = read_manifest(variant)
        passed = True
        for finding in check_variant(variant):
            passed &= finding.passed
            print_status(f"{'ok  ' if finding.passed else 'FAIL'} {finding.what:13} {finding.detail}")
        key = name.replace("-", "_")
        figures[f"{key}_loads"] = [float(passed)]
        figures[f"{key}_build_s"] = [manifest.build_s if manifest else 0.0]
    print(bench_line("load", figures))


if __name__ == "__main__":
    main()
