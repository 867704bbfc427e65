"""Tests of the rules for imports: data flows one way, and few files know a library's internals."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "workloads", "distill", "compress", "serve", "loadtest", "compare", "report")
"""Folders in the direction of the data; a room imports only rooms before it."""
INDEPENDENT = {"compress": {"distill"}, "serve": {"distill", "compress"}, "loadtest": {"distill", "compress"}}
"""Earlier rooms that a room does not import either."""
SERVE_ROOMS = {
    "policy": set(),
    "engine": {"policy"},
    "launch": {"policy"},
    "gateway": {"policy", "launch"},
}
"""Parts of serve/ that each part may import; serve/app.py is above all of them."""
ONLY_IN: dict[str, set[str]] = {
    "vllm": {
        "benches/peers/vllm_bench.py",
        "serve/engine/classifier.py",
        "serve/engine/entry.py",
        "serve/engine/gemm.py",
        "serve/engine/label_logits.py",
        "serve/engine/logprobs.py",
        "serve/engine/offline.py",
        "serve/engine/partial_prefix.py",
        "serve/engine/plugin.py",
    },
    "compressed_tensors": set(),
}
"""Files that import a library: vLLM's internals in few files; compressed-tensors in none, as it takes 5 s to import."""
REGISTRIES = (
    "workloads/",
    "loadtest/suites/",
    "compress/formats/",
    "compress/settings.py",
    "compare/settings.py",
    "core/messages.py",
)
"""Files that define workloads, suites and formats; the two settings files name the recipe `w8a8`, not the format, and
`reasoning` is also a field of chat messages."""


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def product() -> Iterator[Path]:
    """Yield the Python files of the package, each under its real folder."""
    yield from sources(*ROOMS)
    yield from sorted(file for file in (ROOT / "slimserve").rglob("*.py") if not (ROOT / file.parts[-2]).is_symlink())


def name_of(file: Path) -> str:
    """Return the import name of a file of the package."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "slimserve":
        parts.insert(0, "slimserve")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute names that the import statements of a tree import, including submodules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_level(tree: ast.Module) -> ast.Module:
    """Return the tree without functions: the code that runs on import or that a type checker reads."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    return Strip().visit(tree)  # type: ignore[no-any-return]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - INDEPENDENT.get(room, set())
    for file in sources(room):
        used = {name.split(".")[1] for name in imports_of(parse(file)) if name.startswith("slimserve.")}
        assert used <= allowed, file


@pytest.mark.parametrize("part", SERVE_ROOMS)
def test_a_part_of_serve_imports_only_parts_below_it(part: str) -> None:
    for file in sources(f"serve/{part}"):
        names = [name.split(".") for name in imports_of(parse(file)) if name.startswith("slimserve.serve.")]
        assert {parts[2] for parts in names} <= SERVE_ROOMS[part] | {part}, file


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {name_of(file): file for file in product()}
    graph = {
        name: {other for other in imports_of(module_level(parse(file))) if other in files and other != name}
        for name, file in files.items()
    }
    while free := {name for name, others in graph.items() if not others}:
        graph = {name: others - free for name, others in graph.items() if name not in free}
    assert not graph, f"these modules import each other: {sorted(graph)}"


def test_nothing_is_imported_by_a_generic_top_level_name() -> None:
    generic = {*ROOMS, "contracts", "pipeline"}
    for file in [*product(), *sources("benches", "tests")]:
        assert not {name.split(".")[0] for name in imports_of(parse(file))} & generic, file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_librarys_internals_are_imported_in_few_files(library: str) -> None:
    files = {
        str(file.relative_to(ROOT))
        for file in [*product(), *sources("benches")]
        if library in {name.split(".")[0] for name in imports_of(parse(file))}
    }
    assert files == ONLY_IN[library]


def test_only_the_registries_name_workloads_and_formats() -> None:
    from slimserve.compress.formats import format_names
    from slimserve.workloads import load_suite_names

    names = {*load_suite_names(), *format_names()} - {"chat"}  # `chat` is also a rerank template
    listed = re.compile(rf"(?:^|[,=| ])(?:{'|'.join(map(re.escape, names))})(?:$|[,:=| ])")
    for file in product():
        if str(file.relative_to(ROOT)).startswith(REGISTRIES):
            continue
        tree = parse(file)
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                text = node.value
                assert text not in names, f"{file}:{node.lineno} {text!r}"
                assert " " in text or not listed.search(text), f"{file}:{node.lineno} {text!r}"


def test_text_is_split_into_lines_at_line_feeds_only() -> None:
    for file in product():
        for node in ast.walk(parse(file)):
            is_call = isinstance(node, ast.Attribute) and node.attr == "splitlines"
            assert not is_call, f"{file}:{node.lineno}: str.splitlines also splits at U+2028; use core.text.split_lines"  # type: ignore[attr-defined]
