# Every target creates its own environment. It needs only Python 3.11 or newer, with pip.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
# The development environment has everything. The others have what their target needs, and are much smaller.
DEV := .venv
CORE := .venv-core
BUILD := .venv-build
QUICKSTART := .venv-quickstart
RUN := $(DEV)/$(BIN)/python
RUN_CORE := $(CORE)/$(BIN)/python
# One process per processor, at most four: each needs a gigabyte.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help quickstart install test-core test test-all test-versions test-installs mutations bench-core lint docs docs-check serve docs-deploy build release-notes clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Make an environment and install requirements: $(call install,FOLDER,REQUIREMENTS). A new pip takes half as long to find
# the versions. Python compiles a module when it is first imported; compiling all of them takes pip another minute.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Expected Python 3.11 or newer, got $$($(PYTHON) --version). Choose one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/$(BIN)/python -m pip install --quiet --upgrade pip
	$(1)/$(BIN)/python -m pip install --no-compile $(2)
	@touch $(1)/.ready
endef

$(DEV)/.ready: pyproject.toml requirements.txt
	$(call install,$(DEV),--use-pep517 --requirement requirements.txt)

$(CORE)/.ready: pyproject.toml
	$(call install,$(CORE),--editable '.[test]')

$(BUILD)/.ready:
	$(call install,$(BUILD),'build>=1.2' 'twine>=6.1')

$(QUICKSTART)/.ready: pyproject.toml
	@echo "Installing PyTorch, Numba, matplotlib and this library into $(QUICKSTART): about 6.5 GB, once."
	$(call install,$(QUICKSTART),--editable '.[quickstart]')

quickstart: $(QUICKSTART)/.ready  ## Learn to read unseen alphabets: a table and two pictures (two minutes)
	$(QUICKSTART)/$(BIN)/python -m benchmarks.quickstart

install: $(DEV)/.ready  ## Install everything for development into .venv

test-core test-all: export CONVEXHEADS_CHECK_SHAPES = everywhere

test-core: $(CORE)/.ready  ## Run the unit tests in an environment without optional packages (a minute)
	$(RUN_CORE) $(PYTEST) tests/unit

test: $(DEV)/.ready  ## Run the test suite, as before a pull request (minutes)
	$(RUN) $(PYTEST)

test-all: $(DEV)/.ready mutations  ## Run everything: slow tests, fuzzing, mutations, all versions (hours; 20 GB of disk)
	$(RUN) $(PYTEST) -m "" --hypothesis-profile nightly
	$(RUN) -m nox

mutations: $(CORE)/.ready  ## Break the library in small ways, each of which the unit tests have to detect (minutes)
	$(RUN_CORE) tests/mutations.py

bench-core: $(DEV)/.ready  ## Measure the speed of ridge and SVM; BASE=<revision> compares with that revision (minutes)
	$(RUN) -m benchmarks.core_speed $(if $(BASE),--against $(BASE))

test-versions: $(DEV)/.ready  ## Test the oldest and the newest versions, and each extra alone (long; 20 GB of disk)
	$(RUN) -m nox

test-installs: $(DEV)/.ready  ## Try every documented install line in a new environment (long; 7 GB of disk)
	$(RUN) -m nox --session pip

lint: $(DEV)/.ready  ## Check style, types, spelling and the workflows
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(DEV)/$(BIN)/codespell
	$(RUN) tests/docs/wording.py
	$(DEV)/$(BIN)/jactionlint --shellcheck=$(DEV)/$(BIN)/shellcheck
	$(DEV)/$(BIN)/zizmor --quiet --offline --persona auditor .

docs docs-check serve: export NO_MKDOCS_2_WARNING = 1

docs: $(DEV)/.ready  ## Build the documentation into site/
	$(RUN) -m mkdocs build --strict

docs-check: $(DEV)/.ready  ## Check the links of the documentation, and its pages in a browser
	$(RUN) -m pytest tests/docs -m site

serve: $(DEV)/.ready  ## Build the documentation and serve it on this machine
	$(RUN) -m mkdocs serve --watch convexheads

# The version of the release, which is stated only in the package.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' convexheads/__init__.py)
DOCS ?= dev
MIKE := PATH="$(CURDIR)/$(DEV)/$(BIN):$$PATH" DOCS_VERSIONS=mike NO_MKDOCS_2_WARNING=1 mike

# The first page of the site belongs to the newest release, or to `dev` if there is no release yet.
docs-deploy: $(DEV)/.ready  ## Commit the documentation to the branch gh-pages; DOCS=dev or DOCS=release
ifeq ($(DOCS),release)
	$(MIKE) deploy --update-aliases $(basename $(VERSION)) latest
	$(MIKE) set-default latest
else
	$(MIKE) deploy dev
	git cat-file -e gh-pages:index.html 2>/dev/null || $(MIKE) set-default dev
endif

build: $(BUILD)/.ready  ## Build the source distribution and the wheel into dist/, and check them
	rm -rf dist
	$(BUILD)/$(BIN)/python -m build
	$(BUILD)/$(BIN)/python -m twine check --strict dist/*

release-notes:  ## Write the changelog of this version to build/release-notes.md; TAG, if set, must match it
	@test "$${TAG:-v$(VERSION)}" = "v$(VERSION)" || { echo "expected the tag v$(VERSION), got $$TAG"; exit 1; }
	@mkdir -p build
	@awk '/^## / { within = ($$2 == "[$(VERSION)]"); next } within' CHANGELOG.md > build/release-notes.md
	@grep -q . build/release-notes.md || { echo "expected a section [$(VERSION)] in CHANGELOG.md"; exit 1; }

clean:  ## Remove the environments and everything that was built
	rm -rf .venv .venv-* .nox .cache build dist site .pytest_cache .ruff_cache .hypothesis
