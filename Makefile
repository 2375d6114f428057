# Everything sets itself up: `make demo` and `make test` need Python 3.11, git and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test test-fast lint bench claims clean

help:
	@echo "make demo       the main job on embedded data: train, search, serve, report (2 to 4 minutes)"
	@echo "make test       all tests"
	@echo "make test-fast  the inner loop (under 3 minutes)"
	@echo "make bench      every measurement in benchmarks/"
	@echo "make claims     the published claims at cpu scale"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
# For tests only, without what it pins: an old requests that it does not use.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torchattacks
	@touch $@

demo: $(READY)
	$(BIN)/python -m ray_jobs.demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray" -n 2 --dist loadfile --no-loadscope-reorder --durations=12
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray $$(grep -l mark.ray tests/test_*.py) -n 2 --dist loadfile --no-loadscope-reorder --durations=12

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not ray" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

claims: $(READY)
	$(BIN)/python -m ray_jobs.claims --scale cpu --seeds 3 --out runs/claims --resume

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
