# Every target but help and clean first makes .venv, if it is missing or stale.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written only after a complete installation: a .venv that was interrupted stays stale. Its name
# holds the checkout's path, because a .venv that was moved points at the old one.
STAMP := $(VENV)/.installed-$(shell pwd | cksum | cut -d ' ' -f 1)

# Processes that share the tests. A file's tests stay together: they share what they train.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help demo transfer gpu test test-all lint venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      pretrain, convert and fine-tune a small detector on the built-in data"
	@echo "make transfer  compare detectors that start from pretrained weights and from scratch"
	@echo "make gpu       measure and test the fused operators on a GPU; tables in output/gpu/gpu.md;"
	@echo "               MINUTES=8 measures a portion; the same command then continues"
	@echo "make test      lint, then all tests except the slow ones (WORKERS=2 at a time)"
	@echo "make test-all  make test, then the slow tests"
	@echo "make lint      ruff and mypy"
	@echo "make venv      only set up .venv (PYTHON=... chooses the interpreter, >= 3.10)"
	@echo "make clean     remove .venv, caches and build files"

demo: venv
	$(BIN)/python tools/demo.py

transfer: venv
	$(BIN)/python tools/demo.py --transfer

gpu: venv
	$(BIN)/python tools/measure_gpu.py $(if $(MINUTES),--minutes $(MINUTES))

test: lint
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

venv: $(STAMP)

# A .venv whose Python doesn't start is made anew; any other is brought up to date in place, since
# torch alone is 5 GB.
$(STAMP): setup.py pyproject.toml tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"randwire_d2 needs Python 3.10 or newer: make PYTHON=/path/to/python3")'
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python tools/install.py --extras test
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
