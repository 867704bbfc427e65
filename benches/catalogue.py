"""Compare rankers that read films as tokens with rankers that read their texts: quality, items/s, bytes, training time.

    make bench-catalogue

All rankers are SmolLM2-135M, trained on the same MovieLens users with the true label of every film. They read titles,
titles with genres, or 8, 4, 2 or 1 tokens per film. A tenth of the films, chosen by a hash, is in no training data;
rankers with tokens get these from `slimserve items add`. They read 1,600 sequences, and rankers with texts, whose
sequences are longer, 960; the result states the tokens and FLOPs of each training. The settings of one token per film
were chosen on the `load` split (docs/log.md) and are those of 2 to 8 tokens too. The `quality` split is evaluated once.

Quality is measured in two ways. `sequence` covers the 9th to the 24th label of a user's latest 24 films, given all
labels before. `lists` covers 16 candidates after a history of 24 films, where candidates do not see each other, as on a
server. `warm` films were in the training data, `cold` ones were not. Differences have 95% intervals that resample
users, paired over the same labels.

Speed is that of our launch in a closed loop with lists of 16 and of 100 candidates after histories of 24 films, each
ranker in turn and then in reverse order. `stacked` is one token per film, a quarter of the neurons pruned, and W8A8; it
stands against stock vLLM, launched as its documentation advises, with titles and genres.

`stock_mean_off` and `torch_mean_off` are the mean absolute differences of scores between our server and stock vLLM or
plain torch, for one token per film over 200 lists.

The cache keeps every model and measurement, so an interrupted run resumes. `catalogue.json` there has everything; the
last line of output is one JSON object. `--quick` trains for two steps, and `--model DIR` takes another model: both only
try the steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import httpx

from benches.rankers import Scores, list_scores, sequence_scores
from benches.served import MODEL, guide_spec, our_spec
from slimserve.compare.quality import ask_prompts
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import load_recipe
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.catalogue import read_catalogue
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, write_atomically
from slimserve.core.tokenizer import load_tokenizer
from slimserve.core.variant import read_manifest
from slimserve.distill.items import add_items
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.sections import label_token
from slimserve.distill.validation import NUM_SKIPPED_LABELS
from slimserve.loadtest.run import run_suite
from slimserve.loadtest.settings import LoadSettings, SuiteOptions
from slimserve.serve.launch.process import Engine, EngineSpec
from slimserve.workloads import intervals, load_workload, metrics
from slimserve.workloads.interface import Answer, MetricData, Prompt, ScoringPrompt
from slimserve.workloads.item_tokens import item_tokens_of
from slimserve.workloads.recommendation import Recommendation, is_held_out, label_prompts

NUM_TEST_ITEMS = 24
NUM_HISTORY, NUM_CANDIDATES = 24, 16
SEQUENCE, LISTS = "sequence", "lists"
METRICS = ("auc", "within_group_auc", "ndcg_at_10")
ONE, STACKED, TITLE, GENRES = "items-1", "stacked", "text-title", "text-genres"
LIST_LENGTHS = (16, 100)
NUM_LOAD_USERS = 8
NUM_AGREEMENT = 200
_SUITES = {kind: str(Path(__file__).with_name(f"catalogue_{kind}.py")) for kind in ("title", "genres")}
_MICRO_TOKENS = 2048


@dataclass(frozen=True)
class Size:
    """Size of a run."""

    tokens_per_item: tuple[int, ...] = (1, 2, 4, 8)
    text_steps: int = 120
    item_steps: int = 100
    num_users: int | None = None
    load_s: float = 30.0
    num_rounds: int = 2


FULL = Size()
QUICK = Size(tokens_per_item=(1,), text_steps=2, item_steps=2, num_users=12, load_s=6.0, num_rounds=1)


class Bench:
    """One run with its cache folder."""

    def __init__(self, model: str, size: Size, *, is_quick: bool) -> None:
        self.model, self.size, self.is_quick = model, size, is_quick
        kind = "quick" if is_quick else "full"
        self.folder = cache_dir(f"bench-catalogue-{kind}-{model_hash(resolve_model(model))[:8]}")
        self.prompts = _test_prompts("genres", size.num_users)
        self.titles = _test_prompts("title", size.num_users)
        self.asked = {way: _asked(way, prompts) for way, prompts in self.prompts.items()}

    def kept(self, name: str, directory: Path, measure: Callable[[], Any]) -> Any:
        """Return a measurement of a model from the cache; measure it if it is not there."""
        file = self.folder / f"{name}-{model_hash(directory)[:8]}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(measure()))
        return json.loads(file.read_text(encoding="utf-8"))

    def models(self) -> dict[str, Path]:
        """Return the trained models by name."""
        files = {}
        for name, is_cold in (("warm", False), ("cold", True)):
            texts = load_workload(_SUITES["genres"]).item_texts()
            lines = [
                json.dumps({"id": one, "text": text}) for one, text in texts.items() if is_held_out(one) == is_cold
            ]
            files[name] = self.folder / f"{name}.jsonl"
            write_atomically(files[name], "\n".join(lines) + "\n")
        made = {}
        for kind in ("title", "genres"):
            recipe = _recipe(_SUITES[kind], self.size.text_steps, 8, 3e-5)
            made[f"text-{kind}"] = distill(self.model, None, recipe, self.folder / f"text-{kind}")
        for count in self.size.tokens_per_item:
            items = {"file": files["warm"], "tokens_per_item": count, "learning_rate": 2e-3}
            recipe = _recipe(_SUITES["genres"], self.size.item_steps, 16, 1e-4, items)
            directory = distill(self.model, None, recipe, self.folder / f"items-{count}")
            catalogue = read_catalogue(directory)
            assert catalogue is not None
            if not any(map(is_held_out, catalogue.tokens)):
                add_items(directory, files["cold"])
            made[f"items-{count}"] = directory
        return made

    def stacked(self, one: Path) -> Path:
        """Return the ranker of one token per film, pruned and quantized."""
        settings = [f"calibration.source={json.dumps(_SUITES['genres'])}"]
        settings += ["calibration.num_samples=4", "calibration.sequence_length=64"] if self.is_quick else []
        return build_variant(str(one), one, *load_recipe("prune25-w8a8", settings), self.folder / STACKED)

    def scores_in_process(self, name: str, directory: Path) -> dict[str, Scores]:
        """Return the scores of a model in torch, which reads each user's sequence or history once."""
        prompts = self.titles if name == TITLE else self.prompts

        def measure() -> dict[str, Scores]:
            of_sequences = [scores for _, scores in sequence_scores(directory, prompts[SEQUENCE])]
            return {SEQUENCE: of_sequences, LISTS: list_scores(directory, prompts[LISTS])}

        return cast("dict[str, Scores]", self.kept(f"scores-{name}", directory, measure))

    def scores_served(self, name: str, directory: Path, spec: EngineSpec) -> dict[str, Scores]:
        """Return the scores of a served model; in a sequence each label is the only candidate after earlier films."""

        def measure() -> dict[str, Scores]:
            with Engine(spec) as engine:
                target = Target(engine.spec.url, engine.spec.name, str(directory))
                return {
                    way: _by_user(ask_prompts(target, f"{way}, {name}", _flat(asked)), asked)
                    for way, asked in self.asked.items()
                }

        return cast("dict[str, Scores]", self.kept(f"scores-{name}", directory, measure))

    def baselines(self) -> dict[str, dict[str, Scores]]:
        """Return the scores of the baselines without a language model, which know the same labels before each film."""
        results: dict[str, dict[str, Scores]] = {}
        for way, asked in self.asked.items():
            for name, given in load_workload(_SUITES["genres"]).baselines(_flat(asked)).items():
                results.setdefault(name, {})[way] = _by_user(given, asked)
        return results

    def agreement(self, directory: Path, in_torch: Scores, log: Path) -> dict[str, float]:
        """Return how far the scores of stock vLLM and of torch are from those of our server, over the first lists."""
        prompts = self.prompts[LISTS][:NUM_AGREEMENT]
        tokenizer = load_tokenizer(directory)
        labels = [label_token(tokenizer, label) for label in prompts[0].labels]

        def measure() -> dict[str, float]:
            with Engine(our_spec(log, directory, "prefill")) as engine:
                target = Target(engine.spec.url, engine.spec.name, str(directory))
                ours = cast("Scores", ask_prompts(target, "lists, our server", prompts))
            with Engine(guide_spec(log, directory)) as engine:
                stock = [_stock_scores(engine.spec, item_tokens_of(directory)(one), labels) for one in prompts]
            differences = {"stock": _differences(ours, stock), "torch": _differences(ours, in_torch)}
            return {
                f"{name}_{what}_off": value
                for name, values in differences.items()
                for what, value in (("mean", sum(values) / len(values)), ("max", max(values)))
            }

        return cast("dict[str, float]", self.kept("agreement", directory, measure))

    def speed(self, name: str, directory: Path, spec: EngineSpec, number: int) -> dict[str, Any]:
        """Return items/s and latencies at capacity by the length of the candidate list."""
        suite = _SUITES["title" if name == TITLE else "genres"]
        item_tokens = str(directory) if read_catalogue(directory) else ""

        def measure() -> dict[str, Any]:
            results = {}
            with Engine(spec) as engine:
                target = Target(engine.spec.url, engine.spec.name, str(directory))
                for length in LIST_LENGTHS:
                    options = SuiteOptions(candidates=str(length), prompt_seed=number, item_tokens=item_tokens)
                    settings = LoadSettings(users=NUM_LOAD_USERS, duration_s=self.size.load_s, suite=options)
                    summary, _ = run_suite(suite, target, settings, self.folder / "loads" / f"{name}-{number}-{length}")
                    results[str(length)] = {
                        "items_per_s": summary.items_per_s,
                        "p50_s": summary.e2e_s.p50,
                        "p99_s": summary.e2e_s.p99,
                        "prompt_tokens": summary.prompt_tokens_mean,
                        "num_errors": sum(summary.errors.values()),
                    }
            return results

        return cast("dict[str, Any]", self.kept(f"speed-{name}-{number}", directory, measure))

    def metrics(self, way: str, scores: Scores, is_cold: bool) -> dict[str, MetricData]:
        """Return the quality metrics over the labels of cold or of warm films."""
        truths: list[list[float]] = []
        kept: Scores = []
        for prompts, row in zip(self.asked[way], scores, strict=True):
            ids = [one for prompt in prompts for one in prompt.item_ids]
            gains = [float(one) for prompt in prompts for one in prompt.truth]
            wanted = [place for place, item in enumerate(ids) if is_held_out(item) == is_cold]
            truths.append([gains[place] for place in wanted])
            kept.append([row[place] for place in wanted])
        return metrics.ranking_metrics(truths, kept, [user[0].group for user in self.asked[way]])


def main() -> None:
    restart_with_fast_allocator()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="Train for two steps, to try the benchmark.")
    parser.add_argument(
        "--tokens", help="Only these numbers of tokens per film, such as 1,2; 1 is among them (default: 1,2,4,8)."
    )
    parser.add_argument("--model", default=MODEL, help="Model that all rankers begin as (default: %(default)s).")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.tokens:
        size = replace(size, tokens_per_item=tuple(map(int, arguments.tokens.split(","))))
    bench = Bench(arguments.model, size, is_quick=arguments.quick)
    models = bench.models()
    scores = {name: bench.scores_in_process(name, directory) for name, directory in models.items()}
    models[STACKED] = bench.stacked(models[ONE])
    log = bench.folder / "engine.log"
    specs = {name: our_spec(log, directory, "prefill") for name, directory in models.items()}
    scores[STACKED] = bench.scores_served(STACKED, models[STACKED], specs[STACKED])
    agreement = bench.agreement(models[ONE], scores[ONE][LISTS], log)
    specs["guide"], models["guide"] = guide_spec(log, models[GENRES]), models[GENRES]
    speeds: dict[str, list[dict[str, Any]]] = {}
    for number in range(bench.size.num_rounds):
        for name in list(specs) if number % 2 == 0 else list(specs)[::-1]:
            speeds.setdefault(name, []).append(bench.speed(name, models[name], specs[name], number))
    document = {
        "quality": _quality(bench, scores | bench.baselines()),
        "agreement": agreement,
        "speed": speeds,
        "models": {name: _facts(directory) for name, directory in models.items()},
    }
    write_atomically(bench.folder / "catalogue.json", json.dumps(document, indent=2) + "\n")
    print_status(f"all results: {bench.folder / 'catalogue.json'}")
    print(bench_line("catalogue", _summary(document)))


def _recipe(
    source: str, num_steps: int, batch_size: int, learning_rate: float, items: Mapping[str, Any] | None = None
) -> DistillRecipe:
    return DistillRecipe.model_validate(
        {
            "data": {"source": source, "num_examples": num_steps * batch_size, "num_validation": 32},
            "supervision": {"sections": "answer"},
            "loss": {"kd_weight": 0.0},
            "training": {
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "micro_batch_tokens": _MICRO_TOKENS,
                "validate_every": 20,
                "save_every_s": 120,
            },
            "items": items or {},
            "stages": [{"steps": num_steps}],
        }
    )


def _stock_scores(spec: EngineSpec, prompt: Prompt, label_tokens: Sequence[int]) -> list[float]:
    """Return the scores of a list by stock vLLM's own endpoint, which reads item tokens in texts."""
    asked = cast("ScoringPrompt", prompt)
    body = {"model": spec.name, "query": asked.query, "items": asked.items, "label_token_ids": label_tokens}
    answer = httpx.post(f"{spec.url}/generative_scoring", json=body, timeout=600).raise_for_status().json()
    return [row["score"] for row in answer["data"]]


def _differences(ours: Scores, theirs: Scores) -> list[float]:
    pairs = zip(ours, theirs[: len(ours)], strict=True)
    return [abs(one - other) for lists in pairs for one, other in zip(*lists, strict=True)]


def _test_prompts(kind: str, num_users: int | None) -> dict[str, list[ScoringPrompt]]:
    """Return the solved prompts of the test users by the way of measuring, with one text per film."""
    workload = cast("Recommendation", load_workload(_SUITES[kind]))
    sizes = {
        SEQUENCE: (NUM_SKIPPED_LABELS, NUM_TEST_ITEMS - NUM_SKIPPED_LABELS),
        LISTS: (NUM_HISTORY, NUM_CANDIDATES),
    }
    prompts = {}
    for way, (history_len, num_candidates) in sizes.items():
        latest = type(workload)(
            history_len=history_len,
            num_candidates=num_candidates,
            is_latest_only=True,
            item_text=workload.item_text,
            holds_out_items=True,
        )
        prompts[way] = cast("list[ScoringPrompt]", latest.make_prompts("quality", num_users or 10_000))
    return prompts


def _asked(way: str, prompts: Sequence[ScoringPrompt]) -> list[list[ScoringPrompt]]:
    """Return the prompts that a server is asked for each user: a list, or one prompt per label of a sequence."""
    return [[one] if way == LISTS else label_prompts(one, NUM_SKIPPED_LABELS) for one in prompts]


def _flat(asked: Sequence[Sequence[ScoringPrompt]]) -> list[ScoringPrompt]:
    return [one for user in asked for one in user]


def _by_user(answers: Sequence[Answer], asked: Sequence[Sequence[ScoringPrompt]]) -> Scores:
    """Return the scores of each user's films from the answers to the flat prompts."""
    rest = iter(answers)
    return [[float(score) for _ in user for score in cast("Sequence[float]", next(rest))] for user in asked]


def _quality(bench: Bench, scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    """Return estimates by way, films, ranker and metric, and the differences of each ranker from both texts."""
    results: dict[str, Any] = {}
    for way, (films, is_cold) in product((SEQUENCE, LISTS), (("warm", False), ("cold", True))):
        data = {name: bench.metrics(way, one[way], is_cold) for name, one in scores.items()}
        for name, of_name in data.items():
            row: dict[str, Any] = {metric: asdict(intervals.estimate(of_name[metric])) for metric in METRICS}
            for other in (TITLE, GENRES):
                if other == name:
                    continue
                for metric in METRICS:
                    ours, theirs = of_name[metric], data[other][metric]
                    low, high, _ = intervals.paired_difference(intervals.paired_samples(ours, theirs))
                    row[f"{metric}_minus_{other}"] = [ours.value - theirs.value, low, high]
            results.setdefault(way, {}).setdefault(films, {})[name] = row
            shown = ", ".join(f"{one} {of_name[one].value:.4f}" for one in METRICS)
            print_status(f"{way}, {films}, {name}: {shown}")
    return results


def _facts(directory: Path) -> dict[str, Any]:
    """Return the bytes per item in embedding and output layer, and what the training cost."""
    catalogue, manifest = read_catalogue(directory), read_manifest(directory)
    detail = manifest.steps[0].detail if manifest else {}
    hidden_size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    return {
        "bytes_per_item": 2 * 2 * hidden_size * catalogue.tokens_per_item if catalogue else 0,
        "build_minutes": manifest.build_s / 60 if manifest else 0.0,
        **{key: detail[key] for key in ("train_s", "tokens_read", "flops") if key in detail},
    }


def _summary(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the benchmark's own metrics; speeds are those of lists of 16 candidates, one sample per round."""
    quality, speeds = document["quality"][SEQUENCE], document["speed"]
    lists = document["quality"][LISTS]["warm"]

    def ratios(ours: str, theirs: str) -> list[float]:
        pairs = zip(speeds[ours], speeds[theirs], strict=True)
        return [one["16"]["items_per_s"] / max(other["16"]["items_per_s"], 1e-9) for one, other in pairs]

    def gain(films: str, metric: str, other: str, name: str = ONE) -> list[float]:
        return [quality[films][name][f"{metric}_minus_{other}"][0]]

    return {
        "items_per_s_ratio": ratios(ONE, TITLE),
        "items_per_s_ratio_genres": ratios(ONE, GENRES),
        "stacked_ratio": ratios(STACKED, "guide"),
        "auc_gain": gain("warm", "auc", GENRES),
        "within_auc_gain": gain("warm", "within_group_auc", GENRES),
        "cold_auc_loss": [-value for value in gain("cold", "auc", GENRES)],
        **{name: [value] for name, value in document["agreement"].items()},
        "stacked_auc_gain": gain("warm", "auc", GENRES, STACKED),
        **{f"auc_{name}": [row["auc"]["value"]] for name, row in quality["warm"].items()},
        **{f"within_auc_{name}": [row["within_group_auc"]["value"]] for name, row in quality["warm"].items()},
        **{f"lists_auc_{name}": [row["auc"]["value"]] for name, row in lists.items()},
        **{f"lists_within_auc_{name}": [row["within_group_auc"]["value"]] for name, row in lists.items()},
    }


if __name__ == "__main__":
    main()
