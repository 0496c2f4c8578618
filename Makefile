# make                what can be done
# DENSE=1 make demo   the same run without LongAct
# WORKERS=8 make test so many test files at a time, of which some run up to 8 ranks
# PYTEST_FLAGS=--times make test the time by file, and the slowest tests

PYTHON_BIN := .venv/bin/python
WORKERS ?= 2
VERSION ?= 0.16.1
NAME ?= verl
LIBRARY_TESTS := $(patsubst %,tests/test_%.py,layouts longact moments masked_update optimizer_shards \
  context_parallel counted_tokens faults refusals integrations import_mask versions config qkv_layout selection reduction tokens)
.DEFAULT_GOAL := help
.PHONY: help setup demo observe test test-gpu test-megatron test-trainer test-te lint style types suite format docs clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: setup ## train a small model with GRPO and LongAct; results in runs/demo (DENSE=1: without)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash examples/demo/run.sh

observe: setup ## measure the query and key channels of SmolLM2-135M; results in runs/smollm2 (SMOLLM2=FOLDER: no download)
	@bash examples/smollm2/observe.sh

test: style ## everything that CI checks: lint, types, tests
	@$(MAKE) --no-print-directory --jobs=2 types suite

suite: setup
	@$(PYTHON_BIN) -m pytest -m "not gpu" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-gpu: $(if $(PYTHON),,setup) ## the tests that need a CUDA GPU; writes docs/gpu-results.md (PYTHON=python3: your own environment)
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON),$(PYTHON_BIN)) -m pytest -m gpu tests/gpu tests/test_preflight.py tests/test_telemetry.py

test-megatron: setup ## the library's tests with another megatron-core (VERSION=0.16.1, or a checkout of Megatron-LM)
	@bash scripts/setup_megatron.sh $(VERSION)
	@.venv-megatron-$(notdir $(VERSION))/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_FLAGS) $(LIBRARY_TESTS)

test-trainer: setup ## LongAct inside a trainer that pip can install, without a GPU (NAME=verl)
	@bash scripts/setup_trainer.sh $(NAME)
	@.venv-$(NAME)/bin/python -m pytest tests/trainers/test_$(NAME).py $(PYTEST_FLAGS)

test-te: ## Transformer Engine's modules without a GPU, where scripts/setup_te.sh has made .venv-te
	@if [ -e .venv-te/complete ]; then .venv-te/bin/python -m pytest -m te tests/te; \
	else echo "test-te: NOT RUN, there is no Transformer Engine here: bash scripts/setup_te.sh makes .venv-te"; fi

lint: style types ## ruff, formatting, mypy

style: setup
	@$(PYTHON_BIN) -m ruff check .
	@$(PYTHON_BIN) -m ruff format --check .

types: setup
	@$(PYTHON_BIN) -m mypy

format: setup ## format the code and mend what ruff can mend
	@$(PYTHON_BIN) -m ruff check --fix-only .
	@$(PYTHON_BIN) -m ruff format .

docs: setup ## from the code: docs/flags.md and docs/program-flags.md again, and the API reference in build/api
	@PYTHONWARNINGS=ignore $(PYTHON_BIN) tools/generate_flags_doc.py
	@PYTHONWARNINGS=ignore $(PYTHON_BIN) tools/generate_api_reference.py

setup: ## make .venv from constraints.txt, if it is not there
	@bash scripts/setup.sh

clean: ## remove .venv, caches and build folders (runs/ stays)
	rm -rf .venv .venv-* .cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
