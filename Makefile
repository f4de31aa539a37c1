# Everything a newcomer or a CI server runs. Needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Ways in which one CPU can be told to sum, threads last. A commit that is green in one of them only is not done.
ARITHMETICS := ATEN_CPU_CAPABILITY=default,OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2,OMP_NUM_THREADS=2 \
	ONEDNN_MAX_CPU_ISA=SSE41,MKL_CBWR=COMPATIBLE,OMP_NUM_THREADS=2 ONEDNN_MAX_CPU_ISA=AVX2,OMP_NUM_THREADS=1
# What depends on it: everything that measures. Judging, rendering and the command line do not.
ARITHMETIC := tests/house/test_demo.py tests/judge/test_precision.py tests/probe tests/qwen3 tests/watcher \
	tests/generate/test_generate.py tests/diagnose/test_explain.py \
	tests/diagnose/test_causes.py::test_the_cause_the_layer_and_the_operation_are_named_exactly \
	tests/rescue/test_rescue.py::test_the_demo_is_rescued_and_nearer_to_fp32_than_a_quarter_of_bf16 \
	tests/rescue/test_rescue.py::test_the_error_is_that_of_the_same_model_with_a_small_stream_to_begin_with

.DEFAULT_GOAL := help
.PHONY: help demo test portable lint types docs check bench format golden clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP) ## set up, then probe the demo checkpoint (fp16 fails, as it must) and show the run again
	$(BIN)/qprec probe demo -o qprec-demo.json --fail-on never
	$(BIN)/qprec report qprec-demo.json --fail-on never > /dev/null

test: $(STAMP) ## set up, then the full test suite
	$(BIN)/python -m pytest

portable: $(STAMP) ## what measures, under four arithmetics (two at a time); see ARITHMETICS
	@printf '%s\n' $(ARITHMETICS) | tr , ' ' | xargs -P 2 -I {} sh -c 'said=$$(env OMP_WAIT_POLICY=passive {} $(BIN)/python -m pytest \
		-p no:cacheprovider $(ARITHMETIC) 2>&1); code=$$?; printf "== %s\n%s\n" "{}" "$$said"; exit $$code'

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

docs: $(STAMP) ## README and help agree
	$(BIN)/python -m pytest tests/house/test_docs.py

check: lint types test docs ## all that CI runs

bench: $(STAMP) ## speed and memory, as ratios (minutes; set QPREC_BENCH_DIR for room on another disk)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python scripts/bench.py

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## write the expected outputs of the tests anew; read the diff
	$(BIN)/python -m pytest --update-golden

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache qprec-demo.json qprec-run.json
