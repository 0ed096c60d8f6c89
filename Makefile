# `make demo` installs what a user needs and shows the whole pipeline; `make test` adds the test tools and checks
# everything; `make test-lowest` runs the main job with the lowest versions that pyproject.toml declares, in an
# environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
PACKAGES := api schema model collector analyzer apply report cli
SOURCES := $(foreach package,$(PACKAGES),$(shell find $(package) -name "*.py" -o -name "*.sql" -o -name "*.html" -o -name "*.css" -o -name "*.js" -o -name "*.json" -o -name "*.cu" -o -name "*.cuh"))
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PIP := -m pip install --disable-pip-version-check --progress-bar off
# Of all that pip says, the large files as they arrive and the end.
BRIEFLY := | awk '/(Downloading|Using cached) .*[0-9] MB\)/ { print "  " $$1, $$(NF-2), $$(NF-1), $$NF; fflush() } /^Successfully/ { print "  done"; fflush() }'

.PHONY: demo test test-lowest lint types unit benchmark clean
.DEFAULT_GOAL := test

$(BIN)/python:
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first: its pinned version has a CPU build, the plain name would pull CUDA.
$(VENV)/.requirements: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing torch"
	@$(BIN)/python $(PIP) -c constraints.txt torch setuptools $(BRIEFLY)
	@echo "installing quambase and the rest of what it needs"
	@$(BIN)/python $(PIP) -c constraints.txt . $(BRIEFLY)
	@rm -rf build
	@touch $@

$(VENV)/.test-requirements: $(VENV)/.requirements
	@echo "installing the test tools"
	@$(BIN)/python $(PIP) -c constraints.txt '.[test]' $(BRIEFLY)
	@rm -rf build
	@touch $@

# Installed as a user would have it, not editable: the checkers and the tests see what we ship.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	@$(BIN)/python $(PIP) -q --no-deps --no-build-isolation --force-reinstall .
	@rm -rf build
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/quambase demo

test: lint types unit

lint: $(VENV)/.test-requirements $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test-requirements $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

unit: $(VENV)/.test-requirements $(VENV)/.installed
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The lowest versions that pyproject.toml declares; torch as above, lower ones have no CPU build under the plain name.
$(LOWEST)/.requirements: constraints.txt pyproject.toml tests/lowest_versions.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python $(PIP) -q -c constraints.txt torch setuptools
	$(LOWEST)/bin/python $(PIP) -q -r $(LOWEST)/requirements.txt
	touch $@

$(LOWEST)/.installed: $(LOWEST)/.requirements $(SOURCES)
	$(LOWEST)/bin/python $(PIP) -q --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
	touch $@

test-lowest: $(LOWEST)/.installed
	PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" bash tests/main_job.sh

benchmark: $(VENV)/.test-requirements $(VENV)/.installed
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(LOWEST) build demo quambase-demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
