# Thin: every target is one command of the tool it names.
PY := .venv/bin/python
PIP := DS_BUILD_OPS=0 $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(PY) -m distill.cli demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

lint: .venv/installed
	$(PY) -m ruff check distill tests

.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf .venv
