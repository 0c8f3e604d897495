# Everything runs in a virtual environment of its own, installed through the tested set in constraints.txt.
# PIP_ARGS is passed to every pip install, e.g. make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= auto
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: demo test check claims bench docs readme clean

demo: $(VENV)/.core
	$(BIN)/dynakern compare forecast $$($(BIN)/python -c "from dynakern.data import sample; print(sample('ETTh1.csv'))") \
		--protocol ett --seeds 1 --budget 30s --jobs 2 --out dynakern-demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

claims: $(VENV)/.dev
	$(BIN)/python -m dynakern.claims --record docs/results --html dynakern-claims.html

bench: $(VENV)/.dev
	$(INSTALL) -e ".[bench]"
	for file in benchmarks/*/*.py; do $(BIN)/python $$file --record docs/results || exit 1; done

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

readme: $(VENV)/.dev
	$(BIN)/python docs/readme.py

clean:
	rm -rf $(VENV) docs/_build build dist dynakern-demo dynakern-claims.html

# torch first: with it present, no other requirement can bring a build with several GB of GPU libraries.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) -e ".[dev]"
	touch $@
