# Every target sets up .venv by itself from python3 and the package index; nothing is done twice.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# One process a core with one thread each is faster than threads, which fight over the cores.
export OMP_NUM_THREADS ?= 1
WORKERS ?= -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## forget from two posteriors and write demo-report/report.html
	$(BIN)/pyro-forget demo --out demo-report

test: $(READY)  ## the fast tests
	$(BIN)/python -m pytest $(WORKERS)

test-slow: $(READY)  ## the statistical and end-to-end tests
	$(BIN)/python -m pytest -m slow $(WORKERS)

lint: $(READY)  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## put the sources into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## the benchmarks, each beside its rival
	$(BIN)/python -m benchmarks

clean:  ## remove what was built, and .venv
	rm -rf .venv build dist demo-report *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
		"pyro-forget needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: run make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
