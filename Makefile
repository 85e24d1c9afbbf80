# Each target starts from a bare Python >= 3.10; `make demo` and `make test` are the two a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install test lint demo compare clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -e '.[dev]' -c constraints.txt
	touch $@

install: $(VENV)/.installed

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest
