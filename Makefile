# `make demo` shows the whole pipeline; `make test` checks everything. Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := schema model collector analyzer apply cli
SOURCES := $(foreach package,$(PACKAGES),$(wildcard $(package)/*.py $(package)/*.sql $(package)/*.cu $(package)/*.cuh))

.PHONY: demo test lint types unit benchmark clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: its pinned version has a CPU build, the plain name would pull CUDA.
$(VENV)/.requirements: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt '.[test]'
	touch $@

# Installed as a user would have it, not editable: the checkers and the tests see what we ship.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
	touch $@

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/demo.sh

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/pytest

benchmark: $(VENV)/.installed
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
