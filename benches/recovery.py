"""Measure how much of the accuracy that pruning costs is returned by distillation, on a skill that the model has.

    make bench-recovery

The task is `examples/checked_sums.py`: short prompts and long chains of thought. The teacher is SmolLM2-135M,
fine-tuned on the calibration split. The pruned model is the teacher without a part of its MLP neurons: the smallest of
several cuts that costs 30 points of accuracy on the development problems. The students are the pruned model, trained
again on the same problems for the same number of steps:

- `distilled`: half of the loss is the divergence from the teacher, three seeds.
- `sft`: cross-entropy alone, three seeds.

The cut and the learning rates are chosen on the load split (development). The quality split (test) is evaluated once,
in the final table. `recovered_frac` is (student - pruned) / (teacher - pruned), with a paired bootstrap over the
problems.

The first stage trains, and lets the models answer. It runs on a GPU if there is one, with more steps; no vLLM is needed
there, because the answers are then generated in this process. The second stage serves the outcome with vLLM: accuracy
of the W8A8 student, and its speed against the dense teacher's. Each stage says what it reuses from the folder, so an
interrupted run resumes, and a folder that a GPU filled can be completed on another machine. The last line of output is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benches.cuts import smallest_costly_cut
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Calibrate, Prune, Recipe, load_recipe
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.chat_template import render_chat
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.progress import print_status
from slimserve.core.provenance import provenance
from slimserve.core.storage import cache_dir, write_atomically
from slimserve.core.tokenizer import load_tokenizer
from slimserve.core.variant import disk_bytes, read_manifest
from slimserve.distill.models import load_model, stop_tokens
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.sampling import generate
from slimserve.workloads import intervals, load_workload
from slimserve.workloads.interface import ChatAnswer, ChatPrompt

MODEL = "smollm2-135m-instruct"
WORKLOAD = "examples/checked_sums.py"
NUM_SEEDS = 3
NUM_TEST, NUM_DEVELOPMENT = 512, 128
_FIRST_TEST = 512
"""Number of test problems that are left out: an earlier table used them, before the learning rates were chosen."""
LEAST_LOSS = 0.3
"""Accuracy on the development problems that the cut must cost."""
_NUM_REPEATS = 5

Replies = dict[str, list[tuple[str, float]]]
"""Texts and numbers of tokens of the replies to `development` and `test` problems."""
Values = NDArray[np.float64]
"""A value per test problem, such as 1 for a right answer."""


@dataclass(frozen=True)
class Sizes:
    """Length of the trainings."""

    teacher_steps: int
    student_steps: int
    batch_size: int
    teacher_rate: float = 5e-4
    student_rates: tuple[float, ...] = (3.75e-5, 7.5e-5, 1.5e-4)
    micro_batch_tokens: int = 4096
    num_seeds: int = NUM_SEEDS
    answer_batch: int = 32


SIZES = {
    "cpu": Sizes(teacher_steps=200, student_steps=60, batch_size=8),
    "cuda": Sizes(
        teacher_steps=600,
        student_steps=400,
        batch_size=16,
        student_rates=(1e-4, 3e-4, 1e-3),
        micro_batch_tokens=16384,
        answer_batch=1024,
    ),
    "quick": Sizes(teacher_steps=2, student_steps=2, batch_size=2, student_rates=(1e-4, 3e-4), num_seeds=2),
}


@dataclass(frozen=True)
class Student:
    """One training of the pruned model."""

    method: str
    """`distilled` or `sft`."""
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.rate:g}-{self.seed}"


class Students:
    """The first stage: trains all models and lets them answer."""

    def __init__(self, model: str, folder: Path, sizes: Sizes, num_problems: int) -> None:
        self.model, self.folder, self.sizes = model, folder, sizes
        self.workload = load_workload(WORKLOAD)
        self.development = self._prompts("load", min(num_problems, NUM_DEVELOPMENT))
        self.test = self._prompts("quality", _FIRST_TEST + num_problems)[_FIRST_TEST:]
        self.costs: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, Any]:
        """Return the outcome: answers to test problems, accuracy on development problems, and costs, by model."""
        teacher = self.train("teacher", self.model, None, self.sizes.teacher_rate, self.sizes.teacher_steps, 0)
        answers = {"teacher": self._answers(teacher)}
        pruned, removed_frac = smallest_costly_cut(
            lambda removed_frac: self.cut(teacher, f"cut-{removed_frac:g}", removed_frac),
            lambda directory: self._development_accuracy(self._answers(directory, self.development)),
            self._development_accuracy(answers["teacher"]),
            LEAST_LOSS,
        )
        answers["pruned"] = self._answers(pruned)

        def train(method: str, rate: float, seed: int) -> Path:
            source = str(teacher) if method == "distilled" else None
            name = Student(method, rate, seed).name
            return self.train(name, pruned, source, rate, self.sizes.student_steps, seed)

        chosen, tried = {}, {}
        for method in ("distilled", "sft"):
            tried[method] = {
                rate: self._development_accuracy(self._answers(train(method, rate, 0), self.development))
                for rate in self.sizes.student_rates
            }
            chosen[method] = max(tried[method], key=lambda rate: tried[method][rate])
            print_status(f"{method}: learning rate {chosen[method]:g} is best on the development problems")
        for seed in range(self.sizes.num_seeds):
            for method, rate in chosen.items():
                answers[Student(method, rate, seed).name] = self._answers(train(method, rate, seed))
        return {
            "sizes": asdict(self.sizes),
            "device": device_name(),
            "mlp_remove_frac": removed_frac,
            "rates": chosen,
            "development_accuracy_by_rate": tried,
            "development_accuracy": {name: self._development_accuracy(texts) for name, texts in answers.items()},
            "correct": {name: self._correct(self.test, texts) for name, texts in answers.items()},
            "num_tokens": {name: [reply[1] for reply in texts["test"]] for name, texts in answers.items()},
            "costs": self.costs,
        }

    def train(
        self,
        name: str,
        student: str | Path,
        teacher: str | None,
        rate: float,
        num_steps: int,
        seed: int,
        changes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Train a student in its own folder, or find it there; `changes` replaces keys of the recipe's tables."""
        sizes = self.sizes
        document: dict[str, Any] = {
            "data": {
                "source": WORKLOAD,
                "num_examples": num_steps * sizes.batch_size,
                "num_validation": 16,
                "max_tokens": 640,
                "seed": seed,
            },
            "loss": {"kd_weight": 0.5 if teacher else 0.0},
            "supervision": {"sections": "cot+answer"},
            "training": {
                "learning_rate": rate,
                "batch_size": sizes.batch_size,
                "micro_batch_tokens": sizes.micro_batch_tokens,
                "validate_every": 1000,
                "keep": "last",
            },
            "stages": [{"steps": num_steps}],
        }
        for table, keys in (changes or {}).items():
            document[table] = document[table] | keys if isinstance(keys, Mapping) else keys
        recipe = DistillRecipe.model_validate(document)
        directory = distill(str(student), teacher, recipe, self.folder / name, recipe_name=name)
        manifest = read_manifest(directory)
        assert manifest is not None
        detail = manifest.steps[0].detail
        total = {f"total_{key}": value for key, value in detail["total"].items()}
        self.costs[name] = {key: detail[key] for key in ("train_s", "tokens_read", "flops", "peak_bytes")} | total
        return directory

    def cut(self, model: Path, name: str, removed_frac: float) -> Path:
        """Build a model without a fraction of its MLP neurons, or find it."""
        prune = Prune(step="prune", mlp_remove_frac=removed_frac)
        recipe = Recipe(summary="", calibration=Calibrate(source=WORKLOAD, num_samples=64), steps=(prune,))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return build_variant(str(model), model, name, recipe, self.folder / name, device=device)

    def test_answers(self, directory: Path) -> list[bool]:
        """Return which test problems a model solves; kept by the model's hash."""
        return self._correct(self.test, {"test": self._replies(directory, self.test)})

    def _prompts(self, split: Any, count: int) -> list[ChatPrompt]:
        return cast("list[ChatPrompt]", self.workload.make_prompts(split, count))

    def _answers(self, directory: Path, prompts: Sequence[ChatPrompt] | None = None) -> Replies:
        """Return the replies to development and test problems, or to `prompts`."""
        # They are answered together, because a batch on a GPU takes as long as its longest reply.
        replies = self._replies(directory, prompts or [*self.development, *self.test])
        count = len(self.development)
        return {"development": replies[:count], "test": replies[count:]}

    def _replies(self, directory: Path, prompts: Sequence[ChatPrompt]) -> list[tuple[str, float]]:
        """Return a model's replies and their numbers of tokens; kept by the model and the prompts."""
        asked = hashlib.sha256(repr([one.messages for one in prompts]).encode()).hexdigest()[:8]
        file = self.folder / f"answers-{asked}-{model_hash(directory)[:16]}.json"
        if not file.is_file():
            begun = time.monotonic()
            replies = answer_prompts(directory, prompts, self.sizes.answer_batch, self.folder / "engine.log")
            write_atomically(file, json.dumps(replies))
            print_status(f"{directory.name}: {len(prompts)} answers in {time.monotonic() - begun:.0f} s")
        return cast("list[tuple[str, float]]", json.loads(file.read_text(encoding="utf-8")))

    def _correct(self, prompts: Sequence[ChatPrompt], answers: Replies) -> list[bool]:
        replies = answers["test" if prompts is self.test else "development"]
        return [self.workload.is_correct(prompt, text) for prompt, (text, _) in zip(prompts, replies, strict=True)]

    def _development_accuracy(self, answers: Replies) -> float:
        return float(np.mean(self._correct(self.development, answers)))


def answer_prompts(
    directory: Path, prompts: Sequence[ChatPrompt], batch_size: int, log: Path
) -> list[tuple[str, float]]:
    """Return a model's greedy replies and their numbers of tokens: from a server, or on a GPU from this process."""
    if not torch.cuda.is_available():
        return [(one.text, one.num_tokens) for one in ask(directory, prompts, log)]
    tokenizer = load_tokenizer(directory)
    model: Any = load_model(directory, torch.bfloat16).to("cuda")
    stop = stop_tokens(directory, tokenizer)
    texts = [render_chat(tokenizer, one.messages, "prompt", add_generation_prompt=True) for one in prompts]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    replies = generate(model.eval(), rows, stop, 0, prompts[0].max_tokens, temperature=0.0, batch_size=batch_size)
    return [(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)) for tokens in replies]


def ask(directory: Path, prompts: Sequence[ChatPrompt], log: Path) -> list[ChatAnswer]:
    """Return the greedy replies of a model behind our server."""
    from benches.served import our_spec
    from slimserve.compare.quality import ask_prompts
    from slimserve.core.openai_client import ENGINE_CONCURRENCY, Target
    from slimserve.serve.launch.process import Engine

    with Engine(our_spec(log, directory, "decode")) as engine:
        target = Target(engine.spec.url, engine.spec.name)
        return cast("list[ChatAnswer]", ask_prompts(target, directory.name, prompts, ENGINE_CONCURRENCY))


def table(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the final metrics on the test problems, with 95% intervals."""
    correct = {name: np.array(values, dtype=float) for name, values in outcome["correct"].items()}
    teacher, pruned = correct["teacher"], correct["pruned"]
    metrics: dict[str, Any] = {f"accuracy_{name}": interval(correct[name]) for name in ("teacher", "pruned")}
    means = {}
    for method, rate in outcome["rates"].items():
        seeds = [values for name, values in correct.items() if name.startswith(f"{method}-{rate:g}-")]
        # Problems are the independent samples, so each has its mean over the seeds.
        mean = means[method] = np.mean(seeds, axis=0)
        metrics[f"accuracy_{method}"] = interval(mean) | {"seeds": [float(one.mean()) for one in seeds]}
        metrics[f"recovered_frac_{method}"] = bootstrap(recovered, mean, teacher, pruned)
    metrics["distilled_minus_sft"] = bootstrap(difference, *means.values())
    return metrics


def recovered(student: Values, teacher: Values, pruned: Values) -> float:
    """Return the share of the accuracy lost by pruning that a student has again; NaN if nothing was lost."""
    lost = teacher.mean() - pruned.mean()
    return float((student.mean() - pruned.mean()) / lost) if lost else float("nan")


def difference(ours: Values, theirs: Values) -> float:
    return float(ours.mean() - theirs.mean())


def interval(values: Values) -> dict[str, float | None]:
    """Return the mean over problems with its 95% interval."""
    return bootstrap(lambda drawn: float(drawn.mean()), values)


def bootstrap(statistic: Callable[..., float], *samples: Values) -> dict[str, float | None]:
    """Return a statistic of paired samples with its 95% interval over the problems; None where it is undefined."""
    count = len(samples[0])
    estimate = intervals.bootstrap_by_group(
        lambda rows: statistic(*(one[rows] for one in samples)), range(count), count
    )
    return {name: None if np.isnan(one) else one for name, one in asdict(estimate).items()}


def serve(folder: Path, student: str, prompts: Sequence[ChatPrompt]) -> dict[str, Any]:
    """Serve the student before and after W8A8; return its accuracy, its sizes, and its speed over the dense model."""
    from benches.served import median, our_spec, served
    from slimserve.serve.launch.process import Engine

    workload = load_workload(WORKLOAD)
    recipe = load_recipe("w8a8", [f"calibration.source={WORKLOAD}"])
    w8a8 = build_variant(student, folder / student, *recipe, folder / f"w8a8-{student}")
    dense = folder / "teacher" if (folder / "teacher").is_dir() else resolve_model(MODEL)
    results: dict[str, Any] = {}
    speeds: dict[str, dict[str, list[float]]] = {}

    async def measure(url: str) -> dict[str, list[float]]:
        async with served(url) as client:
            return {
                "prefill": [1 / await client.complete(512, 1) for _ in range(_NUM_REPEATS)],
                "decode": [await client.decode_rate(1, 128) for _ in range(_NUM_REPEATS)],
                "decode8": [await client.decode_rate(8, 128) for _ in range(_NUM_REPEATS)],
            }

    for name, directory in {"dense": dense, "distilled": folder / student, "w8a8": w8a8}.items():
        results[f"size_mib_{name}"] = round(disk_bytes(directory) / 2**20, 1)
        with Engine(our_spec(folder / f"{name}.log", directory)) as engine:
            speeds[name] = asyncio.run(measure(engine.spec.url))
        if name == "dense" and directory.parent != folder:
            continue  # the untrained model has the teacher's speed but not its accuracy
        answers = ask(directory, prompts, folder / f"{name}.log")
        correct = [workload.is_correct(one, answer.text) for one, answer in zip(prompts, answers, strict=True)]
        results[f"accuracy_served_{name}"] = interval(np.array(correct, dtype=float))
    for name in ("distilled", "w8a8"):
        for kind, values in speeds[name].items():
            results[f"{kind}_{name}_over_dense_ratio"] = median(values) / median(speeds["dense"][kind])
    return {**results, "hardware": provenance()["hardware"]}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def first_stage(model: str, is_quick: bool, folder: Path | None = None) -> tuple[Students, dict[str, Any]]:
    """Return the first stage in `folder` (by default in the cache) and its outcome; finished parts are reused."""
    kind = "quick" if is_quick else "cuda" if torch.cuda.is_available() else "cpu"
    num_problems = 8 if is_quick else NUM_TEST
    inputs = (model_hash(resolve_model(model)), num_problems, _FIRST_TEST)
    keys = {one: hashlib.sha256(repr((inputs, sizes)).encode()).hexdigest()[:8] for one, sizes in SIZES.items()}
    folder = folder or cache_dir(f"bench-recovery-{kind}-{keys[kind]}")
    folder.mkdir(parents=True, exist_ok=True)
    students = Students(model, folder, SIZES[kind], num_problems)
    # An outcome of the same settings counts, or of those for another kind of machine.
    files = [folder / f"students-{key}.json" for key in keys.values()]
    file = next(filter(Path.is_file, files), folder / f"students-{keys[kind]}.json")
    if file.is_file():
        print_status(f"students: reused from {file}")
    else:
        write_atomically(file, json.dumps(students.run()))
    return students, json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    restart_with_fast_allocator()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run the whole chain with two steps and eight problems")
    parser.add_argument("--model", default=MODEL, help=f"model that becomes the teacher (default {MODEL})")
    parser.add_argument("--folder", type=Path, help="folder of all models and answers (default: in the cache)")
    parser.add_argument("--train-only", action="store_true", help="end after the first stage, which needs no vLLM")
    options = parser.parse_args()
    students, outcome = first_stage(options.model, options.quick, options.folder)
    metrics = table(outcome)
    if not options.train_only:
        name = Student("distilled", outcome["rates"]["distilled"], 0).name
        metrics |= serve(students.folder, name, students.test)
    shown = {key: value for key, value in outcome.items() if key not in {"correct", "num_tokens"}}
    print(json.dumps({"bench": "recovery", **provenance(), **shown, "metrics": metrics}))


if __name__ == "__main__":
    main()
