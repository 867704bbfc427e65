"""llm-compressor's GPTQ of one model, for `make bench-quantize`; runs in its own environment.

    python llmcompressor_gptq.py MODEL TOKENS.jsonl OUTPUT {w4a16,w8a8} GROUP_SIZE

Follows the project's examples (`examples/quantization_w4a16`, `…_w8a8_int8`), every setting
at its default but the scheme, on the given token ids. Last line of output: one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    model_directory, tokens_file, output, scheme_name, group_size = sys.argv[1:]
    start = time.perf_counter()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    rows = [json.loads(line)["input_ids"] for line in Path(tokens_file).read_text(encoding="utf-8").splitlines()]
    samples = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    core_start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=samples,
        recipe=GPTQModifier(config_groups={"group_0": _scheme(scheme_name, int(group_size))}, ignore=["lm_head"]),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    core_s = time.perf_counter() - core_start
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    print(json.dumps({"import_s": imported - start, "core_s": core_s}))


def _scheme(name: str, group_size: int) -> dict[str, Any]:
    """Symmetric INT4 weights in groups, or INT8 weights per channel with dynamic INT8 activations per token."""
    integers = {"type": "int", "symmetric": True}
    if name == "w4a16":
        weights = integers | {"num_bits": 4, "strategy": "group", "group_size": group_size}
        return {"targets": ["Linear"], "weights": weights}
    weights = integers | {"num_bits": 8, "strategy": "channel"}
    activations = integers | {"num_bits": 8, "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations}


if __name__ == "__main__":
    main()
