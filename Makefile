# The project's commands; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The newest supported Python that runs and can make environments (a pyenv shim, or Debian's python without venv, cannot).
PYTHON ?= $(firstword $(foreach v,3.14 3.13 3.12 3.11,$(shell python$(v) -c 'import ensurepip, venv' 2>/dev/null && echo python$(v))))
VENV := .venv
BIN := $(VENV)/bin
# Workers start twice as fast with compiled modules, so never let the environment forbid writing them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test lint unit masked integration system fuzz bench lock check-lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## make .venv and install the locked dependencies

$(VENV)/.ready: pyproject.toml requirements.txt tests/requirements.txt infra/torch-builds.txt infra/lock.py
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 with venv was found: install one (Debian: python3 and python3-venv), or set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not installed" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "$(VENV) has $$($(BIN)/python --version), Hatchery needs 3.11 to 3.14: remove $(VENV), or set PYTHON=..." >&2; exit 2; }
	@echo "Installing the locked dependencies in $(VENV), which has $$($(BIN)/python --version) (about 4 minutes, 2.4 GB) ..."
	@$(BIN)/python infra/lock.py install --extra demo --extra export --extra dev
	@touch $@

demo: setup ## run the main job on photographs that scikit-image ships: local Ray, folder runs/, MLflow on SQLite
	@echo "Running the whole recipe configs/recipe/demo.yaml; finished stages in runs/ are not run again ..."
	@$(BIN)/python pipeline/pretrain.py --recipe configs/recipe/demo.yaml

test: lint unit masked integration ## everything: lint, types, unit and parity tests, integration tests with real servers

lint: setup ## ruff and mypy
	@echo "Lint and types ..."
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary

unit: setup ## unit and parity tests
	@echo "Unit and parity tests ..."
	@$(BIN)/pytest -q -n auto -m 'not integration and not system' tests

masked: setup ## tests of the networks once more, as on a processor without AVX-512
	@echo "Tests of the networks with the processor's features masked ..."
	@$(BIN)/python -m tests.masked

integration: setup ## the real command on real servers: Ray, S3, MLflow
	@echo "Integration tests: real Ray cluster, S3 server and MLflow server ..."
	@$(BIN)/pytest -q -n 2 --dist loadfile -m integration tests

system: setup ## what takes longer: trainings through a bad day, a lost cluster, a bad network; exports (18 minutes)
	@echo "System tests: trainings that end in the weights of a run that was left alone, and exports ..."
	@$(BIN)/pytest -q -m "system$(if $(SKIP), and not $(SKIP))" tests

fuzz: setup ## mutated JPEGs, tars and indexes for a minute (FUZZ_SECONDS=3600: an hour; FUZZ_SEED=N: others)
	@$(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ_SECONDS),60) --seed $(or $(FUZZ_SEED),0)

bench: setup ## speed and memory as ratios, both sides measured in one run (see tests/bench/README.md)
	@missed=0; for part in networks training data_pairs data_memory data_sharding data_planning; do \
	   echo "tests.bench.$$part"; $(BIN)/python -m tests.bench.$$part || missed=1; done; exit $$missed

lock: setup ## renew requirements.txt after a change of pyproject.toml (UPGRADE=--upgrade: every version)
	@$(BIN)/python infra/lock.py renew $(UPGRADE)

check-lock: setup ## ask the package index whether requirements.txt resolves for every supported Python
	@$(BIN)/python infra/lock.py check

clean: ## remove the demo's results and caches (not .venv)
	@rm -rf runs .mypy_cache .ruff_cache .pytest_cache
