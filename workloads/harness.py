"""Runs EleutherAI's lm-evaluation-harness in a process of its own, because it imports torch, transformers and datasets.

    python -m slimserve.workloads.harness JOB.json RESULT.json

A job names a task, or the YAML file of one. With `url` the harness evaluates the served model; without it, it only
lists the documents of the task with their requests. Both write one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from slimserve.core.errors import UserError

_NUM_SHOWN_LINES = 3


def run_harness(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a child process and return its result; UserError quotes the harness if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        key = os.environ.get("VLLM_API_KEY")
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment |= {"OPENAI_API_KEY": key} if key else {}
        command = [sys.executable, "-m", "slimserve.workloads.harness", str(job_file), str(result_file)]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0 or not result_file.is_file():
            last = " / ".join(done.stderr.strip().split("\n")[-_NUM_SHOWN_LINES:])
            raise UserError("task", job["task"], f"could not be run by lm-eval: {last}", "correct the task or its data")
        return cast("dict[str, Any]", json.loads(result_file.read_text(encoding="utf-8")))


def main(job_file: str, result_file: str) -> None:
    """Run the job of one file and write the other."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    result = _evaluate(job) if job.get("url") else _describe(job)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def _tasks(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task objects by name; a YAML file is included from its own folder."""
    from lm_eval.tasks import TaskManager

    name, file = job["task"], Path(job["task"])
    if file.suffix in {".yaml", ".yml"}:
        # Data files in the YAML are relative to it.
        os.chdir(file.parent)
        name = _task_name(file)
        manager = TaskManager(include_path=str(file.parent), include_defaults=False)
    else:
        manager = TaskManager()
    tasks: dict[str, Any] = manager.load([name])["tasks"]
    if job.get("num_fewshot") is not None:
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=job["num_fewshot"])
    return tasks


def _task_name(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").split("\n"):
        key, colon, value = line.partition(":")
        if colon and key.strip() == "task":
            return value.strip().strip("\"'")
    raise SystemExit(f"{file} names no task")


def _describe(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the documents of a task: requests for the evaluation documents, texts for its training documents."""
    documents: list[dict[str, Any]] = []
    metrics: dict[str, bool] = {}
    for name, task in _tasks(job).items():
        metrics |= {metric: bool(task.higher_is_better().get(metric, True)) for metric in task.aggregation()}
        task.build_all_requests(limit=job.get("limit"), rank=0, world_size=1)
        requests: dict[int, list[Any]] = {}
        for instance in task.instances:
            requests.setdefault(instance.doc_id, []).append(instance)
        for number, instances in requests.items():
            arguments = [instance.args for instance in instances]
            is_choice = instances[0].request_type.startswith("loglikelihood")
            documents.append(
                {
                    "task": name,
                    "id": number,
                    "split": "quality",
                    "context": str(arguments[0][0]),
                    "choices": [str(one[1]) for one in arguments] if is_choice else [],
                }
            )
        documents += [
            {"task": name, "id": number, "split": "calibration", "context": text, "choices": []}
            for number, text in enumerate(_training_texts(task))
        ]
    return {"documents": documents, "metrics": metrics}


def _training_texts(task: Any) -> list[str]:
    """Return the task's own training or validation documents with their true answers."""
    source = "training" if task.has_training_docs() else "validation" if task.has_validation_docs() else ""
    if not source or (source == "validation" and not task.has_test_docs()):
        return []
    documents = task.training_docs() if source == "training" else task.validation_docs()
    texts = []
    for document in documents:
        target = task.doc_to_target(document)
        choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else None
        if isinstance(target, int) and choices:
            target = choices[target]
        text = task.doc_to_text(document)
        texts.append(f"{text}{task.config.target_delimiter}{target}")
    return texts


def _evaluate(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of each metric by document, and the harness's own totals."""
    import lm_eval

    tasks = _tasks(job)
    wanted: dict[str, Sequence[int]] = job["documents"]
    arguments = {
        "model": job["model"],
        "base_url": f"{job['url']}/v1/completions",
        "num_concurrent": job["concurrency"],
        "max_retries": 3,
        "tokenized_requests": True,
        "tokenizer": job.get("tokenizer") or job["model"],
        "tokenizer_backend": "huggingface" if job.get("tokenizer") else "auto",
    }
    chosen = {name: list(documents) for name, documents in wanted.items() if documents}
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=[task for name, task in tasks.items() if name in chosen],
        samples=chosen,
        num_fewshot=job.get("num_fewshot"),
        apply_chat_template=bool(job.get("apply_chat_template")),
        bootstrap_iters=0,
    )
    assert results is not None
    samples = {
        name: [
            {"id": row["doc_id"], "values": {metric: row[metric] for metric in row["metrics"] if metric in row}}
            for row in rows
        ]
        for name, rows in results["samples"].items()
    }
    return {"samples": samples, "results": results["results"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
