# `make help` prints the commands; each line "target: … ## text" is one of them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   := requirements/cpu.lock
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK))
SOURCES := slimserve core workloads distill compress serve loadtest compare report benches examples tests

export HF_HUB_OFFLINE ?= 1

BENCHES := $(addprefix bench-,verdict launch scoring decode gateway ready quantize formats calibration first-tokens \
    prune memory load families loadtest-truth loadtest-stall loadtest-real max-rate \
    distill-cost kd-memory distill-quality ranker-kd recovery truncation catalogue catalogue-size warm gpu)

# SLOs that the winner must meet at half of the dense model's capacity.
OBJECTIVES := --slo recommendation:e2e_p95=1.5s --slo reasoning:ttft_p95=500ms --slo reasoning:itl_p95=100ms

.PHONY: help image-check demo compare test install lock lint types unit clean $(BENCHES)

demo: install ## Compare four variants of SmolLM2: build, serve, evaluate, load (15 minutes with AMX, an hour with AVX2)
	$(BIN)/slimserve compare --model smollm2-135m-tuned --recipes dense,w8a8,prune25-w8a8,prune50 \
	    --workloads recommendation,reasoning --quick $(OBJECTIVES)

compare: install ## Compare six variants at full size, into results/compare-latest (an hour)
	$(BIN)/slimserve compare --model smollm2-135m-tuned --recipes dense,w8a8,w4a16,nf4,prune25,prune25-w8a8 \
	    --workloads recommendation,reasoning $(OBJECTIVES) -o results/compare-latest

test: install lint types unit ## Run lint, types, unit tests, and end-to-end tests on a real vLLM engine

lint: ## Check style with ruff and the Dockerfile with hadolint
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/hadolint Dockerfile

types: ## Check types with mypy
	$(BIN)/mypy

# Two processes run the tests without tight limits of time, the longest files first; the others run alone.
TIMED := $(addprefix tests/,test_cli.py serve/engine/test_entry.py serve/engine/test_plugin.py)
UNTIMED := $(filter-out $(TIMED),$(addprefix tests/,compare distill benches compress core workloads report) \
    $(addprefix tests/serve/,launch test_item_tokens.py test_own_workloads.py test_tools.py test_vllm.py) \
    $(sort $(wildcard tests/serve/engine/test_*.py tests/test_*.py)))
unit: $(VENV)/.test-system
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(UNTIMED)
	$(BIN)/pytest $(addprefix --ignore ,$(UNTIMED)) tests/test_cli.py $(addprefix tests/,serve loadtest deploy)

# bench-quantize: ## Compare GPTQ and QuantEase with llm-compressor: seconds, memory, KL
# bench-formats: ## Measure the KL and the bytes of every quantization format
# bench-calibration: ## Compare calibration sources on three tasks
# bench-first-tokens: ## Find out what breaks the attention sink of pruned models
# bench-prune: ## Compare OSSCAR with other pruning methods: NLL, seconds, prefill speed
# bench-memory: ## Measure peak memory of compressing a 1.5B model
# bench-load: ## Build every recipe; load it with stock transformers and vLLM
# bench-families: ## Ask stock vLLM whether it computes what torch does for every model family
# bench-verdict: ## Measure the error rates of the decision rule on simulated answers
# bench-launch: ## Compare the tuned launch of vLLM with the stock launch and with vLLM's own advice
# bench-scoring: ## Compare /v1/score with stock /generative_scoring, default and tuned: items per second
# bench-decode: ## Compare decoding speed with stock vLLM, default and tuned, and with llama-bench
# bench-gateway: ## Measure what the gateway costs against the engine alone and other proxies
# bench-ready: ## Measure seconds from the command to the first token
# bench-loadtest-truth: ## Compare load generators on a mock server of known latency
# bench-loadtest-stall: ## Show a freeze of the server in the p99 of open and closed loop
# bench-loadtest-real: ## Compare our latencies with those of vllm bench serve on one server
# bench-max-rate: ## Compare --find-max-rate with the exact limit of an M/D/1 queue
# bench-distill-cost: ## Measure training on half of each sequence: time, memory, FLOPs
# bench-kd-memory: ## Compare the chunked loss with the plain loss: memory and time
# bench-distill-quality: ## Measure how much of the AUC lost by pruning distillation recovers
# bench-ranker-kd: ## Compare ways to distill a ranker: hard labels, soft labels, both, lists, two teachers
# bench-recovery: ## Measure how much of the accuracy lost by pruning distillation recovers, on long chains of thought
# bench-truncation: ## Compare students of parts of reasoning traces, and of other losses and data
# bench-catalogue: ## Compare item tokens with texts: quality, items per second, bytes
# bench-catalogue-size: ## Measure a catalogue of a million items: load time, memory, items per second
# bench-warm: ## Measure how much sooner scores arrive after a warm call
# bench-gpu: ## Measure compression and distillation on a GPU; a dry run with tiny models without one
$(BENCHES): bench-%: install
	$(BIN)/python -m benches.$(subst -,_,$*)

# The stamp file makes a second `make install` do nothing.
install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@sh requirements/install.sh $(PYTHON) $(VENV) $(LOCK) $(TORCH)
	@touch $@

# Tests open the report in Chromium, and check the deployment files with Prometheus.
$(VENV)/.test-system: $(VENV)/.installed
	@sh requirements/system.sh chromium chromium "the test that opens the report in a browser"
	@sh requirements/system.sh nginx nginx-light "the tests of the API behind a reverse proxy"
	@sh requirements/system.sh promtool prometheus "the tests of deploy/"
	@touch $@

image-check: ## Build the container image without Docker, start it, and send it requests (root, Debian; a quarter of an hour)
	@sh deploy/image-check.sh

help: ## Print this list
	@sed -n 's/^#* *\([a-z][a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name text; do printf '%-22s %s\n' "$$name" "$$text"; done

lock: ## Resolve requirements/cpu.lock again (needs uv, and UV_FIND_LINKS or UV_INDEX for torch+cpu)
	uv pip compile pyproject.toml --extra cpu --extra data --extra eval --extra dev --overrides requirements/overrides.txt \
	    --python-version 3.11 --no-annotate --no-header --output-file $(LOCK)

clean: ## Delete the environment and all caches in this folder
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
