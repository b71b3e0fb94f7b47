# Every target does the set-up it needs, once. What a fresh machine must have: python3.11, git, make.
# With uv at hand: `uv lock && uv sync --frozen` (resolved anew), then the commands below behind `uv run`.

PYTHON     ?= python3.11
UV_VERSION := 0.13.9
UV         ?= .tools/bin/uv
RUN        := .venv/bin
SETUP      := .venv/.set-up

.PHONY: help setup quickstart eval test bench lint format lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(SETUP)  ## install everything, pinned, into .venv

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# What is installed is requirements.lock, by hash: a newer release on the index changes nothing. It is the committed view,
# without any address, of uv.lock, which names the index it was made from and is therefore generated and not committed.
$(SETUP): pyproject.toml requirements.lock | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python $(RUN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(RUN)/python --no-deps --editable .
	@touch $@

lock: $(UV)  ## resolve the dependencies anew and rewrite requirements.lock
	$(UV) lock
	$(UV) export --quiet --frozen --all-groups --no-emit-project --no-header --output-file requirements.lock

quickstart: $(SETUP)  ## fine-tune the real SmolLM2-135M as a token-weighted MTP model (about 8 minutes on 2 cores)
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash benchmarks/quickstart.sh

eval: $(SETUP)  ## evaluate the quickstart's model: heads, packaged tasks, 50 MBPP tasks where the data is
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash benchmarks/eval.sh

test: $(SETUP)  ## all tests
	$(RUN)/pytest

bench: $(SETUP)  ## loss, judge, decoding, scoring, storage, weights beside their alternatives; one JSON line per figure
	$(RUN)/python benchmarks/fused_loss.py
	$(RUN)/python benchmarks/judging.py
	$(RUN)/python benchmarks/generation.py
	$(RUN)/python benchmarks/scoring.py
	$(RUN)/python benchmarks/storage.py
	$(RUN)/python benchmarks/weighting_cost.py
	$(RUN)/python benchmarks/weighting_validity.py
	$(RUN)/python benchmarks/lora.py

lint: $(SETUP)  ## ruff, as CI runs it
	$(RUN)/ruff check . && $(RUN)/ruff format --check .

format: $(SETUP)  ## let ruff rewrite what it can
	$(RUN)/ruff check --fix . ; $(RUN)/ruff format .

clean:  ## remove what set-up made; runs and checkpoints stay
	rm -rf .venv .tools uv.lock
