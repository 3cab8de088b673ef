# The commands of this project. `make help` lists them; `python dreamer.py --help` explains the training program.

VENV := .venv
BIN := $(VENV)/bin
PYTEST ?= $(BIN)/python -m pytest
export VENV PYTHON

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train setup test test-slow lint tensorboard clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'train takes CONFIGS="block ..." TASK=name LOGDIR=folder ARGS="--key value ..." EXTRAS="atari ...", for example'
	@echo '  make train CONFIGS=dmc_proprio TASK=dmc_cartpole_swingup ARGS="--steps 1e5"'
	@echo 'Without CUDA, dmc_proprio_fast and dmc_vision_fast take the place of dmc_proprio and dmc_vision, and the block cpu (small network,'
	@echo 'light batches) is added to others. NO_CPU_BLOCK=1 prevents it.'
	@echo 'PYTHON=python3.12 chooses the interpreter of the virtual environment.'

# Set-up. A stamp is newer than what it was made from, so what is done is not done again.

INSTALLED := $(VENV)/installed
EXTRAS ?=
EXTRAS_INSTALLED := $(EXTRAS:%=$(INSTALLED)-%)

$(VENV)/made: scripts/setup.sh
	@scripts/setup.sh venv && touch $@

$(INSTALLED): $(VENV)/made requirements.txt constraints.txt
	@scripts/setup.sh install requirements.txt && touch $@

$(INSTALLED)-%: $(INSTALLED) requirements/%.txt
	@scripts/setup.sh install requirements.txt requirements/$*.txt && touch $@

$(INSTALLED)-%:
	@scripts/setup.sh install requirements/$*.txt

$(VENV)/render: $(INSTALLED) scripts/check_render.py
	@scripts/setup.sh render $@

# Not `export MUJOCO_GL`: the name is known only once the set-up is done.
RENDER = MUJOCO_GL=$${MUJOCO_GL:-$$(cat $(VENV)/render)}

setup: $(INSTALLED) $(EXTRAS_INSTALLED) $(VENV)/render ## make the virtual environment and check rendering

# Training

CONFIGS ?= dmc_vision
TASK ?=
LOGDIR ?=
ARGS ?=
NO_CPU_BLOCK ?=
# Blocks that are small already. For a CPU they stay as they are.
SMALL = cpu debug cues sound_small babyai_small exploration dmc_proprio_fast dmc_vision_fast
# Blocks that have a sibling made for a CPU, NAME_fast, which takes their place. To others the block `cpu` is added, before a size that was asked for by name.
FAST = dmc_proprio dmc_vision
SLOW = $(filter $(FAST),$(CONFIGS))
CPU_CONFIGS = $(if $(SLOW),$(foreach name,$(CONFIGS),$(name)$(if $(filter $(FAST),$(name)),_fast)),$(filter-out size%,$(CONFIGS)) cpu $(filter size%,$(CONFIGS)))
CPU_REMARK = $(if $(SLOW),$(SLOW:%=%_fast) takes the place of $(SLOW),the block cpu is added)
WANTS_CPU = $(if $(NO_CPU_BLOCK)$(filter $(SMALL),$(CONFIGS)),,yes)

train: setup ## set up, then train (the same command resumes)
	@configs="$(CONFIGS)"; \
	if [ -n "$(WANTS_CPU)" ] && ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  configs="$(CPU_CONFIGS)"; \
	  echo 'No CUDA: $(CPU_REMARK) (small network, light batches). NO_CPU_BLOCK=1 prevents it.'; \
	fi; \
	set -- $(BIN)/python dreamer.py --configs $$configs $(if $(TASK),--task "$(TASK)") $(if $(LOGDIR),--logdir "$(LOGDIR)") $(ARGS); \
	export $(RENDER); \
	echo "$$*"; \
	exec "$$@"

# Development

test: setup $(INSTALLED)-test ## set up, then run the tests (a few minutes)
	@$(RENDER) $(PYTEST) -n auto --dist worksteal -m "not slow" -q -rs

test-slow: setup $(INSTALLED)-test ## the tests that take long
	@$(RENDER) $(PYTEST) -m slow -q -rs

lint: $(INSTALLED)-test ## check the style
	@$(BIN)/ruff check .

tensorboard: setup ## curves, videos and predictions of the runs in logdir (or in LOGDIR)
	@$(BIN)/tensorboard --logdir $(or $(LOGDIR),logdir)

clean: ## remove the virtual environment and caches (runs in logdir stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
