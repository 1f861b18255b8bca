# `make train` and `make test` work from a bare checkout with Python 3.11 or newer; everything goes into .venv.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-stamp
DEV := $(VENV)/.dev-stamp
# One thread for each test worker; two would only wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: train test lint format types imports docs clean
.DEFAULT_GOAL := train

train: $(CORE) ## Set up, then adapt the shipped model to a shipped style; ARGS="--data my-pictures" for your own.
	$(BIN)/fallow train $(ARGS)

test: $(DEV) ## Set up, then run the tests; ARGS="tests/core -x" for some of them.
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	$(BIN)/lint-imports

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove what tools have written; .venv and runs/ stay.
	rm -rf site build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find src tests scripts docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Fallow needs Python 3.11 or newer; give one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: it is by far the largest, and pip then need not weigh other versions of it.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

$(DEV): $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,lint,docs,metrics,ray,optimizers,quantized]" -c constraints.txt
	@touch $@
