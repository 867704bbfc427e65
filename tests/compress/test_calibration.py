"""Tests of calibration samples from workloads, text and JSONL, of their seed, and of rejected sources."""

import json
from pathlib import Path

import pytest

from slimserve.compress.calibration import load_calibration
from slimserve.core.errors import UserError
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ScoringPrompt


def test_samples_depend_only_on_the_seed(smollm2: Path) -> None:
    first, again, other = (load_calibration(smollm2, "mixed", 4, 64, seed) for seed in (0, 0, 1))
    assert first.tokens_NT.shape == (4, 64)
    assert first.sha256 == again.sha256 != other.sha256


def test_a_workload_gives_only_its_calibration_split(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(smollm2).decode(
        load_calibration(smollm2, "recommendation", 2, 300).tokens_NT[0]
    )
    prompts = load_workload("recommendation").make_prompts("calibration", 2000)
    first_lines = [prompt.query.splitlines()[0] for prompt in prompts if isinstance(prompt, ScoringPrompt)]
    assert any(line in text for line in first_lines)


def test_text_and_token_ids_are_read_from_files(smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One two three four.\n\nFive six seven.\n\n" * 30)
    assert load_calibration(smollm2, str(text), 3, 16).tokens_NT.shape == (3, 16)
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps({"input_ids": [row] * 8}) for row in range(5)))
    assert sorted(load_calibration(smollm2, str(ids), 5, 8).tokens_NT[:, 0].tolist()) == [0, 1, 2, 3, 4]


def test_fewer_samples_than_requested_are_counted(smollm2: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": list(range(25))}))
    calibration = load_calibration(smollm2, str(ids), 9, 10)
    assert calibration.detail["num_sequences"] == 2
    assert calibration.detail["num_sequences_requested"] == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "a.jsonl:1.*is not JSON"),
        ("a.jsonl", '{"words": 1}', "neither a text nor input_ids"),
        ("a.jsonl", '{"text": "a"}\n{"input_ids": [1]}', "mixes"),
        ("a.jsonl", '{"input_ids": [1, 99999, 3, 4]}', "outside 0 to 49151"),
        ("a.txt", "few words", "less than one sequence of 16"),
        ("a.csv", "", "neither a workload nor a file"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(
    smollm2: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_calibration(smollm2, str(tmp_path / name), 1, 4 if "9999" in content else 16)
