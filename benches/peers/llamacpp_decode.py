"""Measure the single-stream decoding speed of llama.cpp. The script runs in llama-cpp-python's own environment.

    llamacpp_decode.py GGUF NUM_THREADS OUTPUT_TOKENS NUM_REPEATS

The last line of output is {"tokens_per_s": MEDIAN}.
"""

import json
import random
import statistics
import sys
import time

from llama_cpp import Llama


def main() -> None:
    gguf, threads, output_tokens, repeats = sys.argv[1], *map(int, sys.argv[2:])
    model = Llama(gguf, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    rates = []
    for _ in range(repeats + 1):
        model.reset()
        model.eval(random.choices(range(100, 49_000), k=32))
        start = time.perf_counter()
        for _ in range(output_tokens):
            model.eval([model.sample(temp=0.0)])
        rates.append(output_tokens / (time.perf_counter() - start))
    print(json.dumps({"tokens_per_s": statistics.median(rates[1:])}))


if __name__ == "__main__":
    main()
