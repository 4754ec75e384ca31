# Words: setup demo test check bench zoo gpu docs. Each does its own set-up; nothing outside .venv changes.
# Needs Python 3.11 or newer and make. Another interpreter: make PYTHON=python3.12 test
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where torch comes from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench zoo gpu docs

help:
	@echo "make demo   prove, on this machine, that the degree does not change the bits"
	@echo "make test   run the tests, two files at a time (WORKERS=4: four; ORDER=random:7: shuffled)"
	@echo "make check  ruff, mypy, and whether every file of tests can be imported"
	@echo "make bench  measure side by side with plain torch, and time the cases"
	@echo "make zoo    plan, cut and prove every model of four lists of transformers; writes docs/zoo.md"
	@echo "            (STEPS='plain', LISTS='causal image': only these; LIMIT=60: seconds for each)"
	@echo "make gpu    run the GPU tests, prove the cases and measure on a GPU; writes docs/gpu.md"
	@echo "            (less than 8 minutes; exits with 2 where there is no CUDA device)"
	@echo "make docs   API documentation into build/docs"
	@echo "make setup  only install what these need, into $(VENV)"

setup: $(STAMP)

# $(call step,text,command): prints the text, runs the command, and prints the size of the environment
# every 20 seconds until it ends. Fails if the command fails. `sleep` may outlive the step, so it must
# not hold the output.
define step
	@echo "setup $(1)"; \
	( while sleep 20 >/dev/null 2>&1; do \
	    echo "  still running: $$(du -sm $(VENV) | cut -f1) MB in $(VENV)"; done ) & ticker=$$!; \
	  $(2); code=$$?; kill $$ticker; exit $$code
endef
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
COMMA := ,
MODULES_IN_C := $(notdir $(wildcard csrc/*))

# torch goes first, at the pinned version, so that no other package can pull another build of it.
# pip is asked for, not python: an interrupted set-up can leave the one without the other.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shardproof needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	    "Choose another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setup: $(VENV) will have 1.7 GB; that takes some minutes, once"
	$(call step,1 of 4: $(VENV) with $(PYTHON),\
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV))
	$(call step,2 of 4: $(TORCH) and what it needs (0.8 GB; more where it comes with CUDA),\
	  $(PIP) '$(TORCH)')
	$(call step,3 of 4: shardproof itself; builds the C modules $(MODULES_IN_C) where there is a compiler,\
	  $(PIP) --no-deps -e .)
	$(call step,4 of 4: the packages for tests and demo: pytest ruff mypy transformers scikit-learn and what they need (0.9 GB),\
	  $(PIP) 'shardproof[demo$(COMMA)dev]')
	@touch $@
	@echo "setup: done"

# By name, so that the demo stays at a minute: without a name, `prove` runs the language models too.
DEMO_CASES = matmul-row matmul-column ffn linear-column linear-row mlp-gathered digits

demo: $(STAMP)
	$(BIN)/shardproof prove --degrees 1,2,3,8 $(DEMO_CASES:%=--case %)
	$(BIN)/shardproof prove --case gpt --layouts tp=1,2:dp=1,2:sequence=off,on --steps 2

# Files, not tests, are shared out: what a file makes once for all its tests is made once. A test
# that kills its worker ends the run; by itself xdist would start it again eight times.
WORKERS ?= 2

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(if $(ORDER),--order $(ORDER))

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --collect-only -qqq

bench: $(STAMP)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.case_times

STEPS ?= prove
LISTS ?=
LIMIT ?= 60

zoo: $(STAMP)
	@mkdir -p build
	$(BIN)/python -m zoo.run $(STEPS:%=--step %) $(LISTS:%=--list %) --limit $(LIMIT) --workers $(WORKERS) --json build/zoo.jsonl \
	  $(if $(LISTS),,--page docs/zoo.md)

gpu: $(STAMP)
	$(BIN)/python -m gpu.run

# Every module by name: on its own pdoc shows only what `__all__` has.
MODULES = $(shell cd src && find shardproof -name '*.py' ! -name '__*' | sed 's/\.py$$//; s|/|.|g' | sort)

docs: $(STAMP)
	$(BIN)/pdoc --docformat google --output-directory build/docs shardproof $(MODULES)
