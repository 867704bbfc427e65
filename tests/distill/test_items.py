"""Tests of learning item tokens and of adding items to a finished variant."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.core.catalogue import CATALOGUE_FILE, ENCODER_FILE, read_catalogue
from slimserve.core.errors import UserError
from slimserve.core.model_files import WEIGHTS_FILE, model_hash
from slimserve.core.variant import read_manifest
from slimserve.distill.item_checkpoint import check_catalogue
from slimserve.distill.item_embedding import ItemEmbedding
from slimserve.distill.item_encoder import (
    ItemEncoder,
    first_map,
    fold_of,
    folded_features,
    interaction_features,
    load_encoder,
    piece_means,
    text_states,
)
from slimserve.distill.items import add_items
from slimserve.distill.run import distill
from slimserve.workloads.interface import Interaction, ScoringPrompt, split_of
from tests.distill.conftest import VOCABULARY, Killed, kill_after, make_recipe, save_tiny
from tests.distill.test_train import start_two_processes

NUM_ITEMS = 30
WORKLOAD = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from slimserve.workloads.recommendation import Recommendation

@dataclass(frozen=True)
class Own(Recommendation):
    name: ClassVar[str] = "own"

WORKLOAD = Own(Path(__file__).parent, history_len=12, num_candidates=4, item_text="title")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workload file with 30 items, of which everybody likes every second one, and 28 in the items' file."""
    folder = tmp_path_factory.mktemp("own")
    draw = random.Random(0)
    users = [str(user) for user in range(400) if split_of(str(user)) == "calibration"][:60]
    films = [f"{item}\tFilm {item}\t{1980 + item}" for item in range(NUM_ITEMS)]
    ratings = [
        f"{user}\t{item}\t{5 if item % 2 else 1}\t{time}"
        for user in users
        for time, item in enumerate(draw.sample(range(NUM_ITEMS), 16))
    ]
    (folder / "a.item").write_text("\n".join(["item_id\tmovie_title\trelease_year", *films]) + "\n")
    (folder / "a.inter").write_text("\n".join(["user_id\titem_id\trating\ttimestamp", *ratings]) + "\n")
    (folder / "own.py").write_text(WORKLOAD)
    write_items(folder / "items.jsonl", range(NUM_ITEMS - 2))
    return folder / "own.py"


def write_items(file: Path, items: Any) -> Path:
    lines = [json.dumps({"id": str(item), "text": f"Film {item}"}) for item in items]
    file.write_text("\n".join(lines) + "\n")
    return file


def item_recipe(source: Path, **tables: Any) -> Any:
    return make_recipe(
        **{
            "data": {"source": str(source), "num_examples": 40, "num_validation": 8, "max_tokens": 256},
            "supervision": {"sections": "answer"},
            "loss": {"kd_weight": 0.0},
            "items": {"file": str(source.with_name("items.jsonl")), "num_factors": 4, "learning_rate": 0.03},
            "stages": [{"steps": 3}],
            **tables,
        }
    )


def test_a_student_learns_items_and_stock_transformers_reads_them(
    source: Path, tiny_student: Path, tmp_path: Path
) -> None:
    """Odd items are liked and even ones are not; a student that reads only numbers of rows must learn that."""
    recipe = item_recipe(source, stages=[{"steps": 15}])
    output = distill(str(tiny_student), None, recipe, tmp_path / "out")
    catalogue = read_catalogue(output)
    assert catalogue is not None
    assert list(catalogue.tokens) == [str(item) for item in range(NUM_ITEMS - 2)]
    assert (catalogue.first_token, catalogue.num_slots) == (VOCABULARY, 32)
    check_catalogue(output, catalogue)
    manifest = read_manifest(output)
    assert manifest is not None
    assert manifest.steps[0].detail["items"]["num_items"] == NUM_ITEMS - 2
    history = manifest.steps[0].detail["validation"]
    assert history[-1]["auc"] > 0.9 > history[0]["auc"]
    # A validation sequence has 3 tokens per item: the item, the label and a line feed.
    assert manifest.steps[0].detail["tokens_read"] <= 15 * 4 * 16 * 3
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    labels = [tokenizer(label)["input_ids"][0] for label in (" yes", " no")]
    scores = []
    for item in range(8):
        ids = tokenizer(f"{catalogue.texts['9']} yes\n{catalogue.texts['12']} no\n{catalogue.texts[str(item)]}")
        logits = model(torch.tensor([ids["input_ids"]])).logits[0, -1]
        scores.append((logits[labels[0]] - logits[labels[1]]).item())
    assert min(scores[1::2]) > max(scores[::2])


def test_an_interrupted_training_of_items_resumes_with_the_same_result(
    source: Path, tiny_student: Path, tmp_path: Path
) -> None:
    recipe = item_recipe(source, stages=[{"steps": 5}])
    whole = distill(str(tiny_student), None, recipe, tmp_path / "whole")
    target = tmp_path / "killed"
    for num_steps in (1, 3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_after(num_steps, patch)
            distill(str(tiny_student), None, recipe, target)
    distill(str(tiny_student), None, recipe, target)
    for file in (WEIGHTS_FILE, ENCODER_FILE):
        ours, theirs = load_file(target / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


def test_low_rank_adapters_learn_beside_the_items_and_are_merged(
    source: Path, tiny_student: Path, tmp_path: Path
) -> None:
    recipe = item_recipe(source, training={"lora_rank": 4, "learning_rate": 1e-2, "keep": "last"})
    output = distill(str(tiny_student), None, recipe, tmp_path / "out")
    catalogue = read_catalogue(output)
    assert catalogue is not None
    check_catalogue(output, catalogue)
    before, after = load_file(tiny_student / WEIGHTS_FILE), load_file(output / WEIGHTS_FILE)
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(after[embedding][:VOCABULARY], before[embedding].bfloat16(), rtol=0, atol=0)
    assert bool(after[embedding][VOCABULARY : VOCABULARY + NUM_ITEMS - 2].ne(0).any(1).all())
    name = "model.layers.0.self_attn.q_proj.weight"
    change = after[name].float() - before[name].float()
    assert change.norm() > 0.01 * before[name].float().norm()
    assert AutoModelForCausalLM.from_pretrained(output).get_input_embeddings().weight.shape[0] == len(after[embedding])


def test_two_processes_learn_the_same_items_as_one_and_sharded_ones_are_refused(
    source: Path, tiny_student: Path, tmp_path: Path
) -> None:
    recipe = item_recipe(source, training={"keep": "last"})
    alone = distill(str(tiny_student), None, recipe, tmp_path / "alone")
    process = start_two_processes("ddp", tiny_student, "", tmp_path / "two", recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for file in (WEIGHTS_FILE, ENCODER_FILE):
        ours, theirs = load_file(tmp_path / "two" / file), load_file(alone / file)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-2, atol=2e-3)
    process = start_two_processes("fsdp", tiny_student, "", tmp_path / "three", recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "items.file" in output
    assert "is not supported under FSDP" in output


@pytest.fixture(scope="module")
def variant(source: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variant")
    student = save_tiny(smollm2, folder / "student", 1)
    return distill(str(student), None, item_recipe(source), folder / "out")


@pytest.fixture
def own_variant(variant: Path, tmp_path: Path) -> Path:
    return shutil.copytree(variant, tmp_path / "own-variant")


def test_new_items_get_the_encoders_rows(own_variant: Path, tmp_path: Path) -> None:
    before = load_file(own_variant / WEIGHTS_FILE)
    assert add_items(own_variant, write_items(tmp_path / "new.jsonl", [28, 29])) == 2
    catalogue = read_catalogue(own_variant)
    assert catalogue is not None
    assert len(catalogue.tokens) == NUM_ITEMS
    check_catalogue(own_variant, catalogue)
    encoder = load_encoder(own_variant)
    reader = Path(encoder.text_model)
    states = text_states(
        AutoModelForCausalLM.from_pretrained(reader, dtype=torch.float32),
        AutoTokenizer.from_pretrained(reader),
        ["Film 28", "Film 29"],
    )
    text = (states - encoder.mean_T) / encoder.scale
    expected = (text @ encoder.weight_FKD[: text.shape[1], 0] + encoder.bias_KD[0]).bfloat16()
    rows = load_file(own_variant / WEIGHTS_FILE)["model.embed_tokens.weight"]
    first = catalogue.tokens["28"]
    torch.testing.assert_close(rows[first : first + 2], expected)
    rows[first : first + 2] = 0
    assert torch.equal(rows, before["model.embed_tokens.weight"])


def test_what_cannot_be_added_is_one_line_and_changes_nothing(own_variant: Path, tmp_path: Path) -> None:
    before = model_hash(own_variant), (own_variant / CATALOGUE_FILE).read_bytes()
    file = tmp_path / "new.jsonl"
    for content, message in (
        ('{"id": "5", "text": "again"}', "'5' is in the catalogue already"),
        ('{"id": "90", "text": "a"}\n{"id": "90", "text": "b"}', r"new.jsonl:2' has the id '90' of an earlier line"),
        ('{"id": 7, "text": "a"}', r"new.jsonl:1' has no id, or one that is no text"),
        ('{"id": "90", "text": ["a"]}', r"new.jsonl:1' has no text, or one that is no text"),
        ('{"id": "90"}', "has no text"),
        ('{"id": "90", "text": "a"', "is not JSON"),
        ("", "holds no items"),
        ("\n".join(json.dumps({"id": f"x{n}", "text": "a"}) for n in range(9)), "4 of the 32 slots are free"),
    ):
        file.write_text(content + "\n")
        with pytest.raises(UserError, match=message) as caught:
            add_items(own_variant, file)
        assert "\n" not in str(caught.value)
    write_items(file, [28])
    with pytest.raises(UserError, match="is not the model that read the texts"):
        add_items(own_variant, file, text_model=str(own_variant))
    assert before == (model_hash(own_variant), (own_variant / CATALOGUE_FILE).read_bytes())


def test_two_that_add_at_once_both_succeed(own_variant: Path, tmp_path: Path) -> None:
    """A lock on a file also separates two threads that open it apart, and these start in less time than processes."""
    files = [write_items(tmp_path / f"new-{item}.jsonl", [item]) for item in (28, 29)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda file: add_items(own_variant, file), files)) == [1, 1]
    catalogue = read_catalogue(own_variant)
    assert catalogue is not None
    assert {"28", "29"} <= catalogue.tokens.keys()
    check_catalogue(own_variant, catalogue)


def test_an_interrupted_add_leaves_the_old_catalogue(
    own_variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after the rows are written and before the catalogue is."""
    from slimserve.distill import items

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    before = (own_variant / CATALOGUE_FILE).read_bytes()
    file = write_items(tmp_path / "new.jsonl", [28])
    with monkeypatch.context() as patched:
        patched.setattr(items, "write_catalogue", die)
        with pytest.raises(KeyboardInterrupt):
            add_items(own_variant, file)
    assert (own_variant / CATALOGUE_FILE).read_bytes() == before
    catalogue = read_catalogue(own_variant)
    assert catalogue is not None
    check_catalogue(own_variant, catalogue)
    assert add_items(own_variant, file) == 1


def test_the_teachers_probabilities_of_the_labels_train_the_student(
    source: Path, tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The cache must hold what the teacher predicts after each item's text, in the order of the student's labels."""
    from slimserve.distill import run
    from slimserve.distill.train import TrainingJob, TrainingResult
    from slimserve.workloads import load_workload

    jobs: list[TrainingJob] = []

    def stop(job: TrainingJob) -> TrainingResult:
        jobs.append(job)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe = item_recipe(source, loss={"kd_weight": 1.0, "top_k": 4}, stages=[{"steps": 1}])
            distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "out")
    (job,) = jobs
    cached: Any = job.cached
    example = job.training[3]
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    items = {str(item) for item in range(NUM_ITEMS - 2)}
    prompts = load_workload(str(source)).make_prompts("calibration", 60)
    texts = [prompt.only_items(items).solved for prompt in prompts if isinstance(prompt, ScoringPrompt)]
    number_of = {f"Film {item} ({1980 + item})": item for item in range(NUM_ITEMS)}
    # Each fold has its own 32 tokens.
    ours = [(token - VOCABULARY) % 32 for token in example.tokens if token >= VOCABULARY]
    text = next(one for one in texts if [number_of[line.split(":")[0]] for line in one.splitlines()] == ours)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    begin = sum(len(one.targets) for one in recipe.supervision.apply_all(job.training)[:3])
    query = ""
    for place, line in enumerate(text.splitlines()):
        query += line.split(":")[0] + ":"
        logits = teacher(torch.tensor([tokenizer(query)["input_ids"]])).logits[0, -1]
        top = logits.log_softmax(-1).topk(4)
        assert cached._tokens[begin + place].tolist() == top.indices.tolist()
        torch.testing.assert_close(cached._logprobs[begin + place], top.values, atol=1e-4, rtol=1e-4)
        query += line.split(":")[1] + "\n"


def test_settings_that_do_not_go_together_are_refused(source: Path, tiny_student: Path, tmp_path: Path) -> None:
    for tables, message in (
        ({"loss": {"kd_weight": 0.5}}, "set loss.top_k"),
        ({"supervision": {"sections": "all"}}, "only labels of items are learned"),
        ({"stages": [{"kind": "on_policy"}], "loss": {"kd_weight": 0.5, "top_k": 4}}, "on_policy"),
    ):
        with pytest.raises(UserError, match=message):
            item_recipe(source, **tables)
    with pytest.raises(UserError, match="'reasoning' has no grades of the items"):
        recipe = item_recipe(source, data={"source": "reasoning"})
        distill(str(tiny_student), None, recipe, tmp_path / "out")
    with pytest.raises(UserError, match=r"items.num_slots: '5' is below the 28 items"):
        items = {"file": str(source.with_name("items.jsonl")), "num_slots": 5}
        distill(str(tiny_student), None, item_recipe(source, items=items), tmp_path / "out")


def make_embedding(shrinkage: float = 5.0, unrated_frac: float = 0.0) -> ItemEmbedding:
    """Return an embedding of 3 slots with 2 tokens each and 2 folds: 2 features of texts, 1 of ratings, size 4."""
    torch.manual_seed(0)
    encoder = ItemEncoder(torch.randn(3, 2, 4), torch.randn(2, 4), torch.zeros(2), 1.0, "", "")
    embedding = ItemEmbedding(
        torch.nn.Parameter(torch.randn(10, 4)),
        encoder,
        torch.randn(3, 2),
        torch.randn(3, 3, 1),
        torch.tensor([0.0, 5.0, 15.0]),
        10,
        shrinkage,
        unrated_frac,
    )
    torch.nn.init.normal_(embedding.residual_NKD)
    return embedding


def test_a_row_is_the_encoders_and_as_much_of_the_residual_as_there_are_ratings() -> None:
    """Item 1 in fold 2 has the tokens 10 + 2 · 6 + 2 and the next; its ratings are those of the fold."""
    embedding = make_embedding().eval()
    tokens = torch.tensor([[3, 10, 15, 24], [13, 0, 12, 21]])
    result = embedding(tokens)
    for place, token in [((0, 1), 10), ((0, 2), 15), ((0, 3), 24), ((1, 0), 13), ((1, 2), 12), ((1, 3), 21)]:
        fold, rest = divmod(token - 10, 6)
        item, number = divmod(rest, 2)
        features = torch.cat((embedding.text_NE[item], embedding.ratings_GNS[fold, item]))
        row = features @ embedding.encoder_FKD[:, number] + embedding.bias_KD[number]
        row = row + (0.0, 0.5, 0.75)[item] * embedding.residual_NKD[item, number]
        torch.testing.assert_close(result[place], row)
        if not fold:
            torch.testing.assert_close(embedding.all_rows()[token - 10], row)
    torch.testing.assert_close(result[0, 0], embedding.weight[3])
    torch.testing.assert_close(result[1, 1], embedding.weight[0])
    result[0, 1].sum().backward()
    assert embedding.weight.grad is None or not bool(embedding.weight.grad.any())


def test_an_item_that_is_read_as_unrated_has_the_row_of_a_new_item() -> None:
    embedding = make_embedding(unrated_frac=0.999).train()
    torch.manual_seed(1)
    expected = torch.einsum("nt,tkd->nkd", embedding.text_NE, embedding.encoder_FKD[:2]) + embedding.bias_KD
    torch.testing.assert_close(embedding(torch.arange(10, 16)[None])[0], expected.flatten(0, 1))
    torch.testing.assert_close(embedding.encoder().rows(embedding.text_NE), expected)


def test_the_features_of_a_users_fold_do_not_know_the_users_ratings() -> None:
    draw = random.Random(5)
    rows = [
        Interaction(user, str(item), (item + user) % 3 == 0) for user in range(40) for item in draw.sample(range(12), 6)
    ]
    ids = [str(item) for item in range(12)]
    folds = folded_features(ids, rows, 3, 4)
    torch.testing.assert_close(folds[0], interaction_features(ids, rows, 3))
    user = 7
    others = [one._replace(is_positive=not one.is_positive) if one.group == user else one for one in rows]
    changed = folded_features(ids, others, 3, 4)
    own = fold_of(user, 4)
    torch.testing.assert_close(changed[own, :, :2], folds[own, :, :2])
    assert not torch.allclose(changed[0, :, :2], folds[0, :, :2])
    # The factors of a fold are the same up to a rotation, and that of folds[0] changes it a little.
    products = [one[own, :, 2:5] @ one[own, :, 2:5].T for one in (folds, changed)]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)
    # Aligned factors are near those of all ratings; without the rotation they would have other signs and orders.
    for fold in range(1, 5):
        similarity = torch.nn.functional.cosine_similarity(folds[fold, :, 2:5].flatten(), folds[0, :, 2:5].flatten(), 0)
        assert float(similarity) > 0.7


def test_features_of_ratings_match_a_direct_computation() -> None:
    draw = random.Random(3)
    rows = [
        Interaction(user, str(item), draw.random() < 0.6) for user in range(12) for item in draw.sample(range(7), 4)
    ]
    ids = [str(item) for item in range(8)]
    features = interaction_features(ids, rows, 3)
    assert features.shape == (8, 6)
    assert not bool(features[7].any())
    counts = [[sum(one.item == item and one.is_positive == liked for one in rows) for liked in (0, 1)] for item in ids]
    rate = sum(one.is_positive for one in rows) / len(rows)
    odds = torch.tensor([(yes + 5 * rate) / (no + 5 * (1 - rate)) for no, yes in counts[:7]]).log()
    torch.testing.assert_close(features[:7, 0], (odds - odds.mean()) / odds.std())
    log_counts = torch.tensor([float(sum(one)) for one in counts[:7]]).log()
    torch.testing.assert_close(features[:7, 1], (log_counts - log_counts.mean()) / log_counts.std())
    matrix = torch.zeros(12, 7, dtype=torch.float64)
    for one in rows:
        matrix[one.group, int(one.item)] = one.is_positive - rate
    _, strengths, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = (right[:3].T * strengths[:3]).float()
    exact = exact - exact.mean(0)
    exact = exact / exact.std()
    found = features[:7, 2:5]
    torch.testing.assert_close((found * exact).sum(0).abs(), exact.square().sum(0), rtol=1e-3, atol=1e-3)
    assert bool((features[:7, 5] == 1).all())


def test_the_first_map_is_a_ridge_regression() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(40, 5), torch.randn(40, 2, 3)
    x = x - x.mean(0)
    weight, bias = first_map(x, y)
    penalty = 0.1 * x.square().sum(0).mean()
    padded = torch.cat((x, penalty.sqrt() * torch.eye(5)))
    targets = torch.cat(((y - y.mean(0)).flatten(1), torch.zeros(5, 6)))
    expected = torch.linalg.lstsq(padded, targets).solution.reshape(5, 2, 3)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, y.mean(0))


def test_a_text_is_divided_into_pieces_of_equal_length() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    torch.testing.assert_close(piece_means(rows, [0, 1, 2, 3], 2), torch.stack((rows[:2].mean(0), rows[2:4].mean(0))))
    torch.testing.assert_close(piece_means(rows, [4, 5], 4), rows[[4, 4, 5, 5]])
    torch.testing.assert_close(piece_means(rows, [1, 3, 5], 1), rows[[1, 3, 5]].mean(0, keepdim=True))
    assert piece_means(rows, [], 2).tolist() == [[0, 0], [0, 0]]
