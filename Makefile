# Everything works from a fresh clone with Python 3.11 or newer: the first target makes .venv.
#   make demo    plant a backdoor, find it, remove it (about three minutes after the install)
#   make test    the fast tests        make check   format, lint, types        make bench   throughput
# Another interpreter: make PYTHON=python3.12 test.  Newest libraries instead of the tested ones: make CONSTRAINTS= test.

PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
# A process per core; PYTEST_ARGS= gives one process and its plainer output.
PYTEST_ARGS ?= -n auto --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check bench clean-venv
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/unpoison demo --out demo-run

# One thread per process: two or more collapse as soon as anything else wants the cores, and results repeat exactly.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "unpoison needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(CONSTRAINTS)
	@touch $@

clean-venv:
	rm -rf $(VENV)
