# The two commands: `make run` and `make test`. Each does all the set-up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= results/alanine_dipeptide
READY := $(VENV)/.ready

.PHONY: run test test-slow wheel-test lint docs clean

run: $(READY)
	$(BIN)/openmm-bg run alanine_dipeptide --output $(OUTPUT) --resume

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

wheel-test: $(READY)
	$(BIN)/python tests/wheel.py --all

# torch first and by its exact version: where a CPU build is at hand, this takes it and nothing larger
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "openmm_bg needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/api/generated
