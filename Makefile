# `make demo` and `make test` do their own set-up: a virtual environment in .venv, installed once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-slow lint wheel venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   erase 'bicycle' from the embedded pocket model and write the report page"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make wheel  build the source archive and the wheel into dist/"

demo: $(STAMP)
	$(BIN)/sd-erase demo

# a process a core, each with one thread: the models of the tests are too small for more
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow or realdata"

lint: $(STAMP)
	$(BIN)/ruff check sd_erase tests
	$(BIN)/ruff format --check --quiet sd_erase tests
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m build

venv: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
