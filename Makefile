# Everything starts from a bare clone and needs nothing by hand.
#   make demo       install, draw scenes, train, evaluate, predict: the whole system in ten minutes on a laptop CPU
#   make test       install what tests need, lint, test         make test-all   the slow tests too
#   make drills     kills, damage and hostile files, for up to an hour
#   make docs       the documentation as a site, in site/
#   make scenes     the larger recipe: 550 concepts, up to an hour on two cores

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := $(VENV)/.demo
READY  := $(VENV)/.ready
export TOKENIZERS_PARALLELISM = false

.PHONY: demo scenes test test-all run-test run-test-all drills lint style types docs install clean
.DEFAULT_GOAL := test

install: $(READY)

# Created once, and again when the requirements change. uv downloads and unpacks in parallel; pip is the fallback.
UV ?= $(shell command -v uv || echo $(BIN)/uv)
INSTALL = $(UV) pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable $(1) || \
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable $(1)

$(DEMO): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	-command -v $(UV) >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(call INSTALL,'.[scenes]')
	touch $@

$(READY): $(DEMO)
	$(call INSTALL,'.[dev]')
	touch $@

lint: style types

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(READY)
	$(BIN)/mypy

# Types are checked beside the tests, which often wait for processes of theirs.
test test-all: style
	@$(MAKE) --no-print-directory --jobs 2 types run-$@

# Compiled once, not by each of their processes, also where the environment says that nothing is to be written.
run-test run-test-all: export PYTHONDONTWRITEBYTECODE =

# Two test processes with two threads each would stall each other on two cores. A file runs in one process.
run-test run-test-all: export OMP_NUM_THREADS = 1

run-test:
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

run-test-all:
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''

# Kills, damage, hostile files and requests: up to an hour; its table is in docs/reliability.md.
drills: $(READY)
	$(BIN)/python experiments/drills.py

demo: $(DEMO)
	$(BIN)/nxtp prepare scenes --out data/shards/demo --concepts 100 --train 20800 --val 1000 --val-style 1000
	$(BIN)/nxtp train experiment=demo
	$(BIN)/nxtp evaluate model=runs/demo/model data=scenes data.root=data/shards/demo out=runs/demo semantic=null
	$(BIN)/nxtp predict data/shards/demo/examples --model runs/demo/model --top-k 3 --attention runs/demo/attention.png
	@$(BIN)/python experiments/demo.py runs/demo

scenes: $(DEMO)
	$(BIN)/python data/scenes.py
	$(BIN)/nxtp train experiment=scenes
	$(BIN)/nxtp evaluate model=runs/scenes/model data=scenes out=runs/scenes

# The site of docs/, in site/; a broken link is an error. Nothing is fetched.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/mkdocs build
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache site
