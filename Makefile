# Every target sets itself up: all that is needed is Python 3.11 or newer, with pip and a C compiler.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help quickstart test test-all test-versions lint docs serve clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --use-pep517 --requirement requirements.txt
	touch $(READY)

quickstart: $(READY)  ## Meta-train on scikit-learn's digits and compare the heads (minutes)
	$(RUN) -m benchmarks.train --dataset digits

test: $(READY)  ## Run the test suite
	$(RUN) -m pytest

test-all: $(READY)  ## Run the test suite with its slow tests
	$(RUN) -m pytest -m ""

test-versions: $(READY)  ## Test oldest and newest versions, and each extra alone (long; 20 GB of disk)
	$(RUN) -m nox

lint: $(READY)  ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: $(READY)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

serve: $(READY)  ## Build the documentation and serve it on this machine
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve --watch convexheads

clean:  ## Remove the virtual environment and all that was built
	rm -rf $(VENV) .nox build dist site .pytest_cache .ruff_cache .hypothesis
