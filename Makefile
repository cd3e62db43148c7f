# Every command needs only Python 3.11 or newer; the rest goes into .venv.
PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
OUT ?= out
BIN = $(VENV)/bin
# -n 2: two test processes; each with one thread, so that they do not fight for cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test check zoo bench format clean python

demo: $(VENV)/.user  ## train, cut, certify and report a small network (DATA=digits, a folder or a hub id)
	@$(BIN)/resect demo --data $(DATA) --out $(OUT)

test: $(VENV)/.dev  ## all tests and doctests
	$(PYTEST) -n 2

check: $(VENV)/.dev  ## everything CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -n 2

zoo: $(VENV)/.dev  ## every law over the whole zoo of architectures
	$(PYTEST) -n 2 tests/test_laws.py
	$(PYTEST) -n 2 -m zoo tests/test_zoo.py

bench: $(VENV)/.dev  ## every published table again, into benchmarks/results
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script; done

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "resect needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.11" >&2; exit 2; }

# torch first and pinned: without the constraint pip takes the newest build, with gigabytes of CUDA libraries.
$(BIN)/python: | python
	@echo "installing torch and what resect needs into $(VENV) (first time only)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch

$(VENV)/.user: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[digits,data]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.user
