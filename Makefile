# Everything runs in a virtual environment that make creates and fills by itself.
# Needs: Python 3.11 or newer with its venv module, and make.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.requirements
DEV_STAMP := $(VENV)/.requirements-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help test faults demo lint bench lock audit clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment (default .venv)."

test: lint ## lint, type check and run all tests but those of faults
	$(BIN)/python -m pytest -n auto --dist loadfile

faults: $(DEV_STAMP) ## every case of the fault suite, FLAGS="--table FILE" for what it came to; 40 minutes
	$(BIN)/python -m pytest tests/faults --full -n auto --dist loadfile $(FLAGS)

demo: $(RUN_STAMP) ## train, check, replay and draw on a simulated market, about two minutes
	$(BIN)/python demo.py

lint: $(DEV_STAMP) ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV_STAMP) ## every figure of speed, on a simulated market: FLAGS="--archive-dir bars" for your own
	$(BIN)/python -m benchmarks.run $(FLAGS)

lock: | $(BIN)/python ## renew requirements.lock: every package at one version, with hashes
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "make: the lock is made with Python 3.11; set PYTHON=python3.11 and another VENV." >&2; exit 1; }
	$(PIP) pip-tools==7.6.2
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --upgrade --allow-unsafe \
		--generate-hashes --strip-extras --no-emit-index-url --no-emit-trusted-host \
		--no-emit-find-links --output-file requirements.lock requirements.txt requirements-axon.txt

# --strict: a package that cannot be looked up is a failure, not a footnote.
audit: | $(BIN)/python ## look for known vulnerabilities of requirements.lock; needs the internet
	$(PIP) pip-audit==2.10.1
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean: ## remove the environment, the caches and build/ (demo, back-tests, reports); models/ and state/ stay
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is missing or older than Python 3.11; set PYTHON, e.g. make PYTHON=python3.12." >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "make: $(PYTHON) cannot create a virtual environment; install its venv package." >&2; \
		rm -rf $(VENV); exit 1; }

# The stamps are newer than the requirements they stand for.
$(RUN_STAMP): requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

# Those of the axon and of a cluster too, so that their tests never skip.
$(DEV_STAMP): requirements.txt requirements-dev.txt requirements-axon.txt requirements-cluster.txt | $(BIN)/python
	$(PIP) -r requirements-dev.txt -r requirements-axon.txt -r requirements-cluster.txt
	@touch $(RUN_STAMP) $@
