# Each target makes the virtual environment it needs and uses it again next time.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# A worker per core with one thread each is faster than one process with many threads.
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow lint format peers clean

demo: $(INSTALLED)
	$(PYTHON) examples/demo.py

test: $(INSTALLED)
	$(ONE_THREAD) $(PYTHON) -m pytest -q -n $(WORKERS) --durations=10

test-slow: $(INSTALLED)
	$(ONE_THREAD) $(PYTHON) -m pytest -q -n $(WORKERS) -m slow --durations=10

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What the benchmarks compare with; no test needs them.
peers: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev,peers]'

# torch first and on its own, at its exact version: a range could bring another build, and with it gigabytes.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
