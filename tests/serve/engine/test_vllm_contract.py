"""Tests of what we use of vLLM's internals, by its sources; the module under test is a command as well."""

import importlib.util
from pathlib import Path

import pytest

from tests.serve.engine.vllm_contract import Sources, problems

OLD = """
from .other import moved as renamed
class Base:
    size: int
    def __init__(self, one, *, two=None): self.kept = one
class Child(Base):
    def method(self, one, two=2, *, three): pass
class Fields:
    alpha: int
    beta: str = ""
def plain(one, *rest): pass
"""


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    package = tmp_path / "vllm" / "part"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text('LAZY = {"LLM": ".part:Child"}')
    (package / "__init__.py").write_text(OLD)
    (package / "other.py").write_text("def moved(): pass")
    return Sources(tmp_path)


def test_the_installed_vllm_has_everything_that_we_use() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert problems(Path(spec.origin).parents[1]) == []


@pytest.mark.parametrize(
    ("path", "num_positional", "keywords", "refusal"),
    [
        ("vllm.part.Child.method", 1, ["three"], None),
        ("vllm.part.Child.method", 3, ["three"], "takes 2 positional arguments, not 3"),
        ("vllm.part.Child.method", 1, ["three", "four"], "takes no argument four"),
        ("vllm.part.Child.method", 1, [], "needs the argument three"),
        ("vllm.part.Child", 1, ["two"], None),
        ("vllm.LLM", 0, [], "needs the argument one"),
        ("vllm.part.Fields", 0, ["alpha", "gamma"], "has no field gamma"),
        ("vllm.part.plain", 9, [], None),
        ("vllm.part.renamed", 0, ["one"], "takes no argument one"),
    ],
)
def test_a_call_is_bound_as_python_would_bind_it(
    sources: Sources, path: str, num_positional: int, keywords: list[str], refusal: str | None
) -> None:
    found = sources.find(path)
    assert found is not None
    assert sources.refusal(found, num_positional, keywords) == refusal


def test_members_are_found_in_bases_and_in_constructors(sources: Sources) -> None:
    child = sources.find("vllm.part.Child")
    assert child is not None
    assert all(sources.member(child, name) for name in ("kept", "size", "method"))
    assert sources.member(child, "absent") is None
    assert sources.find("vllm.part.absent") is None


def test_another_version_is_reported_with_the_file_that_must_follow(sources: Sources) -> None:
    (sources.root / "vllm" / "envs.py").write_text("")
    found = "\n".join(problems(sources.root))
    assert "vllm.v1.engine.async_llm.AsyncLLM.generate does not exist; serve/engine/plugin.py calls it" in found
    assert "vLLM has no option --block-size; serve/launch passes it" in found
    assert "vLLM reads no variable VLLM_PLUGINS; serve/launch sets it" in found
    assert "vllm.tool_parsers registers no hermes" in found
    assert "no longer contains 'CoreEngineProcManager('; serve/engine/entry.py relies on it" in found
