# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own .venv from Python 3.11+.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all gpu faults mutants matrix house docs docs-figures lint format bench clean

demo: $(READY)
	$(BIN)/tdhook-rl demo $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not matrix and not faults" $(TEST)

test-all: $(READY)
	$(BIN)/python -m pytest $(TEST)

# Disks that fail, kills, callbacks that raise, hostile files: every one, and docs/reliability.md, which says how each
# kind ended.
faults: $(READY)
	$(BIN)/python -m pytest -m faults tests/faults
	$(BIN)/python -m tests.faults

# Small changes of the code, and whether a test notices: some hours. It goes on where it was stopped.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt coverage
	$(BIN)/python -m tests.mutation

# Runs every cell and writes docs/compatibility.md: about ten minutes on two cores.
matrix: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ray
	$(BIN)/python -m tests.matrix

# Draws docs/house.svg: the rooms of the package and their arrows.
house: $(READY)
	$(BIN)/python -m tests.house

# One static site in site/, which needs no network to be read; a warning is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Runs every page, and writes what it prints and the figures that it shows.
docs-figures: $(READY)
	$(BIN)/python -m tests.pages

# On a machine with a CUDA device, where the pinned torch has a CUDA build: the tests that need one, and a table.
gpu: $(READY)
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
	$(BIN)/python -m pytest -m gpu $(TEST)
	$(BIN)/python -m benchmarks.on_device

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every figure beside pinned peers, and docs/benchmarks.md: under 20 minutes on two quiet cores. zennit comes without what
# it asks for: torchvision, of which the index has no build that loads beside this torch.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps zennit
	$(BIN)/python -m benchmarks.all $(BENCH)

# torch first and pinned: an unpinned torch would pull a CUDA build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs site
