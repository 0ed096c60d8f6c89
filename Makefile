# `make demo` shows the whole pipeline; `make test` checks everything; `make test-lowest` runs the main job with the
# lowest versions that pyproject.toml declares. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
PACKAGES := api schema model collector analyzer apply cli
SOURCES := $(foreach package,$(PACKAGES),$(wildcard $(package)/*.py $(package)/*.sql $(package)/*.cu $(package)/*.cuh))

.PHONY: demo test test-lowest lint types unit benchmark clean
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

# The lowest versions that pyproject.toml declares; torch as above, lower ones have no CPU build under the plain name.
$(LOWEST)/.requirements: constraints.txt pyproject.toml tests/lowest_versions.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check -r $(LOWEST)/requirements.txt
	touch $@

$(LOWEST)/.installed: $(LOWEST)/.requirements $(SOURCES)
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
	touch $@

test-lowest: $(LOWEST)/.installed
	PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" bash tests/main_job.sh

benchmark: $(VENV)/.installed
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(LOWEST) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
