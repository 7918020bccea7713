# Everything a person or CI does here; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
BACKBONE ?=
CONFIG ?=
OUTPUT ?= output
ARGS ?=
JOBS ?= 2
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test lint format compile generate check-generated clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: $(READY)  ## make .venv with everything that was tested together

# Touched only at the end, so that an interrupted set-up is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kubegraft needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say PYTHON=python3.12, for example." >&2; exit 1; }
	@echo "Setting up $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,kfp,s3,dev]'
	@touch $@

run: $(READY)  ## run the whole pipeline: make run [DATA=folder] [BACKBONE=name] [CONFIG=file.yaml] [OUTPUT=folder] [ARGS="--flag ..."]
	@$(BIN)/kubegraft run $(if $(DATA),"$(DATA)") $(if $(BACKBONE),--backbone "$(BACKBONE)") \
	  $(if $(CONFIG),--config "$(CONFIG)") --output "$(OUTPUT)" $(ARGS)

test: $(READY)  ## run all tests that need no network, Docker or GPU
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)  ## check style, types and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)  ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

compile: $(READY)  ## write pipelines/compiled/*.yaml
	@$(BIN)/python pipelines/compile.py

generate: compile  ## regenerate every generated file

check-generated: $(READY)  ## fail if a generated file differs from its source
	@$(BIN)/python pipelines/compile.py --check

clean:  ## remove .venv and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
