# Everything runs in $(VENV), which make sets up on first use, with what the target needs and no more.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -P -m pip --disable-pip-version-check -qq

# Containers often set it, and each of the thousands of processes that tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

CAPTURES = $(sort $(wildcard tests/data/captures/*/*.npz))

.PHONY: help
help: ## say what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "  PYTHON=python3.12 chooses the Python (3.11 or newer) that a new $(VENV) is made with."

# Linux keeps its tables without DBM: there, a writable leaf is a dirty one.
.PHONY: harvest
harvest: $(VENV)/.user ## harvest the captures in tests/data into build/harvest, and check them
	@test -n "$(CAPTURES)" || { echo "there are no captures in tests/data/captures" >&2; exit 1; }
	@set -e; for capture in $(CAPTURES); do \
	  case $$capture in */kvm-*) policy=writable;; *) policy=dbm;; esac; \
	  out=build/harvest/$${capture#tests/data/captures/}; \
	  echo "== $$capture"; \
	  $(BIN)/hwdbm harvest $$capture --policy $$policy --check --output $${out%.npz}; \
	done

.PHONY: migrate
migrate: $(VENV)/.user ## move a machine that keeps writing to another process, with 4K pages and with 2M blocks
	$(BIN)/hwdbm migrate --memory 256M
	$(BIN)/hwdbm migrate --memory 256M --thp

.PHONY: test
test: $(VENV)/.dev ## run the tests, but for those that take long
	$(BIN)/python -P -m pytest --numprocesses auto -m "not slow" $(PYTEST_ARGS)

# Tests of the tests, tests that emulate an Arm machine, and some that repeat a kind of `make test` at another point.
.PHONY: slow
slow: $(VENV)/.dev ## run the tests that take long
	$(BIN)/python -P -m pytest --numprocesses auto -m slow $(PYTEST_ARGS)

.PHONY: cover
cover: $(VENV)/.dev ## run the tests, and report what they cover: it takes longer
	$(BIN)/python -P -m pytest --numprocesses auto --cov --cov-report=term $(PYTEST_ARGS)

# Ten times as many random examples as `make test` asks: some twenty minutes on two cores.
EFFORT ?= 10
THOROUGH = tests/test_doors.py tests/test_bitmap.py tests/stage2/test_stage2.py tests/stage2/test_stage2_machine.py \
  tests/stage2/test_stage2_interrupted.py tests/stage2/test_contiguous.py tests/stage2/test_layout.py tests/kernels tests/image/test_errors.py \
  tests/dirtylog/test_model.py tests/dirtylog/test_interrupts.py tests/machine/test_twin.py tests/image/test_synthetic.py tests/image/test_live.py tests/migration/test_stream.py tests/kvm

.PHONY: thorough
thorough: $(VENV)/.dev ## run the tests that draw at random, EFFORT times as long
	HWDBM_EFFORT=$(EFFORT) $(BIN)/python -P -m pytest --numprocesses auto $(THOROUGH) $(PYTEST_ARGS)

# Random mutants of the package, each against the tests that cover it: an hour for 300 on two cores. It goes on where it
# was stopped. SAMPLE and SEED choose others.
SAMPLE ?= 300
SEED ?= 1

.PHONY: mutants
mutants: $(VENV)/.dev ## do the tests bite? random mutants of the package against them
	$(BIN)/python tests/mutants/run.py --sample $(SAMPLE) --seed $(SEED) --least 0.95 $(MUTANTS_ARGS)

.PHONY: races
races: $(VENV)/.dev ## prove the protocols over every order of their steps, find each known mistake, and try their mutants
	$(BIN)/hwdbm races
	HWDBM_RACES=all $(BIN)/python -P -m pytest --numprocesses auto tests/races $(PYTEST_ARGS)

# More at a time than there are processors: they wait for a peer that says nothing.
.PHONY: handover
handover: $(VENV)/.dev ## cut the link, and kill either side, at every message of a migration
	HWDBM_HANDOVER=all $(BIN)/python -P -m pytest --numprocesses 4 tests/migration/test_handover.py $(PYTEST_ARGS)

# What is right for as long, and then each known mistake, which a second or two finds.
SECONDS ?= 180

.PHONY: stress
stress: $(VENV)/.dev ## compiled vCPUs beside all that changes their tables, for SECONDS
	HWDBM_STRESS=$(SECONDS) $(BIN)/python -P -m pytest -s --numprocesses 0 tests/stage2/test_hardware.py $(PYTEST_ARGS)

.PHONY: soak
soak: $(VENV)/.user ## migrate a real guest a hundred times back and forth; needs /dev/kvm
	$(BIN)/python tests/kvm/soak.py --migrations 100

# 100 kills and a minute of a real guest: SNAPSHOTS_ARGS="--kills 20 --seconds 60". The full disk needs leave to mount.
.PHONY: snapshots
snapshots: $(VENV)/.user ## kill, fill the disk of, and merge chains of snapshots, and take them of a guest that migrates
	$(BIN)/python -P tests/snapshot/stress.py $(SNAPSHOTS_ARGS)

.PHONY: traces
traces: $(VENV)/.user ## record the larger corpus of write traces into build/traces: a quarter of an hour; needs /dev/kvm
	$(BIN)/python -P tests/trace/corpus.py build/traces

.PHONY: fleet
fleet: $(VENV)/.user ## forecast 10,000 VMs on Dask (two minutes are the goal), and plan how to drain their rack
	$(BIN)/python -P tests/fleet/large.py $(FLEET_ARGS)

# Needs QEMU and an Arm cross compiler: apt-get install qemu-system-arm gcc-aarch64-linux-gnu.
.PHONY: live
live: $(VENV)/.user ## migrate a running Arm machine by its own tables, and lose pages by each known mistake
	$(BIN)/python -P tests/arm/live.py $(LIVE_ARGS)

.PHONY: layouts
layouts: $(VENV)/.dev ## judge every layout of stage-2 tables by an emulated MMU
	HWDBM_LAYOUTS=1 $(BIN)/python -P -m pytest --numprocesses auto tests/arm/test_layouts.py $(PYTEST_ARGS)

# Needs QEMU for x86 and gcc; Linux guests are made of Debian's packages, some 60 MB, which stay in build/forecast.
# JUDGE_ARGS="--only redis" chooses guests. As root what is judged goes first, over links as slow as they are said to be.
.PHONY: judge
judge: $(VENV)/.user ## forecast more than 60 real migrations, do them, and write both; some 20 minutes
	$(BIN)/python -P tests/forecast/judge.py --output tests/data/forecast/runs.jsonl $(JUDGE_ARGS)
	$(BIN)/python -P tests/forecast/page.py

.PHONY: judge-quick
judge-quick: $(VENV)/.user ## a few of them in two minutes, whose errors must be within bounds
	$(BIN)/python -P tests/forecast/judge.py --quick

.PHONY: forecast-guests
forecast-guests: $(VENV)/.user ## make the guests of the judge, Linux among them
	$(BIN)/python -P tests/forecast/guests.py

.PHONY: linux-traces
linux-traces: $(VENV)/.user ## record traces of Linux that does real work, into build/traces: ten minutes
	$(BIN)/python -P tests/forecast/traces.py build/traces

.PHONY: firmware
firmware: $(VENV)/.user ## compile the Arm machine's firmware; it is done by itself where it is needed
	$(BIN)/python -P -c 'from hwdbm.arm.build import firmware; print(len(firmware()), "bytes of firmware")'

.PHONY: lint
lint: $(VENV)/.dev ## ruff, mypy --strict, and the layers of the imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(VENV)/.dev ## build the documentation and run its examples; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	$(BIN)/python -P -m pytest -q --numprocesses auto docs/test_pages.py
	@echo "build/docs/index.html"

.PHONY: pages
pages: docs ## look at every page of the documentation in headless Chromium (Debian's chromium, chromium-driver)
	$(BIN)/python -P -m pytest -q --numprocesses auto docs/test_rendered.py $(PYTEST_ARGS)
	@echo "screenshots: build/pages"

.PHONY: bench
bench: $(VENV)/.user ## measure the kernels here and now
	$(BIN)/hwdbm bench

# asv's own processes are to import nothing from the current folder either.
ASV = PYTHONSAFEPATH=1 $(abspath $(BIN))/python -m asv

# Of those that harvest 64 GiB by how much is dirty, at one point: the others cost a minute and a half.
.PHONY: asv
asv: $(VENV)/.dev ## run each asv benchmark once, so that none can rot
	cd asv_bench && $(ASV) machine --yes >/dev/null
	cd asv_bench && $(ASV) run --quick --show-stderr --python=same --launch-method forkserver \
	  --bench '^(?!engine\.Harvest\.\w+\((?!0\.01,))'

.PHONY: asv-history
asv-history: $(VENV)/.dev ## measure the landmarks of main by asv, and publish its site in build/asv
	PYTHONSAFEPATH=1 $(BIN)/python asv_bench/history.py publish
	@echo "build/asv/index.html"

.PHONY: asv-compare
asv-compare: $(VENV)/.dev ## compare HEAD with the last landmark, interleaved, in one run
	PYTHONSAFEPATH=1 $(BIN)/python asv_bench/history.py compare

.PHONY: clean
clean: ## remove what was built, and the caches; the environment stays
	rm -rf build dist docs/_build docs/api docs/commands docs/json asv_bench/env asv_bench/results asv_bench/html
	rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find dbm tests docs asv_bench -name __pycache__ -prune -exec rm -rf {} +

# The stamps lie inside of the environment, so that they go when it goes. The install is editable: only a change
# of pyproject.toml, never one of the sources, calls for another.
$(VENV)/.user: pyproject.toml | $(BIN)/pip
	$(PIP) install --editable '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.user

# pip is the last thing that venv puts there, so an interrupted attempt is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "there is no '$(PYTHON)'; set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hwdbm needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1);" \
	         "set PYTHON to another" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' can't make virtual environments (no ensurepip): install your system's" \
	         "python3-venv package, or set PYTHON to another Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
