# `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
# cpu or gpu: which FAISS is installed.
FAISS ?= cpu
BIN := .venv/bin

.PHONY: demo test check bench faults clean

demo: .venv/installed
	$(BIN)/lgd demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: .venv/installed-dev
	LGD_FAULTS=all $(BIN)/python -m pytest -m faults

bench: .venv/installed
	$(BIN)/lgd bench

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS)]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS),dev]'
	touch $@

clean:
	rm -rf .venv runs
