# make demo    install if needed, then build, serve, load and compare three variants of a real model
# make test    lint, types, unit tests, and end-to-end tests against a real vLLM engine
# make lock    resolve requirements/cpu.lock anew (needs uv, and UV_FIND_LINKS or UV_INDEX for torch+cpu)
# make bench-quantize  GPTQ and QuantEase against llm-compressor: seconds, memory, KL
# make bench-prune     OSSCAR against the other ways to choose neurons and KV groups: NLL, seconds, prefill speed-up
# make bench-memory    peak memory of compressing a 1.5B model
# make bench-load      every recipe on a real model, loaded by stock transformers and stock vLLM
# make bench-launch    this project's launch of vLLM against vLLM's own, alternating
# make bench-scoring   scored candidates per second: /v1/score against stock vLLM's /generative_scoring
# make bench-decode    decoding speed against stock vLLM and llama.cpp
# make bench-gateway   streams through the gateway against streams straight from the engine
# make bench-ready     seconds from the command to the first token, first and later starts
# make bench-loadtest-truth  our load generator, vLLM's and GuideLLM against a server of known latency
# make bench-loadtest-stall  whether a freeze of the server shows in p99: open loop against plain Locust
# make bench-loadtest-real   our latencies against those of vllm bench serve on the same server and arrivals
# make bench-max-rate        --find-max-rate against the analytic limit of an M/D/1 queue
# make bench-distill-cost    time, memory and FLOPs of distilling half of every sequence against the whole
# make bench-kd-memory       peak memory and time of the chunked loss against the plain one
# make bench-distill-quality AUC lost by pruning and won back by distillation, up to W8A8 behind the server
# make bench-truncation      students over the share of each trace that they read, into results/truncation
# make compare         six variants of a real model over both workloads at full size, into results/compare-latest

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   := requirements/cpu.lock
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK))
SOURCES := slimserve core workloads distill compress serve loadtest compare report benches tests

export HF_HUB_OFFLINE ?= 1

BENCHES := $(addprefix bench-,launch scoring decode gateway ready quantize prune memory load \
    loadtest-truth loadtest-stall loadtest-real max-rate \
    distill-cost kd-memory distill-quality truncation)

# What a variant must keep at half of the dense model's capacity to be named the one to ship.
OBJECTIVES := --slo recommendation:e2e_p95=1.5s --slo reasoning:ttft_p95=500ms --slo reasoning:itl_p95=100ms

.PHONY: demo compare test install lock lint types unit clean $(BENCHES)

demo: install
	$(BIN)/slimserve compare --model smollm2-135m-instruct --recipes dense,w8a8,prune25-w8a8 \
	    --workloads recommendation,reasoning --quick $(OBJECTIVES)

compare: install
	$(BIN)/slimserve compare --model smollm2-135m-instruct --recipes dense,w8a8,w4a16,nf4,prune25,prune25-w8a8 \
	    --workloads recommendation,reasoning $(OBJECTIVES) -o results/compare-latest

test: install lint types unit

lint:
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/hadolint Dockerfile

types:
	$(BIN)/mypy

# Two at a time where no test watches a clock.
unit: $(VENV)/.test-system
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(addprefix tests/,compare distill compress core workloads report) tests/test_*.py
	$(BIN)/pytest $(addprefix tests/,serve loadtest deploy)

$(BENCHES): bench-%: install
	$(BIN)/python -m benches.$(subst -,_,$*)

# A stamp per environment: a second `make install` has nothing to do.
install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@sh requirements/install.sh $(PYTHON) $(VENV) $(LOCK) $(TORCH)
	@touch $@

# The browser in which a test opens the report, and the Prometheus that scrapes a server and checks its own rules.
$(VENV)/.test-system: $(VENV)/.installed
	@sh requirements/system.sh chromium chromium "the test that opens the report in a browser"
	@sh requirements/system.sh promtool prometheus "the tests of deploy/"
	@touch $@

lock:
	uv pip compile pyproject.toml --extra cpu --extra data --extra dev --overrides requirements/overrides.txt \
	    --python-version 3.11 --no-annotate --no-header --output-file $(LOCK)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
