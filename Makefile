# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One thread a process: two ranks on two cores, and sums that do not depend on the machine's size.
export OMP_NUM_THREADS ?= 1
# Of the soak: how long, and further options, such as SOAK="--seed 7 --launcher accelerate".
MINUTES ?= 60
SOAK ?=

.DEFAULT_GOAL := help
.PHONY: help demo test laws faults soak lint bench proof clean

help:
	@echo "make demo    draw pictures, build shards, train on two processes, evaluate, plot (5 minutes after the install)"
	@echo "make test    install and run the tests"
	@echo "make laws    the laws with every switch of the config on (a quarter of an hour)"
	@echo "make faults  break everything on purpose and write docs/faults.md"
	@echo "make soak    train through faults at random for an hour, or MINUTES=8, and compare with an undisturbed run"
	@echo "make lint    ruff and mypy"
	@echo "make bench   our speed beside our peers', in one run"
	@echo "make proof   the chain of teachers and student, and the long tail, on drawn pictures, three seeds (an hour and more)"
	@echo "make clean   delete the environment and what the demo made"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old, Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/demo.sh

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

laws: $(READY)
	$(BIN)/python -m pytest -m slow --ignore tests/faults -n auto --maxprocesses 8

faults: $(READY)
	FAULTS_PAGE=docs/faults.md $(BIN)/python -m pytest tests/faults -m 'slow or not slow' -n auto --maxprocesses 8

soak: $(READY)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(SOAK)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench

proof: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/proof.sh chain
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/proof.sh long_tail

clean:
	rm -rf .venv demo runs/demo runs/proof shards/demo shards/proof_* bench/.cache
