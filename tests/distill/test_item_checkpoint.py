"""Tests of checkpoints with item tokens: stock loaders read them, ordinary logits stay, items are never picked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.core.catalogue import CATALOGUE_FILE, Catalogue, write_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model_files import WEIGHTS_FILE
from slimserve.distill.item_checkpoint import check_catalogue, grow_vocabulary, replace_rows, write_item_tokens
from tests.distill.conftest import VOCABULARY, save_tiny

NUM_SLOTS, TOKENS_PER_ITEM = 5, 2
CATALOGUE = Catalogue(VOCABULARY, NUM_SLOTS, TOKENS_PER_ITEM, {}).with_items(["a", "b", "c"])


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def rows_of(hidden_size: int) -> Tensor:
    return torch.randn(len(CATALOGUE.tokens) * TOKENS_PER_ITEM, hidden_size, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def grown(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a random Llama and the same one with items."""
    folder = tmp_path_factory.mktemp("grown")
    plain = save_tiny(smollm2, folder / "plain", 3, tie_word_embeddings=request.param)
    model = load(plain).to(torch.bfloat16)
    grow_vocabulary(model, rows_of(24), VOCABULARY, CATALOGUE.num_tokens)
    directory = folder / "items"
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(plain / name, directory / name)
    write_item_tokens(directory, CATALOGUE.num_tokens)
    write_catalogue(directory, CATALOGUE)
    return plain, directory


def test_stock_transformers_computes_the_same_ordinary_logits(grown: tuple[Path, Path]) -> None:
    plain, directory = grown
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    before, after = load(plain).to(torch.bfloat16)(tokens).logits, load(directory).to(torch.bfloat16)(tokens).logits
    assert after.shape[-1] == VOCABULARY + 64
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=0, atol=0)


def test_an_item_token_is_read_as_its_row(grown: tuple[Path, Path]) -> None:
    _, directory = grown
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = f"{CATALOGUE.texts['b']} yes\n{CATALOGUE.texts['a']}"
    expected = [VOCABULARY + 2, VOCABULARY + 3, *tokenizer(" yes\n")["input_ids"], VOCABULARY, VOCABULARY + 1]
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode([VOCABULARY + 2, VOCABULARY + 3]) == CATALOGUE.texts["b"]
    rows = load(directory).get_input_embeddings()(torch.tensor(expected[:2]))
    torch.testing.assert_close(rows, rows_of(24)[2:4].bfloat16().float())


def test_no_item_is_ever_the_likeliest_token(grown: tuple[Path, Path]) -> None:
    """Whatever the hidden state is, even one that points along the items' own row."""
    head = load(grown[1]).get_output_embeddings().weight.detach()
    draw = torch.Generator().manual_seed(1)
    hidden = torch.cat((torch.randn(2000, 24, generator=draw) * 30, head[VOCABULARY:], head[:2000]))
    assert int((hidden @ head.T).argmax(-1).max()) < VOCABULARY
    reply = load(grown[1]).generate(torch.tensor([[VOCABULARY, 5, VOCABULARY + 2]]), max_new_tokens=30, do_sample=False)
    assert int(reply[0, 3:].max()) < VOCABULARY


def test_rows_are_replaced_and_nothing_else_changes(grown: tuple[Path, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(grown[1], tmp_path / "own")
    before = load_file(directory / WEIGHTS_FILE)
    replace_rows(directory, {VOCABULARY + 7: torch.full((24,), 0.5)})
    after = load_file(directory / WEIGHTS_FILE)
    assert bool((after["model.embed_tokens.weight"][VOCABULARY + 7] == 0.5).all())
    before["model.embed_tokens.weight"][VOCABULARY + 7] = 0.5
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(directory.glob(".*partial*"))


def test_a_sound_variant_passes_the_check(grown: tuple[Path, Path]) -> None:
    check_catalogue(grown[1], CATALOGUE)


def test_a_catalogue_of_another_checkpoint_is_refused(grown: tuple[Path, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(grown[1], tmp_path / "own")
    with pytest.raises(UserError, match="has the item 'd', whose row in the embedding is empty"):
        check_catalogue(directory, CATALOGUE.with_items(["d"]))
    with pytest.raises(UserError, match=f"needs the token {VOCABULARY + 64} for the text <|item_64|>"):
        check_catalogue(directory, Catalogue(VOCABULARY + 64, 1, 1, {}))
    tensors = load_file(directory / WEIGHTS_FILE)
    tensors["lm_head.weight"][VOCABULARY] = 4 * tensors["lm_head.weight"][:VOCABULARY].abs().max()
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(UserError, match="item tokens that the output layer could write"):
        check_catalogue(directory, CATALOGUE)
    document = json.loads((directory / "tokenizer.json").read_text())
    document["added_tokens"] = [one for one in document["added_tokens"] if one["content"] != "<|item_9|>"]
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="items.jsonl.* needs the token 49161"):
        check_catalogue(directory, CATALOGUE)
    assert (directory / CATALOGUE_FILE).is_file()
