# The README's commands. VENV and PYTHON may be set: make test VENV=/tmp/v PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# The CUDA compiler plugin compiles for GPUs that are not there; it exists for Linux on x86-64 and arm64.
TARGET := $(shell [ "$$(uname -s)" = Linux ] && echo ,gpu-target)

# A file's tests stay in one process, since they share what they measured.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 30

.PHONY: train test test-all check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[data,plot]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev$(TARGET)]"
	@touch $@

train: $(VENV)/.installed-train
	$(BIN)/jspeed train configs/gpt2_tiny.json --resume

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev
	JSPEED_WRITE_TABLES=1 $(PYTEST) -m "not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_floors.py

clean:
	rm -rf $(VENV) runs build *.egg-info
