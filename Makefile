# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own .venv from Python 3.11+.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all test-newest lock-newest test-oldest package gpu faults mutants matrix house docs docs-figures lint format bench clean

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

# Small changes of the code, and whether a test notices: two hours on one core. It goes on where it was stopped.
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

# The same tests with the newest releases that go together in CPU builds, and what keeps newer ones away.
NEWEST := .venv-newest
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m tests.newest
	$(NEWEST)/bin/python -m pytest -n 2 -m "not slow and not gpu and not matrix and not faults" $(TEST)

$(NEWEST)/.ready: pyproject.toml constraints-newest.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt torch setuptools
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable '.[test,lint]'
	touch $(NEWEST)/.ready

# Resolves constraints-newest.txt anew: everything but torch, of which the index has one CPU build, is free.
lock-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) setuptools
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test,lint]'
	{ echo "# The newest releases that go together in CPU builds; written by make lock-newest."; \
	  $(NEWEST)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//; s/ @ .*//'; } > constraints-newest.txt

# The same tests with the oldest releases that pyproject.toml lets in.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not gpu and not matrix and not faults" $(TEST)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch setuptools
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test,lint]'
	touch $(OLDEST)/.ready

# Builds the wheel and the sdist, and runs the demo from each in an environment and a folder of its own.
package: $(READY)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -c 'import setuptools.build_meta as build; build.build_sdist("dist")'
	for kind in dist/*.whl dist/*.tar.gz; do \
	  rm -rf dist/try && $(PYTHON) -m venv dist/try && \
	  dist/try/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools && \
	  dist/try/bin/python -m pip install --quiet --constraint constraints.txt "$$kind[demo]" && \
	  (cd dist/try && bin/tdhook-rl demo $(DEMO)) || exit 1; \
	done
	rm -rf dist/try

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
