"""A workload that a user adds as one file goes through calibration, evaluation, load and a comparison's tables."""

from dataclasses import replace
from pathlib import Path

from slimserve.compare.plan import make_preset
from slimserve.compare.results import Comparison, LoadRun, Requirements, Round, VariantResult
from slimserve.compress.calibration import load_calibration, source_files
from slimserve.core.openai_client import Target
from slimserve.distill.data import source_files as data_files
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings
from slimserve.report.comparison_tables import Tables
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChatAnswer, ChatPrompt
from slimserve.workloads.metrics import evaluate

FILE = '''
from slimserve.workloads.interface import ChatPrompt, Workload
from slimserve.workloads.metrics import answer_metrics


class Parity(Workload):
    """Whether a number is even or odd."""

    name = "parity"
    primary_metric = "accuracy"
    launch_profile = "decode"
    preset_prompts = {"quick": 10, "full": 20}

    def make_prompts(self, split, num_prompts, seed=0):
        offset = {"calibration": 0, "quality": 1000, "load": 2000}[split]
        return [self.prompt(offset + number) for number in range(num_prompts)]

    def prompt(self, number):
        answer = "odd" if number % 2 else "even"
        question = ({"role": "user", "content": f"Is {number} even or odd?"},)
        return ChatPrompt(question, 8, "parity", f"{number} modulo 2 is {number % 2}.", answer, {})

    def is_correct(self, prompt, text):
        return text.strip().endswith(prompt.answer)

    def metric_data(self, prompts, answers):
        correct = [self.is_correct(prompt, answer.text) for prompt, answer in zip(prompts, answers)]
        return answer_metrics(correct, [prompt.kind for prompt in prompts], [answer.num_tokens for answer in answers])


WORKLOAD = Parity()
'''


def test_one_file_adds_a_workload_to_every_part(tmp_path: Path, smollm2: Path) -> None:
    file = tmp_path / "parity.py"
    file.write_text(FILE)

    calibration = load_calibration(smollm2, str(file), num_samples=3, sequence_length=64)
    assert calibration.tokens_NT.shape == (3, 64)

    assert source_files(f"recommendation,{file}") == [file], "a variant is built again if the file has changed"
    assert data_files(f"reasoning+{file}") == [file]

    workload = load_workload(str(file))
    prompts = [prompt for prompt in workload.make_prompts("quality", 10) if isinstance(prompt, ChatPrompt)]
    answers = [ChatAnswer("<think>\n?\n</think>\neven", 5)] * len(prompts)
    quality = evaluate(workload, prompts, answers)
    assert quality["accuracy"].value == 0.5

    schedule = MockSchedule(ttft_s=0.01, gap_s=0.001, num_tokens=4)
    with running_mock_server(schedule) as server:
        settings = LoadSettings(users=2, duration_s=1, warmup_s=0, cooldown_s=0)
        summary, rows = run_suite(str(file), Target(server.url, MODEL), settings, tmp_path / "load")
    assert summary.num_requests > 10
    assert {row.kind for row in rows} == {"parity"}
    assert summary.quality["accuracy"].value == 0.0, "the mock server knows no parity"
    assert (tmp_path / "load" / "parity.json").exists()

    load = LoadRun(None, 2, replace(summary, output_tokens_per_s=123.0), "capacity")
    dense = VariantResult(
        name="dense", recipe="dense", summary="", directory="", rounds=[Round(1, 10.0, capacity={"parity": load})],
        quality={"parity": quality},
    )  # fmt: skip
    comparison = Comparison(
        model="m", workloads={"parity": workload.primary_metric}, preset=make_preset("quick", ["parity"]),
        requirements=Requirements(), started="2026-01-01T00:00:00+00:00", reference="dense", variants=[dense],
    )  # fmt: skip
    assert comparison.preset.quality_prompts == {"parity": 10}
    text = str(Tables(comparison).workload("parity"))
    for shown in ("parity", "correct answers", "0.5", "123"):
        assert shown in text.lower()
