# Each target does its own set-up in .venv; see `make help`. Needs Python 3.10 or newer; the tests need g++ too.
# PYTHON is the interpreter that .venv is made with. gpu-test and bench use PYTHON as it is when you name it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECORD ?= tests/gpu/record.json
# Test processes: one per core, at most 8.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -le 8 ] || n=8; echo $$n)
# Processes that share the GPU in gpu-test; 0 for one without pytest-xdist.
GPU_JOBS ?= 4
SETUP = @$(PYTHON) tools/setup_venv.py --venv $(VENV) --extras
# One BLAS thread per test process: more of them fight for the cores.
PYTEST = OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Machines with a GPU may have no network: an interpreter named by the user is not replaced by .venv.
NAMED_PYTHON := $(filter command environment,$(origin PYTHON))
GPU_PYTHON := $(if $(NAMED_PYTHON),$(PYTHON),$(BIN)/python)
GPU_SETUP := $(if $(NAMED_PYTHON),,venv-gpu)

.DEFAULT_GOAL := help
.PHONY: help demo env test test-all compile-all lint gpu-test gpu-sanitize gpu-pending bench same-binaries new-binaries clean venv-demo venv-test venv-gpu check-g++ nvrtc-releases

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: venv-demo  ## exact attention on this machine's GPU, or its CPU: computed, checked, timed, drawn
	@$(BIN)/python -m fa2cupy demo

env: venv-demo  ## what a bug report needs
	@$(BIN)/python -m fa2cupy env

test: lint check-g++ nvrtc-releases  ## lint, then the tests that need no GPU: 7:45 on 2 quiet cores, 10 minutes at most, ever
	$(PYTEST) -m "not slow" --ignore=tests/gpu --ignore=tests/frameworks tests

test-all: lint check-g++ nvrtc-releases  ## the same, tests/host with whole products and large sizes, every tile row compiled
	$(PYTEST) --ignore=tests/gpu --ignore=tests/frameworks tests

compile-all: venv-test nvrtc-releases  ## compile every tile row for every architecture with NVRTC 12 and 13
	$(PYTEST) tests/test_compile.py

lint: venv-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-test: $(GPU_SETUP)  ## the tests that need a GPU, 6 minutes at most; writes RECORD (tests/gpu/record.json)
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest tests/gpu --record "$(RECORD)" $(if $(filter-out 0,$(GPU_JOBS)),-n $(GPU_JOBS) --dist loadgroup)

gpu-sanitize: $(GPU_SETUP)  ## compute-sanitizer over a case of each kernel, 90 s at most; adds its outcome to RECORD
	$(GPU_PYTHON) tests/gpu/sanitizer.py --record "$(RECORD)"

gpu-pending: venv-test  ## no GPU at hand: mark the record as pending, REASON="..."
	@$(BIN)/python tests/gpu/record.py --pending "$(REASON)"

bench: $(GPU_SETUP)  ## ours and the installed peers, interleaved in one run
	$(GPU_PYTHON) benchmarks/bench.py

same-binaries: venv-test  ## every plain binary against those of a commit, REV=...; EVERY=8 for an eighth
	@$(BIN)/python tools/binaries.py "$(REV)" --every $(or $(EVERY),1)

new-binaries: venv-test nvrtc-releases  ## binaries are to differ: renew tests/binaries, REASON="..."
	@$(BIN)/python -m tests.digests "$(REASON)"

clean:  ## remove .venv, build products and tool caches (not the kernel cache)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv-demo:
	$(SETUP) demo

venv-test:
	$(SETUP) cuda,test,lint
	@$(BIN)/python -m tests.nvrtc

venv-gpu:
	$(SETUP) cuda,demo,test,lint,torch

# tests/test_compile.py compiles with NVRTC 12.9 and 13.0, whichever CuPy is installed.
nvrtc-releases: venv-test
	@$(BIN)/python -m tests.nvrtc

check-g++:
	@command -v $${CXX:-g++} >/dev/null || { echo "tests/host compiles the kernels with g++, which is missing: apt-get install g++" >&2; exit 1; }
