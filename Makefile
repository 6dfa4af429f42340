# The menu. `make` alone prints it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env servers demo test test-faults check accept bench up lint format clean

help:  ## Show this menu
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## Make the environment in .venv (python3 and a package index are all it needs)

# Installing with an up-to-date pip and exact pins takes seconds where the stock pip takes minutes; compiling
# now saves every later start its compilation, and Prefect's empty database every new folder its migrations.
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=26"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	$(BIN)/python -m flows.prefect_database
	touch $(STAMP)

demo: $(STAMP)  ## From nothing to a certified policy on the testbed (about 4 minutes on 2 cores)
	$(BIN)/cdpo run testbed

servers:  ## Install the servers that tests talk to (Debian: PostgreSQL, Ceph's S3 gateway, Chromium)
	bash tests/install_servers.sh

test: $(STAMP)  ## Every test but the next (at most 12 minutes on 2 cores, two at a time)
	$(BIN)/python -m pytest -m "not faults" -n 2 --dist loadfile

test-faults: $(STAMP)  ## Kills, outages, sweeps on several workers (tens of minutes on 2 cores)
	$(BIN)/python -m pytest -m faults -n 2 --dist loadfile

check: $(STAMP) lint  ## The fast loop: lint, types, tests without whole runs and servers
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP)  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

accept: $(STAMP)  ## The acceptance table in full, with figures (over an hour on 2 cores)
	$(BIN)/python benchmarks/accept.py

bench: $(STAMP)  ## Benchmarks: both sides in one run, a table out
	$(BIN)/python benchmarks/training_speed.py

up: $(STAMP)  ## Prefect server, MLflow server, deployments and a worker on loopback
	$(BIN)/cdpo up

clean:  ## Remove the environment and caches (keeps .cdpo, the results)
	rm -rf $(VENV) .mypy_cache .ruff_cache
