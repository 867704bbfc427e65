from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, read_manifest, write_manifest


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    steps = [
        StepRecord(name="prune_mlp", seconds=1.5, detail={"neurons_after": 96}),
        StepRecord(name="write", seconds=0.5),
    ]
    manifest = Manifest(
        name="m", recipe="r", base=BaseModelRecord(model="b", sha256="0"), steps=steps, num_parameters=5
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.build_s == 2.0


def test_a_directory_without_manifest_gives_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", '{"name": "m", "unknown": 1}'])
def test_a_broken_manifest_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "slimserve.json").write_text(text)
    with pytest.raises(UserError, match="is not a slimserve manifest"):
        read_manifest(tmp_path)
