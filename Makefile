# The project's commands; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Workers start twice as fast with compiled modules, so never let the environment forbid writing them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test lint unit integration bench lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv and install the locked dependencies

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: install Python 3.11, or set PYTHON=..." >&2; exit 2; }
	@echo "Making $(VENV) and installing the locked dependencies (about 3 minutes, 2.4 GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,export,dev]'
	@touch $@

demo: setup ## run the main job on photographs that scikit-image ships: local Ray, folder runs/, MLflow on SQLite
	@echo "Running the whole recipe configs/recipe/demo.yaml; finished stages in runs/ are not run again ..."
	@$(BIN)/python pipeline/pretrain.py --recipe configs/recipe/demo.yaml

test: lint unit integration ## everything: lint, types, unit and parity tests, integration tests with real servers

lint: setup ## ruff and mypy
	@echo "Lint and types ..."
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

unit: setup ## unit and parity tests
	@echo "Unit and parity tests ..."
	@$(BIN)/pytest -q -n auto -m 'not integration' tests

integration: setup ## the real command on real servers: Ray, S3, MLflow
	@echo "Integration tests: real Ray cluster, S3 server and MLflow server ..."
	@$(BIN)/pytest -q -n 2 --dist loadfile -m integration tests

bench: setup ## speed and memory as ratios, both sides measured in one run (see tests/bench/README.md)
	@missed=0; for part in networks training data_pairs data_sharding data_planning; do \
	   echo "tests.bench.$$part"; $(BIN)/python -m tests.bench.$$part || missed=1; done; exit $$missed

lock: setup ## renew constraints.txt (needs uv: pip install uv)
	@( echo "# Every version this project is tested with; pip reads it as constraints (make setup). Renew it with: make lock"; \
	   uv pip compile pyproject.toml --extra demo --extra export --extra dev --no-annotate --no-header --quiet --no-config ) > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove the demo's results and caches (not .venv)
	@rm -rf runs .mypy_cache .ruff_cache .pytest_cache
