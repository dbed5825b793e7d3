# One command each. The first one that runs builds a virtual environment in .venv with pinned versions.

PYTHON ?= python3
PRESET ?= smoke

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install train experiments test test-slow test-extras clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## the virtual environment .venv, with pinned versions; every target below does it first

train: $(STAMP)  ## train a decoupled and a plain agent on a memory task, and print both in a table
	$(BIN)/python scripts/demo.py

experiments: $(STAMP)  ## carry out the papers' experiments; PRESET=smoke (the default), laptop or paper
	$(BIN)/python scripts/experiments.py run --preset $(PRESET)

test: $(STAMP)  ## formatter, linter, type checker, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## learning runs that take minutes
	$(BIN)/python -m pytest -m slow

test-extras: $(STAMP)  ## installs bsuite and POPGym too, then the tests that need them, which `make test` skips
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bsuite,popgym]'
	$(BIN)/python -m pytest -rs tests/envs/test_third_party.py tests/agents/test_configs.py tests/scripts/test_bsuite_score_cli.py

clean:  ## remove the virtual environment, builds and caches; results in runs/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again whenever the dependencies change. The stamp is written last, so that an interrupted install is repeated.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: found no '$(PYTHON)'; Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: found $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[agents,minigrid,dev]'
	@touch $@
