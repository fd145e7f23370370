# Two commands set everything up: `make demo` and `make test`. Both build .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo_output

.PHONY: demo test check lint env clean-demo

# Rebuilt only when the list of dependencies changes.
$(VENV)/.installed: pyproject.toml environment/requirements.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" \
		|| (echo "k-SALSA needs Python 3.10 to 3.13; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -r environment/requirements.txt
	touch $@

env: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py --out_dir $(DEMO)

# One process per core, each with one thread: the tests' networks are tiny, and threads that wait
# for each other spin. Tests of one file stay together, for the modules' fixtures.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# For daily use: lint, and the tests that tests/slow.txt does not name.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

clean-demo:
	rm -rf $(DEMO)
