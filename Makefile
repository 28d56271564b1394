# Needs Python >= 3.11 with venv and pip, and make; no compiler. Everything lives in .venv.
#   make demo PYTHON=python3.12      another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo      the small CPU build of PyTorch

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NAME   ?= overhead
ARGS   ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test slow smoke lint format docs picture bench clean
.DEFAULT_GOAL := help

help:            ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the tested versions (skipped when up to date)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; Bitsmith needs 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: $(READY)   ## the main job on real data: digits, float model to verified low-bit model and report
	$(BIN)/bitsmith run $(ARGS)

test: $(READY)   ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(ARGS)

slow: $(READY)   ## the slow tests
	$(BIN)/python -m pytest -q -m slow $(ARGS)

smoke: $(READY)  ## the five-second test that runs before every commit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x tests/architecture/test_one_weight.py tests/architecture/test_house_rules.py

lint: $(READY)   ## format, rules, types and floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(READY) ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)   ## rewrite the generated pages
	$(BIN)/python docs/generate.py

picture: $(READY)  ## docs/images/report.png anew, from a default run; needs Chromium
	$(BIN)/python docs/picture.py

bench: $(READY)  ## one benchmark: make bench NAME=accuracy|budget_search|cifar10|fractional|output_approximation|overhead|search_step
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:           ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
