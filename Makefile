# Each target starts from a bare Python >= 3.10; `make demo` and `make test` are the two a newcomer needs.
# STACK=next: on the torch and Triton of constraints-next.txt, in an environment of its own.
PYTHON ?= python3
STACK ?= official
$(if $(filter official next,$(STACK)),,$(error STACK: '$(STACK)' is not one of official, next))
VENV := .venv$(if $(filter next,$(STACK)),-next)
BIN := $(VENV)/bin
RANKS := $(shell [ "$$(nproc 2>/dev/null || echo 1)" -ge 2 ] && echo 2 || echo 1)

.PHONY: install test check lint settings demo compare heldout gpu faults clean

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -e '.[dev]' -c constraints.txt
	touch $@

# Composer forbids a newer torch, and pip cannot be told otherwise: all else is resolved first, Composer laid beside it.
.venv-next/.installed: setup.py constraints.txt constraints-next.txt
	$(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|mosaicml)==' constraints.txt > $(VENV)/others.txt
	$(BIN)/pip install --quiet --progress-bar off -r constraints-next.txt -r $(VENV)/others.txt
	$(BIN)/pip install --quiet --progress-bar off --no-deps mosaicml -e . -c constraints.txt
	touch $@

install: $(VENV)/.installed

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What to run after an edit: all tests but those that are slow or start programs.
check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --quick

# Writes docs/settings.md and the schemas of the YAMLs from the settings' classes; a test compares.
settings: install
	$(BIN)/python -m tests.settings

# Two processes of one thread each: faster on small tensors than one of two threads; the draws are the same.
demo compare heldout: export OMP_NUM_THREADS = 1

# Converts scikit-learn's digits, trains for a few minutes on the CPU, scores 1, 2 and 4 steps, then finishes the
# weights by the Frechet distance and scores them again. Each part is skipped when it is done already.
demo: install
	$(BIN)/python -m streaming_convert digits --out data/digits
	$(BIN)/composer -n $(RANKS) recipe/train.py yamls/digits.yaml
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits.yaml
	$(BIN)/composer -n $(RANKS) recipe/train.py yamls/digits_frechet.yaml
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits_finish.yaml

# The same network and about the same training time with every other objective: a table with the demo's result, and
# the one-step distance over the training time.
compare: demo
	for objective in flow_matching meanflow imf; do \
		$(BIN)/composer -n $(RANKS) recipe/train.py yamls/digits_$$objective.yaml || exit; done
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits_compare.yaml
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits_compare_time.yaml

# The digits run without a fifth of the digits, and its finish: are samples new, or copies of what it has seen?
heldout: install
	$(BIN)/python -m streaming_convert digits --out data/digits_heldout --val 0.2
	$(BIN)/composer -n $(RANKS) recipe/train.py yamls/digits_heldout.yaml
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits_heldout.yaml
	$(BIN)/composer -n $(RANKS) recipe/train.py yamls/digits_heldout_frechet.yaml
	$(BIN)/composer -n 1 eval/sweep.py yamls/eval/digits_heldout_finish.yaml

# Measures on a GPU what can be measured there, ten minutes at most for each of seven stages, and writes one page to
# benchmarks/results. The same command goes on where it stopped.
gpu: install
	$(BIN)/python -m benchmarks.gpu

# Kills, preempts and damages real runs; about 30 minutes. Writes the table of docs/faults.md.
faults: install
	$(BIN)/python -m tests.faults docs/faults.md

clean:
	rm -rf $(VENV) data/digits data/digits_heldout runs
