# Thin: every target is one command of the tool it names.
PY := .venv/bin/python
# `make CONSTRAINTS=constraints-lowest.txt test` proves the lower bounds.
CONSTRAINTS := constraints.txt
# One stamp for each constraints file; installing from another removes it.
INSTALLED := .venv/installed-$(basename $(notdir $(CONSTRAINTS)))
PIP := DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-all mutants lint docs clean

demo: $(INSTALLED)
	$(PY) -m distill.cli demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

# About an hour on one core; continues where mutants.csv ends. tests/mutants.md has the last result and the reasons of the survivors.
mutants: $(INSTALLED)
	$(PIP) cosmic-ray
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py

lint: $(INSTALLED)
	$(PY) -m ruff check distill tests docs
	$(PY) -m ruff format --check distill tests docs
	$(PY) -m mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --strict

.venv/docs: $(INSTALLED)
	$(PIP) -e ".[docs]"
	touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || python3 -m venv .venv
	rm -f .venv/installed*
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
