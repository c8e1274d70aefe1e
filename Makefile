# Every target sets up .venv by itself. A stamp says that it is there; the second call asks no network.
PYTHON ?= python3
PROMPT ?= Once upon a time
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
RUN_READY := $(VENV)/.run-ready
DEV_READY := $(VENV)/.dev-ready

# A foreign PYTHONPATH must not shadow what .venv holds.
unexport PYTHONPATH
unexport PYTHONHOME
# PROMPT goes on as DGEMMA_PROMPT, raw; make would expand a dollar sign in it on its way out.
unexport PROMPT

.DEFAULT_GOAL := help
.PHONY: help run test soak check clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# The prompt travels in the environment, so quotes and dollar signs in it survive.
run: export DGEMMA_PROMPT := $(value PROMPT)
run: $(RUN_READY) ## write a text: make run PROMPT="It was a dark night"
	@$(BIN)/dgemma generate -- "$$DGEMMA_PROMPT"

# A file's tests stay in one process, so they share its fixtures.
test: check ## lint, types and the test suite: make test JOBS=4
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

soak: $(DEV_READY) ## the long tests and scripts/soak_*.py
	$(BIN)/python -m pytest -m soak
	@set -e; for script in $(sort $(wildcard scripts/soak_*.py)); do \
		echo "$$script"; $(BIN)/python "$$script"; \
	done

check: $(DEV_READY) ## lint, format and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dgemma

clean: ## remove build products and caches (.venv and runs/ stay)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

# torch comes first and pinned, from whichever index pip is set up with (PIP_INDEX_URL picks a CPU or CUDA build).
$(RUN_READY): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "dgemma: '$(PYTHON)' not found. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dgemma: needs Python 3.11 or newer, '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(DEV_READY): $(RUN_READY)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@
