# Every target sets up what it needs: one virtual environment, versions from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin
OUT ?= out/demo

.PHONY: demo test test-all check bench coverage attributions docs clean

demo: .venv/.ready
	$(BIN)/revprop demo --out $(OUT)

test: .venv/.ready-test
	$(BIN)/python -m pytest -m "not slow" -n 2 -q

test-all: .venv/.ready-test
	$(BIN)/python -m pytest -n 2 -q

check: .venv/.ready-check
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: .venv/.ready-test
	$(BIN)/python benchmarks/run.py

# every architecture once; finished ones are kept: make coverage ARGS="--only timm --again"
coverage: .venv-peers/.ready
	$(PEERS)/python benchmarks/coverage.py $(ARGS)

# what methods of attribution leave unaccounted for, revprop's beside captum's and zennit's
attributions: .venv-peers/.ready
	$(PEERS)/python benchmarks/attributions.py $(ARGS)

docs: .venv/.ready-docs
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

# torch first and alone: a looser request may draw another build
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.ready-test: .venv/.ready
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv/.ready-check: .venv/.ready-test
	$(BIN)/pip install -q -c constraints.txt -e ".[check]"
	touch $@

.venv/.ready-docs: .venv/.ready
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

# apart from the others: the mere presence of torchvision beside a CPU build of torch breaks other packages
.venv-peers/.ready: pyproject.toml constraints.txt
	test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install -q $$(grep '^torch==' constraints.txt)
	$(PEERS)/pip install -q -c constraints.txt -e ".[peers]"
	touch $@

clean:
	rm -rf .venv .venv-peers out docs/_build
