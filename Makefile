# Conveniences; the README's two commands need none of them.
PYTHON ?= python3
BIN := .venv/bin

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: serve test clients check audit bench
serve: .venv/installed ## serve the bundled model
	$(BIN)/pronk serve

test: .venv/installed ## the default suite
	$(BIN)/python -m pytest

clients: ## install other projects' clients, which tests/clients runs
	PYTHON=$(PYTHON) tests/clients/install

check: .venv/installed ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: .venv/installed ## known weaknesses of what is installed
	.ci/audit

bench: .venv/installed ## load a fresh server and print the table
	$(BIN)/python -m tests.benchmarks.serve
