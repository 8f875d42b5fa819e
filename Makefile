# `make train` and `make test` do all their set-up: a virtual environment in .venv with pinned dependencies.
# Arguments go through ARGS: make train ARGS="--train.steps 5", make test ARGS="-k equality".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= 4
# GPUs of `make train`, as CUDA_VISIBLE_DEVICES has them: none, since its four ranks and its figures are of the CPU.
DEVICES ?=
ARGS ?=

.PHONY: train test lint types clean paper api

train: $(READY)
	CUDA_VISIBLE_DEVICES=$(DEVICES) OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) -m flexsp train configs/quickstart.toml $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# docs/paper.md: the paper's claims beside predictions, ten minutes; with LENGTHS=FILE on your lengths, into runs/paper.
paper: $(READY)
	$(BIN)/python benchmarks/paper.py $(if $(LENGTHS),--lengths "$(LENGTHS)") $(ARGS)

# docs/api.md, from the docstrings.
api: $(READY)
	$(BIN)/python docs/make_api.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flexsp needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[train,datasets,tensorboard,milp,plot,dev]'
	@echo "Compiling the planner's kernels and the packages' Python, once ..."
	@$(BIN)/python -c 'import flexsp.train.run, transformers.models.llama.modeling_llama' & $(BIN)/python -c 'from flexsp.planner.kernels import load_kernels; load_kernels()' && wait
	@touch $@

clean:
	rm -rf $(VENV) runs
