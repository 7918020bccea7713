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
REGISTRY ?= $(or $(KUBEGRAFT_REGISTRY),ghcr.io/kubegraft)
TAG ?= $(shell $(PYTHON) docker/tag)
TARGETS ?= cpu
DOCKER ?= docker
DOCKER_FLAGS ?=
CHECKOV := $(VENV)-checkov

.DEFAULT_GOAL := help
.PHONY: help setup run benchmark test storm test-manifests e2e lint format compile generate check-generated requirements images images-push clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: $(READY)  ## make .venv with everything that was tested together

# Touched only at the end, so that an interrupted set-up is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kubegraft needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say PYTHON=python3.12, for example." >&2; exit 1; }
	@echo "Setting up $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,kfp,s3,operator,dev]'
	@touch $@

run: $(READY)  ## run the whole pipeline: make run [DATA=folder] [BACKBONE=name] [CONFIG=file.yaml] [OUTPUT=folder] [ARGS="--flag ..."]
	@$(BIN)/kubegraft run $(if $(DATA),"$(DATA)") $(if $(BACKBONE),--backbone "$(BACKBONE)") \
	  $(if $(CONFIG),--config "$(CONFIG)") --output "$(OUTPUT)" $(ARGS)

benchmark: $(READY)  ## compare with plain Keras and scikit-learn on idle cores, write docs/benchmarks.md: make benchmark DATA=folder
	@$(BIN)/python -m benchmarks $(if $(DATA),"$(DATA)") --large $(ARGS)

# Without --max-worker-restart 0 pytest-xdist would wait for ever after a crash of a worker, which takes its files with
# it. Files in their own order: else those with few tests, which are the slow ones, would come last, one at a time.
# Huge pages as in the images: TensorFlow's processes are young, and fresh memory is what takes them longest.
test: $(READY)  ## run all tests that need no network, Docker or GPU
	@GLIBC_TUNABLES="$${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}" $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

storm: $(READY)  ## eight processes on one feature cache, killed at random for two minutes
	@KUBEGRAFT_STORM_SECONDS=120 $(BIN)/python -m pytest tests/unit/test_cache_storm.py -s $(ARGS)

test-manifests: $(READY) $(CHECKOV)/.ready  ## check manifests/ with kustomize, schemas and checkov
	@KUBEGRAFT_REQUIRE=kustomize,checkov PATH="$(abspath $(CHECKOV))/bin:$$PATH" $(BIN)/python -m pytest tests/manifests $(ARGS)

# In an environment of its own: it pins other versions of boto3 than kubegraft.
$(CHECKOV)/.ready: tests/manifests/requirements-checkov.txt
	@$(PYTHON) -m venv --clear $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

e2e: $(READY)  ## run the tests that need a cluster (of the current KUBECONFIG) and Docker
	@$(BIN)/python -m pytest tests/e2e -m e2e $(ARGS)

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
	@$(BIN)/python -m kubegraft.controller.crd

check-generated: $(READY)  ## fail if a generated file differs from its source
	@$(BIN)/python pipelines/compile.py --check
	@$(BIN)/python -m kubegraft.controller.crd --check

requirements: $(READY)  ## write docker/requirements-*.txt from pyproject.toml and constraints.txt
	@$(BIN)/python docker/requirements.py

images:  ## build the images: make images [TARGETS="cpu gpu operator"] [REGISTRY=...] [TAG=...] [DOCKER_FLAGS="--network host"]
	@for target in $(TARGETS); do $(DOCKER_IMAGE); \
	  if $(DOCKER) image inspect "$$image" >/dev/null 2>&1; then echo "$$image is there already"; continue; fi; \
	  $(DOCKER) build $(DOCKER_FLAGS) --file "docker/$$file.Dockerfile" --target "$$target" --build-arg IMAGE_VERSION="$(TAG)" --tag "$$image" . || exit 1; \
	  echo "$$image"; done

images-push:  ## push what `make images` built; a tag that the registry has is left as it is
	@for target in $(TARGETS); do $(DOCKER_IMAGE); \
	  if $(DOCKER) manifest inspect "$$image" >/dev/null 2>&1 || $(DOCKER) manifest inspect --insecure "$$image" >/dev/null 2>&1; then echo "$$image is in the registry already; a tag never moves"; continue; fi; \
	  $(DOCKER) push "$$image" || exit 1; done

# The name of the image of $$target, in a recipe.
define DOCKER_IMAGE
case "$$target" in cpu) name=train; file=train;; operator) name=operator; file=operator;; *) name="train-$$target"; file=train;; esac; image="$(REGISTRY)/kubegraft-$$name:$(TAG)"
endef

clean:  ## remove .venv and caches
	@rm -rf $(VENV) $(CHECKOV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
