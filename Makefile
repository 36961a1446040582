# make quickstart   fine-tune a real model, from nothing
# make coverage-models  build, capture and train every architecture of transformers, tiny
# make test         test everything that is fast; test-all: the slow tests too
# make bench        training steps beside PEFT's and transformers', about 30 minutes
# Both make .venv and install into it first. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
# Processes that run tests, a file at a time; each takes about 2 GiB.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
LINKED := build/linked
PARTS := passes recipes export configs

# A second quickstart goes beside the first: a run never overwrites another.
RUN ?= runs/quickstart$(if $(wildcard runs/quickstart),-$(shell date +%Y%m%d-%H%M%S))

.PHONY: quickstart test test-all lint format clean coverage-models bench
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/graphtune train configs/quickstart.yaml output_dir=$(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev $(LINKED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=$(LINKED) $(BIN)/mypy -p graphtune
	cd $(LINKED) && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/training_step.py --batch 4 --length 256
	$(BIN)/python benchmarks/training_step.py --batch 1 --length 1024

coverage-models: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage_models --document docs/coverage.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps are older than pyproject.toml when the dependencies may have changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[executorch]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# mypy and import-linter read folders, not setuptools' map of them: they get the package as it
# is once installed, made of links.
.PHONY: $(LINKED)
$(LINKED):
	rm -rf $@ && mkdir -p $@/graphtune
	ln -s $(CURDIR)/graphtune/* $(addprefix $(CURDIR)/,$(PARTS)) $@/graphtune/
