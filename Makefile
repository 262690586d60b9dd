PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.installed-plots  ## train, quantize, measure and report, on real images of digits
	$(BIN)/optcore train experiment=demo

test: $(VENV)/.installed-test  ## run the tests
	OMP_NUM_THREADS=1 timeout -s KILL 3000 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup --durations 25

lint: $(VENV)/.installed-test  ## ruff, mypy, import rules, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PIP) check

format: $(VENV)/.installed-test  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench  ## run the benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quantization.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quantization_aware_training.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pruning.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sentence_embeddings.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/low_rank.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fusion_and_precision.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/profiling.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/search.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/nas_tables.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/nas_latency.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/nas_proxies.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/continual.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/executor.py overhead
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/executor.py scaling --rounds 3 --jobs 40
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/executor.py loss --rounds 3

clean:  ## remove the environment
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: asked for together with others, pip may weigh several builds of it.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@
