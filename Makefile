# `make demo` and `make test` each do all the set-up by themselves; see scripts/setup.
.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-unit test-kernel test-vm test-clients bench lint format clean

# Options for pytest, e.g. make test-unit ARGS='-k journal -x'
ARGS ?=
# As many at once as there are processors, whole files: what they share (a module's pod) is made once. In their own order:
# those with few tests, which come last otherwise, are the longest.
JOBS ?= auto
PYTEST = .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1	\2/p' Makefile | expand -t 24

setup:  ## distribution packages, .venv, the guest image; nothing to do when done
	@scripts/setup

lock: setup  ## requirements.lock anew, from the newest versions that pyproject.toml allows
	@scripts/lock

demo: setup  ## a guided tour of what Holdfast does
	@scripts/demo

test: setup  ## every test, linters included
	@$(PYTEST)

test-unit: setup  ## tests that need no root, and the linters
	@$(PYTEST) tests/unit

test-kernel: setup  ## tests of mounts, namespaces and devices (root)
	@$(PYTEST) tests/kernel

test-vm: setup  ## tests in virtual machines
	@$(PYTEST) tests/vm

test-clients: setup  ## tests of the command as users call it
	@$(PYTEST) tests/clients

bench: setup  ## measure
	@bench/run

lint: setup  ## linters and types only
	@$(PYTEST) tests/unit/test_lint.py tests/unit/test_rooms.py

format: setup  ## let ruff format and fix what it can
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

clean:  ## everything that set-up and tests made in this folder
	rm -rf .venv .cache .pytest_cache .hypothesis .ruff_cache dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
