# Thin: every target is one command of the tool it names.
PY := .venv/bin/python
# `make CONSTRAINTS=constraints-lowest.txt test` proves the lower bounds.
CONSTRAINTS := constraints.txt
PIP := DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-all mutants lint docs clean

demo: .venv/installed
	$(PY) -m distill.cli demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

# Hours on one core; goes on where mutants.csv ends. tests/mutants.md has the last result and the reasons of the survivors.
mutants: .venv/installed
	$(PIP) cosmic-ray
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py

lint: .venv/installed
	$(PY) -m ruff check distill tests docs
	$(PY) -m ruff format --check distill tests docs
	$(PY) -m mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --strict

.venv/docs: .venv/installed
	$(PIP) -e ".[docs]"
	touch $@

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
