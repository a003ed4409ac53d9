# make help lists the targets. Each makes the environment first, where it is not there yet.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/nano-digits-demo-seed0

.PHONY: help train test test-slow test-slurm bench-cpu bench-gpu check format clean
.DEFAULT_GOAL := help

help: ## print this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

train: $(READY) ## train a small EfficientNet on the embedded digits, and evaluate it
	$(BIN)/effnet-train recipe=demo
	$(BIN)/effnet-eval checkpoint=$(DEMO)
	$(BIN)/effnet-plot curves 'runs=[$(DEMO)]' output=$(DEMO)/curve.png
	@echo
	@echo "checkpoint   $(DEMO)/best.pt"
	@echo "curves       $(DEMO)/curve.png, or: $(BIN)/tensorboard --logdir $(DEMO)"

test: $(READY) ## pass the fast tests
	$(BIN)/python -m pytest -q -n auto

test-slow: $(READY) ## pass the tests that take minutes
	$(BIN)/python -m pytest -q -n auto -m 'slow and not gpu'

test-slurm: $(READY) ## pass those of a real SLURM of two nodes: apt-get install slurm-wlm munge; as root
	@command -v slurmctld >/dev/null || PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || { echo "SLURM is not here: apt-get install slurm-wlm munge"; exit 1; }
	$(BIN)/python -m pytest -q -m slow tests/e2e/test_slurm.py

bench-cpu: $(READY) ## measure speed on an idle CPU beside timm and torchvision, 12 minutes; write docs/performance.md
	PYTHON=$(BIN)/python sh benchmarks/cpu.sh $(NAME)
	$(BIN)/python benchmarks/performance_tables.py

# Without an environment of its own where there is none: such a machine may have torch and no network.
bench-gpu: ## check the kernels on a GPU, measure beside timm and torchvision, train a little; 8 minutes
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) sh benchmarks/gpu.sh

check: $(READY) ## format, lint, types, import layers
	$(BIN)/ruff format --check effnet_train tests
	$(BIN)/ruff check effnet_train tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code
	$(BIN)/ruff format effnet_train tests
	$(BIN)/ruff check --fix effnet_train tests

clean: ## remove the environment and what tools left; runs/ and data/ stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
