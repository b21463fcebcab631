# make help lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# What pip does by one processor, by all; some packages have files for other Pythons, which is no error.
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
ARGS ?=
EXTRAS = dev

.PHONY: help setup train test test-site test-all lint figures reproduce verify bench race explorer docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/complete ## make .venv and install everything (nothing to do when it is up to date)

.venv/complete: pyproject.toml setup.py constraints.txt $(wildcard src/fobmaml/engine/*.[ch])
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later is needed, and there is no python3.11 or python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python 3.11 or later is needed, and $(PYTHON) is {sys.version.split()[0]}")'
	@echo "installing into .venv (a minute or two, once)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) torch setuptools
	@rm -f src/fobmaml/engine/fused_*.so
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(COMPILE)
	@$(BIN)/python -c 'from fobmaml.engine import library; why = library.missing(); print(f"no compiled kernel, so gradients take longer: {why}\n" * bool(why), end="")'
	@touch $@

train: setup ## meta-train on MNIST-1D and measure it; settings: make train ARGS="estimator=maml steps=2000"
	@$(BIN)/python train.py $(ARGS)

# One more than there are processors: some tests wait.
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 4))')
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: setup .venv/sweeps ## run the tests; with SLOW=1 those that take minutes too, with SLOW=only these alone
	@$(PYTEST) -m "$(if $(filter only,$(SLOW)),slow and )not site and not nightly$(if $(SLOW),, and not slow)" $(ARGS)

test-site: setup .venv/docs .venv/chromium ## build the site, run its tutorials and open every page in a browser
	@$(PYTEST) -m "site and not nightly" $(ARGS)

test-all: setup .venv/docs .venv/chromium ## run all tests, the long forms of every night too
	@$(PYTEST) $(ARGS)

lint: setup ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

figures: setup ## redraw every figure, and the tables of the READMEs, from results/
	@$(BIN)/python scripts/figures.py

reproduce: setup .venv/digits ## run the experiments behind results/ again (what is complete is not run twice), then draw; FAST=1: small ones
	@$(if $(FAST)$(ARGS),,$(BIN)/python scripts/tune.py)
	@$(BIN)/python scripts/reproduce.py $(if $(FAST),--fast) $(ARGS)
	@$(if $(FAST),cp results/bench.csv results/nu_rule.csv results/race_curves.csv outputs/fast/)
	@$(BIN)/python scripts/figures.py $(if $(FAST),outputs/fast)

verify: setup ## run a little of the experiments again and compare it with results/
	@$(BIN)/python scripts/verify.py

bench: setup .venv/bench .venv/rate ## time and memory of one meta-gradient, other libraries' too, into results/; QUICK=1: a small try
	@$(BIN)/python benchmarks/meta_gradient.py $(if $(QUICK),--quick) $(ARGS)
	@$(if $(QUICK),,$(BIN)/python benchmarks/breakdown.py)
	@$(if $(QUICK),,$(BIN)/python benchmarks/processes.py)
	@$(if $(QUICK),,$(BIN)/python benchmarks/training_loop.py)
	@$(BIN)/python scripts/figure_time.py $(if $(QUICK),outputs/bench-quick)

race: setup .venv/sweeps ## which method takes the least work and time to an accuracy, tuned alike, into results/; hours, and goes on
	@$(BIN)/python benchmarks/race.py tune $(ARGS)
	@$(BIN)/python benchmarks/race.py run $(ARGS)
	@$(BIN)/python benchmarks/race.py time $(ARGS)
	@$(BIN)/python benchmarks/race.py collect $(ARGS)
	@$(BIN)/python scripts/figure_race.py

.venv/rate: benchmarks/rate.c benchmarks/setup.py .venv/complete
	@cd benchmarks && ../$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

explorer: setup .venv/explorer ## build the interactive page, outputs/explorer.html, and the pictures of it in results/
	@$(BIN)/python scripts/explorer.py

docs: EXTRAS = dev,docs
docs: setup .venv/docs ## build the site, outputs/site, which opens from disk: open outputs/site/index.html
	@$(BIN)/python scripts/documentation.py $(ARGS)

.venv/sweeps .venv/bench .venv/explorer .venv/docs .venv/digits: .venv/%: .venv/complete
	@echo "installing the packages for $* into .venv"
	@$(PIP) 'fobmaml[$*]'  # which is there
	@$(COMPILE)
	@touch $@

.venv/chromium: .venv/explorer
	@if $(BIN)/python -c 'import sys; sys.path.insert(0, "scripts"); import explorer; sys.exit(not explorer.chromium())' || \
	{ test "$$(id -u)" = 0 && apt-get --quiet=2 update && apt-get --quiet=2 install --yes chromium; } > .venv/chromium.log 2>&1 || \
	$(BIN)/playwright install chromium > .venv/chromium.log 2>&1; then touch $@; \
	else echo "no Chromium could be installed (.venv/chromium.log): the tests of the interactive page are skipped"; fi

clean: ## remove .venv, caches and what was compiled; outputs and results stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build benchmarks/build src/*.egg-info src/fobmaml/engine/*.so benchmarks/*.so
