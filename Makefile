# Everything that a newcomer types. `make run` and `make test` set up .venv first if it is missing.
# Python 3.11, 3.12 or 3.13.
PYTHON ?= python3
# Another index to take torch from, for its small CPU build: see docs/install.md.
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/ready

.PHONY: run test test-all lint bench install clean

run: $(READY)  ## the benchmark on the embedded model: SingleStream, two ranks without a GPU
	$(BIN)/python -m wan_mlperf.run --scenario singlestream

test: $(READY)  ## everything that CI runs, under 12 minutes on two cores
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## ours beside diffusers and plain xDiT, on this machine
	$(BIN)/python -m wan_mlperf.bench speed --workload tiny

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -z "$(TORCH_INDEX)" || $(PIP) --no-deps --index-url $(TORCH_INDEX) torch
	$(PIP) -e ".[cpu,dev]"
	$(PIP) --no-deps vbench==0.1.5
	touch $(READY)

# Into the Python that runs this, for a container with its own torch (ROCm, CUDA): what it has stays as it is.
install:
	$(PYTHON) -c "import importlib.metadata as m; names = {d.metadata['Name'] for d in m.distributions()}; print('\n'.join(f'{n}=={m.version(n)}' for n in sorted(names) if n and n.lower().startswith(('torch', 'triton', 'pytorch', 'nvidia', 'rocm'))))" > .keep.txt
	$(PYTHON) -m pip install -c .keep.txt -e .
	$(PYTHON) -m pip install --no-deps vbench==0.1.5
	rm .keep.txt

clean:
	rm -rf .venv
