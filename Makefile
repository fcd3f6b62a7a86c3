# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual environment if it is
# missing. Where Python's own torch sees a GPU, the environment uses that torch; elsewhere it takes the CPU build
# of the version below, because plain `torch` brings several GB of CUDA packages along.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifeq ($(shell uname -sm),Linux x86_64)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

.PHONY: demo test test-thorough conformity lint doctor bench clean help

help:
	@echo "make demo            replay a mixed load under every policy; results in demo-out/"
	@echo "make test            lint and all tests (no GPU needed)"
	@echo "make test-thorough   the same with many more random examples"
	@echo "make conformity      every architecture of transformers; writes docs/models.md"
	@echo "make doctor          what this machine has, and a self-test of the operator"
	@echo "make bench           the torch backend and the engine against transformers, on this CPU"

# Half of the requests are urgent, so that two cores see enough of both kinds in 14 seconds a policy: with this
# seed 12 urgent and 10 best-effort ones, the latter with prompts of 1,000 to 3,000 tokens.
DEMO_ARGS ?= --rate 1.2 --ls-fraction 0.5 --duration 14 --seed 15

# Two lanes share the cores: an OpenMP thread that spins while it waits takes the core that the other lane needs.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(VENV)/.installed
	$(BIN)/qllm replay --preset demo --out demo-out $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest

test-thorough: lint
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest

conformity: $(VENV)/.installed
	$(BIN)/python tests/conformity.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

doctor: $(VENV)/.installed
	$(BIN)/qllm doctor

bench: $(VENV)/.installed
	$(BIN)/python perf/bench_torch_moe.py
	$(BIN)/python perf/bench_engine.py

$(VENV)/.installed: pyproject.toml Makefile
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		echo "Using this machine's own torch, which sees a GPU."; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	elif $(PYTHON) -m venv $(VENV) && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		$(BIN)/pip install --quiet '$(TORCH)' || { \
			echo; echo "No index that pip knows offers $(TORCH). Either name PyTorch's CPU index (see \"Get Started\""; \
			echo "on pytorch.org) in PIP_EXTRA_INDEX_URL, or choose another build: make TORCH=torch==2.13.0 ..."; \
			exit 1; }; \
	fi
	$(BIN)/pip install --quiet --editable '.[plots,test]'
	@touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info .pytest_cache .ruff_cache .hypothesis
