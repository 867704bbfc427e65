"""Quantize one model with llm-compressor's GPTQ, for `make bench-quantize`. The script runs in its own environment.

    python llmcompressor_gptq.py MODEL TOKENS.jsonl OUTPUT {w4a16,w8a8} GROUP_SIZE

It follows llm-compressor's examples (`examples/quantization_w4a16`, `…_w8a8_int8`). All settings are defaults, except
the scheme and the calibration tokens. The last line of output is one JSON object.
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
    """Return the scheme `w4a16` or `w8a8`, both symmetric.

    `w4a16` has INT4 weights in groups. `w8a8` has INT8 weights per channel and dynamic INT8 activations per token.
    """
    integers = {"type": "int", "symmetric": True}
    if name == "w4a16":
        weights = integers | {"num_bits": 4, "strategy": "group", "group_size": group_size}
        return {"targets": ["Linear"], "weights": weights}
    weights = integers | {"num_bits": 8, "strategy": "channel"}
    activations = integers | {"num_bits": 8, "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations}


if __name__ == "__main__":
    main()
