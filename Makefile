# SPDX-License-Identifier: Apache-2.0
# Needs python3 (3.11 or newer, with venv), git, make. Every target makes its own environment in .venv
# once; a stamp per set of packages keeps it from being done again until setup.cfg changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles what is imported, which is far less than what is installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# two processes; a file stays in one, so that its compilations are shared
PYTEST_ARGS ?= -n 2 --dist loadfile
RUFF_PATHS := $(wildcard jaxdec pallas_kernels tests experiments notebooks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-aot lint format bench notebooks clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('jaxdec needs Python 3.11 or newer, this is ' + sys.version.split()[0] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) -e ".[dev,data]"
	@touch $@ $(VENV)/.base

$(VENV)/.compare: setup.cfg pyproject.toml $(VENV)/.dev
	$(PIP) -e ".[compare]"
	@touch $@

$(VENV)/.aot: setup.cfg pyproject.toml $(VENV)/.dev
	$(PIP) -e ".[aot]"
	@touch $@

demo: $(VENV)/.base ## the whole story on this machine, in minutes
	$(BIN)/jaxdec demo

test: $(VENV)/.dev ## the test suite, its programs compiled without optimisation
	$(BIN)/python -m pytest $(PYTEST_ARGS) --quick

test-slow: $(VENV)/.dev ## larger matrices, compiled as users do: drafters that learn, many devices and processes
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

test-aot: $(VENV)/.aot ## kernels for every TPU generation and steps for TPU slices, without a TPU
	$(BIN)/python -m pytest $(PYTEST_ARGS) --dist load -m aot tests

lint: $(VENV)/.dev ## ruff, check only
	$(BIN)/ruff check $(RUFF_PATHS)
	$(BIN)/ruff format --check $(RUFF_PATHS)

format: $(VENV)/.dev ## ruff, rewriting files
	$(BIN)/ruff check --fix $(RUFF_PATHS)
	$(BIN)/ruff format $(RUFF_PATHS)

bench: $(VENV)/.compare ## the committed benchmark, side by side with transformers
	$(BIN)/python experiments/bench/run.py
	$(BIN)/python experiments/bench/against_transformers.py
	$(BIN)/python experiments/bench/parity.py

notebooks: $(VENV)/.dev ## rebuild every .ipynb from its percent script and execute it
	for script in notebooks/*.py; do \
	  $(BIN)/jupytext --to ipynb --execute $$script || exit 1; done

clean: ## remove caches, not the environment and not any run
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
