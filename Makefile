# make demo, make quick, make test, make slow, make lint, make docs, make clean. The first run builds .venv from $(PYTHON).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   ?=
WORKERS ?= auto

# To read a test and rewrite its asserts takes longer than to run it: that is kept, also where no bytecode is asked for.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: help demo quick test slow lint docs clean
.DEFAULT_GOAL := help

help:            ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY)   ## Train a small model with SUMO, SNSM and AdamW, in about 5 minutes
	$(BIN)/python -m recipes.demo $(DEMO)

quick: $(READY)  ## Run the tests of the inner loop in about a minute: nothing that compiles, trains a run or starts a process
	$(PYTEST) -q -m "not slow and not run and not compiles" -n $(WORKERS) --dist worksteal

test: $(READY)   ## Run the tests without the slow ones, in about 7 minutes on two cores
	$(PYTEST) -q -n $(WORKERS) --dist worksteal

slow: $(READY)   ## Run the slow tests alone, in about half an hour on two cores
	$(PYTEST) -q -m slow -n $(WORKERS) --dist worksteal

lint: $(READY)   ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)   ## Build the site of these docs and of the docstrings into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet --strict

clean:           ## Remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) is '$$($(PYTHON) --version 2>/dev/null)', expected Python 3.11 or newer;" \
	       "name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
