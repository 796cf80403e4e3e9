# Thin: every target is one command of the tool it names.
PY := .venv/bin/python
# `make CONSTRAINTS=constraints-lowest.txt test` proves the lower bounds.
CONSTRAINTS := constraints.txt
PIP := DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-all lint docs clean

demo: .venv/installed
	$(PY) -m distill.cli demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

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
