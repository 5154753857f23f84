# Everything that a newcomer types; `make help` lists it. The first call sets up .venv, with Python 3.11, 3.12 or 3.13.
PYTHON ?= python3
# Another index to take torch from, for its small CPU build: see docs/install.md.
TORCH_INDEX ?=
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# The tests expect a machine without a GPU, and get one everywhere; `make test-gpu` is for the GPU.
ON_CPU := CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= ROCR_VISIBLE_DEVICES=
# Two test files at a time, each on one core: see tests/conftest.py.
BOTH := -n 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/ready

.PHONY: run help check test test-all test-aiter test-gpu lint format bench install clean

run: $(READY)  ## the benchmark on the embedded model: SingleStream, two ranks or one per GPU, no GPU needed
	$(BIN)/python -m wan_mlperf.run --scenario singlestream --recipe tiny

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

check: lint  ## before each commit: lint, types, unit tests; under two minutes on two cores
	$(ON_CPU) $(PYTEST) $(BOTH) -m "not job and not slow and not gpu"

test: $(READY)  ## what CI runs: all but slow and GPU tests, under 12 minutes on two cores
	$(ON_CPU) $(PYTEST) $(BOTH) -m "not slow and not gpu"

test-all: $(READY)  ## the slow tests too
	$(ON_CPU) $(PYTEST)

test-aiter: $(READY)  ## AITER's own kernels on a CPU: make test-aiter AITER_SRC=FOLDER, a checkout of AITER
	$(ON_CPU) AITER_SRC=$(AITER_SRC) $(PYTEST) tests/aiter

test-gpu: $(READY)  ## what only a GPU can show: first at small sizes, then half an hour
	$(PYTEST) -m "gpu or not slow" tests/gpu/test_small.py tests/gpu

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## ours beside diffusers and plain xDiT, on this machine
	$(BIN)/python -m wan_mlperf.bench speed --workload tiny

install:  ## into the Python that is there, for a container with its own torch (ROCm, CUDA), which stays as it is
	$(PYTHON) tools/install.py

clean:  ## remove .venv
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import wan_mlperf"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -z "$(TORCH_INDEX)" || $(PIP) --no-deps --index-url $(TORCH_INDEX) torch
	$(PIP) -e ".[cpu,dev]"
	$(PIP) --no-deps vbench==0.1.5
	touch $(READY)
