SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OPACUS ?= opacus==1.6.0
PROTOS := $(wildcard protos/wardround/*/v1/*.proto)
export PYTHONPATH := $(CURDIR)
export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo test test-all lint proto bench e2e-kubernetes images charts clean

help: ## what can be made (this list)
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 22

setup: $(VENV)/.ready proto ## make .venv with everything (TORCH_INDEX_URL=… picks a torch build)

$(VENV)/.ready: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -z "$(TORCH_INDEX_URL)" ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "Installing PyTorch from your package index. On Linux that is usually the CUDA build: 2 to 5 GB."; \
	  echo "For the small CPU build stop here and set TORCH_INDEX_URL to PyTorch's own CPU index, as pytorch.org shows it."; fi
	$(BIN)/pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/pip install -q $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) "$(TORCHVISION)" "$(OPACUS)"
	$(BIN)/pip install -q -e '.[all,dev]'
	@touch $@

proto: wardround/.proto ## compile protos/ into the wardround package (git-ignored)

wardround/.proto: $(PROTOS) $(VENV)/.ready
	@echo Compiling protos
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)
	@for d in wardround/*/v1; do touch $$d/__init__.py $$d/../__init__.py; done
	@touch $@

lint: setup ## ruff, mypy --strict, import contracts, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

test: setup ## the default tests (under 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow"

test-all: setup ## every test, the long ones too
	$(BIN)/python -m pytest

demo: setup ## a whole federation on this machine (DATA=DIR for real images, ARGS="--rounds 3")
	@$(BIN)/wardround demo --output build/demo $(if $(DATA),--data $(DATA)) $(ARGS)
	@$(BIN)/wardround verify build/demo

bench: bench-secagg bench-round bench-noise bench-shared bench-simulate ## all measured figures

bench-%: setup ## one of them: bench-secagg, bench-round, bench-noise, bench-shared, bench-simulate
	$(BIN)/python bench/$(subst -,_,$*).py

e2e-kubernetes: setup ## a consortium's whole life on the cluster that KUBECONFIG points to (after `make images`)
	$(BIN)/python -m pytest -m kubernetes -k test_the_whole_life tests/e2e/kubernetes -s

images: ## container images with docker, podman or buildah (ARGS="--flavour cuda hospital-node"; TORCH_INDEX_URL=…, BASE_IMAGE=…)
	@$(PYTHON) deploy/images/build.py $(ARGS)

charts: setup ## make what of the Helm charts is generated: schemas, tables, shared templates, alert rules, dashboards
	@$(BIN)/python -m deploy.helm.generate
	@$(BIN)/python -m deploy.monitoring

clean: ## remove what was built, not .venv
	rm -rf build dist wardround/.proto wardround/*/v1
