"""Tests of calibration samples from workloads, text and JSONL, of their seed, and of rejected sources."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimserve.compress import self_generated
from slimserve.compress.calibration import load_calibration, short_sequences
from slimserve.core.errors import UserError
from slimserve.core.tokenizer import load_tokenizer
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ScoringPrompt
from tests.distill.conftest import save_tiny


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


def test_each_sequence_starts_with_a_document_as_a_served_prompt_does(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    lengths = [5, 6, 3, 9, 4, 8, 2, 7]
    documents = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths, start=1)]
    file.write_text("\n".join(json.dumps({"input_ids": document}) for document in documents))
    tokens_NT = load_calibration(smollm2, str(file), 4, 8).tokens_NT
    assert all(row[0] % 100 == 0 for row in tokens_NT.tolist())
    # 44 tokens are five sequences of 8, but only by using the ends that were cut off.
    tokens_NT = load_calibration(smollm2, str(file), 9, 8).tokens_NT
    assert tokens_NT.shape == (5, 8)
    assert len(set(tokens_NT.flatten().tolist())) == 40


def test_short_sequences_are_parts_of_the_text_with_different_first_tokens() -> None:
    tokens_NT = torch.randint(0, 40, (6, 64), generator=torch.Generator().manual_seed(0))
    short_MS = short_sequences(tokens_NT)
    assert short_MS.shape == (6, 16)  # a quarter of 384 tokens
    first = short_MS[:, 0].tolist()
    assert first[: len(set(tokens_NT[:, 0].tolist()))] == list(dict.fromkeys(tokens_NT[:, 0].tolist()))
    assert len(set(first)) == len(first)
    text = [row.tolist() for row in tokens_NT]
    assert all(any(part == row[at : at + 16] for row in text for at in range(49)) for part in short_MS.tolist())
    # A text with few different tokens has fewer short sequences, and a sequence may be shorter than 16 tokens.
    assert short_sequences(torch.tensor([[7, 8] * 64] * 4)).tolist() == [[7, 8] * 8, [8, 7] * 8]
    assert short_sequences(torch.tensor([[7, 8, 9]])).tolist() == [[7, 8, 9]]


def test_a_model_writes_its_own_calibration_text_once(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_generated, "_BATCH", 4)
    monkeypatch.setattr(self_generated, "_REPLY_TOKENS", 24)
    tiny = save_tiny(smollm2, tmp_path / "tiny", 1, intermediate_size=48)
    first, again, other = (load_calibration(tiny, "self-generated", 6, 64, seed) for seed in (0, 0, 1))
    assert first.tokens_NT.shape == (6, 64)
    assert first.sha256 == again.sha256 != other.sha256
    tokenizer = load_tokenizer(tiny)
    text = tokenizer.decode(first.tokens_NT[0])
    assert text.startswith("<|im_start|>system")
    monkeypatch.setattr(self_generated, "_load", lambda *_: pytest.fail("the replies were not cached"))
    assert load_calibration(tiny, "self-generated", 6, 64, 0).sha256 == first.sha256


def test_replies_are_drawn_from_the_models_distribution() -> None:
    """A model that gives all probability to two tokens and a stop token writes the two equally often, and stops."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, eos_token_id=2, **sizes)).eval()
    model.lm_head = torch.nn.Linear(16, 16)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.fill_(-1e4)
    model.lm_head.bias.data[[7, 9, 2]] = torch.tensor([0.0, 0.0, -5.0])
    prompts = [[5, 6, 8], [5]] * 32
    written = self_generated._sample(model, prompts, "a seed")
    replies = [tokens[len(prompt) :] for prompt, tokens in zip(prompts, written, strict=True)]
    assert all(tokens[: len(prompt)] == prompt for prompt, tokens in zip(prompts, written, strict=True))
    assert all(2 not in reply[:-1] and (reply[-1] == 2 or len(reply) == 256) for reply in replies)
    drawn = [token for reply in replies for token in reply if token != 2]
    assert set(drawn) == {7, 9}
    assert drawn.count(7) / len(drawn) == pytest.approx(0.5, abs=0.03)
    stop_probability = 1 - (1 - math.exp(-5) / (2 + math.exp(-5))) ** 256
    assert sum(reply[-1] == 2 for reply in replies) / 64 == pytest.approx(stop_probability, abs=0.15)


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
