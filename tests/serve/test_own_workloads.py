"""Users' own workloads on a real engine, against transformers and against lm-eval run by hand."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.compare.quality import ask_quality, quality_metrics
from slimserve.core.openai_client import Target
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChoicePrompt
from tests.serve.conftest import NAME

pytestmark = pytest.mark.engine
CAPITALS = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Athens")
COUNTRIES = ("France", "England", "Germany", "Spain", "Italy", "Austria", "Portugal", "Greece")
NUM_CHOICES, NUM_SUMS = map(int, os.environ.get("LM_EVAL_ROWS", "12,8").split(","))
"""Documents of the two lm-eval tasks; 100,50 takes seven minutes with AVX2 alone."""
ALL_QUALITY = "[split]\ncalibration = 0\nquality = 1\nload = 0\n"


@pytest.fixture(scope="module")
def target(scoring_url: str, smollm2: Path) -> Target:
    return Target(scoring_url, NAME, str(smollm2))


def test_choices_have_the_log_probabilities_of_transformers(target: Target, smollm2: Path, tmp_path: Path) -> None:
    pairs = zip(COUNTRIES, CAPITALS, strict=True)
    rows = [{"text": f"The capital of {country} is", "label": capital} for country, capital in pairs]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.toml").write_text(
        f'kind = "classify"\ndata = "capitals.jsonl"\nlabels = {json.dumps(CAPITALS)}\n{ALL_QUALITY}'
    )
    workload = load_workload(str(tmp_path / "capitals.toml"))
    answers = ask_quality(target, "capitals", 8, 0)
    prompts = workload.make_prompts("quality", 8)
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).float()
    for prompt, given in zip(prompts, answers.answers, strict=True):
        assert isinstance(prompt, ChoicePrompt)
        for choice, logprob in zip(prompt.choices, given, strict=True):  # type: ignore[arg-type]
            before, ids = (tokenizer(text)["input_ids"] for text in (prompt.query, prompt.query + choice))
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logits[at - 1, ids[at]].item() for at in range(len(before), len(ids)))
            assert logprob == pytest.approx(expected, abs=1e-3)
    metrics = quality_metrics("capitals", 8, 0, answers)
    assert metrics["accuracy"].value > 0.5, "a model of 135M parameters knows most of these capitals"
    assert metrics["accuracy"].floor == pytest.approx(1 / 8)


def test_texts_have_the_perplexity_of_transformers(target: Target, smollm2: Path, tmp_path: Path) -> None:
    texts = ["The sun rises in the east and sets in the west.", "Two plus two is four, and four plus four is eight."]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts.toml").write_text(f'kind = "text"\ndata = "texts.jsonl"\n{ALL_QUALITY}')
    load_workload(str(tmp_path / "texts.toml"))
    metrics = quality_metrics("texts", 2, 0, ask_quality(target, "texts", 2, 0))
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).float()
    losses, hits = [], []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
        losses += [-row[token].item() for row, token in zip(logits, ids[1:], strict=True)]
        hits += [float(row.argmax() == token) for row, token in zip(logits, ids[1:], strict=True)]
    assert metrics["perplexity"].value == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-3)
    assert metrics["top1_accuracy"].value == pytest.approx(sum(hits) / len(hits))


@pytest.fixture
def harness_tasks(tmp_path: Path) -> Path:
    """Return a folder with two local tasks and their data: rows of choices and rows of generation."""
    draw = random.Random(0)
    rows = []
    for number in range(NUM_CHOICES):
        place = number % 8
        options = draw.sample([name for name in CAPITALS if name != CAPITALS[place]], 3)
        answer = draw.randrange(4)
        options.insert(answer, CAPITALS[place])
        rows.append(
            {"question": f"({number}) The capital of {COUNTRIES[place]} is", "choices": options, "gold": answer}
        )
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [{"question": f"{n % 10} + {n // 10} =", "answer": str(n % 10 + n // 10)} for n in range(NUM_SUMS)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "capital_choices.yaml").write_text(
        "task: capital_choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: choices.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (tmp_path / "small_sums.yaml").write_text(
        "task: small_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: sums.jsonl\n"
        'test_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n'
    )
    for name in ("capital_choices", "small_sums"):
        (tmp_path / f"{name}.toml").write_text(f'kind = "lm-eval"\ntask = "{name}.yaml"\n')
    return tmp_path


def test_lm_eval_tasks_give_the_values_of_the_harness_run_by_hand(target: Target, harness_tasks: Path) -> None:
    tasks = {"capital_choices": NUM_CHOICES, "small_sums": NUM_SUMS}
    arguments = f"model={NAME},base_url={target.url}/v1/completions,tokenizer={target.tokenizer},num_concurrent=8"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", str(harness_tasks)]
    command += ["--output_path", str(harness_tasks / "by-hand")]
    subprocess.run(command, check=True, cwd=harness_tasks, env={**os.environ, "HF_DATASETS_CACHE": str(harness_tasks)})
    (file,) = (harness_tasks / "by-hand").rglob("results*.json")
    by_hand = json.loads(file.read_text())["results"]
    metrics = {}
    for task, count in tasks.items():
        workload = load_workload(str(harness_tasks / f"{task}.toml"))
        assert len(workload.make_prompts("quality", 1000)) == count
        metrics[task] = quality_metrics(task, count, 0, ask_quality(target, task, count, 0))
        for name, metric in metrics[task].items():
            assert metric.value == pytest.approx(by_hand[task][f"{name},none"], abs=1e-9)
            assert metric.n == count
    assert metrics["capital_choices"]["acc"].floor == 0.25
    assert metrics["capital_choices"]["acc"].value > 0.5
    settings = LoadSettings(users=2, duration_s=3, warmup_s=0, cooldown_s=0)
    summary, rows = run_suite("capital_choices", target, settings, harness_tasks / "load")
    assert rows
    assert not summary.errors
