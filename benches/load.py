"""Build SmolLM2-135M by every shipped recipe and check that stock vLLM computes what plain torch does.

    make bench-load

Each variant is built, or reused from the cache, and checked as by `slimserve check`: shapes, transformers, stock vLLM
and greedy text. Without a GPU, vLLM is not asked about formats that need one. Recipes whose format cannot have the
sizes of SmolLM2 are left out. `RECIPE_loads` is 1 if all checks passed, else 0; `RECIPE_build_s` is the build time in
seconds. The last line is one JSON object.
"""

from __future__ import annotations

from slimserve.compare.check import check_variant
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import list_recipes, load_recipe
from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.variant import read_manifest

MODEL = "smollm2-135m-instruct"


def main() -> None:
    model = resolve_model(MODEL)
    metrics: dict[str, list[float]] = {}
    for name in list_recipes():
        print_status(f"--- {name} ---")
        try:
            variant = build_variant(MODEL, model, *load_recipe(name), None)
        except UserError as error:
            print_status(f"refused: {error}")
            continue
        manifest = read_manifest(variant)
        passed = True
        for finding in check_variant(variant):
            passed &= finding.passed
            print_status(f"{'ok  ' if finding.passed else 'FAIL'} {finding.name:13} {finding.detail}")
        key = name.replace("-", "_")
        metrics[f"{key}_loads"] = [float(passed)]
        metrics[f"{key}_build_s"] = [manifest.build_s if manifest else 0.0]
    print(bench_line("load", metrics))


if __name__ == "__main__":
    main()
