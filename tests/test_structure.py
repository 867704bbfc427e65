"""The rules that keep the tree readable: data flows one way, and each foreign internal is touched in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "contracts": {"workloads", "distill", "compress", "serve", "loadtest", "compare"},
    "workloads": {"distill", "compress", "serve", "loadtest", "compare"},
    "distill": {"compress", "serve", "loadtest", "compare"},
    "compress": {"distill", "serve", "loadtest", "compare"},
    "serve": {"distill", "compress", "loadtest", "compare"},
    "loadtest": {"distill", "compress", "compare"},
}
ONLY_IN: dict[str, set[str]] = {
    "vllm": {
        "benches/peers/vllm_bench.py",
        "serve/engine/entry.py",
        "serve/engine/gemm.py",
        "serve/engine/offline.py",
        "serve/engine/partial_prefix.py",
        "serve/engine/plugin.py",
    },
    "compressed_tensors": set(),
}
"""Imported in these files only; compressed-tensors nowhere, as it takes 5 s and 250 MiB (compress/formats.py)."""


def imports_of(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_part_does_not_look_downstream(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not imports_of(file) & FORBIDDEN[package], file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_librarys_internals_are_touched_in_one_file(library: str) -> None:
    files = {
        str(file.relative_to(ROOT))
        for package in (*FORBIDDEN, "compare", "benches")
        for file in (ROOT / package).rglob("*.py")
        if library in imports_of(file)
    }
    assert files == ONLY_IN[library]
