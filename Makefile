# Needs Python 3.11 or newer and make, nothing else: every verb makes .venv with the tested versions first.

BOOTSTRAP ?= python3
VENV := .venv
# Verbs for a GPU take another Python that has torch already: make bench-kernels PYTHON=python3
PYTHON := $(VENV)/bin/python
OUT ?=
PIP := $(PYTHON) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
GPU_READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(BENCH_INSTALLED))

# Only a PROMPT given to make itself: shells and systems know an environment variable of that name. An empty one is
# passed on, and refused.
ifeq ($(origin PROMPT),command line)
export DEMO_PROMPT := $(value PROMPT)
else
unexport DEMO_PROMPT
endif
ARGS ?=
# How many tests run side by side; 0: one after the other, in one process (for a debugger).
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo demo-large test test-slow test-gpu families check check-compile bench bench-gpu bench-kernels paper figures clean

help:  ## List the verbs
	@echo 'make <verb>'
	@sed -n 's/^\([a-z-]*\):.*##/  \1 #/p' $(MAKEFILE_LIST) | awk -F ' # ' '{ printf "%-16s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## Make the virtual environment (the other verbs do so themselves)

demo: $(INSTALLED)  ## Run the packaged model from disk: make demo PROMPT="..." ARGS="--slots 0.5"
	@$(VENV)/bin/promoe-triton demo $(ARGS) $${DEMO_PROMPT+-- "$$DEMO_PROMPT"}

demo-large: $(INSTALLED)  ## The same model with experts of 9.4 MB; ARGS="--times-ram 1.25": larger than the RAM
	@$(VENV)/bin/promoe-triton demo --large $(ARGS) $${DEMO_PROMPT+-- "$$DEMO_PROMPT"}

# Without a GPU, also where there is one: what is tested and measured here is the way over RAM.
test: $(INSTALLED)  ## Run the tests that are not marked slow
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -m "not slow" -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(INSTALLED)  ## Run the tests marked slow
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest -m slow $(ARGS)

# Warnings are shown and fail nothing: they are of versions and drivers that nobody here has seen. With OUT all that is
# written goes there: caches, what was compiled, temporary files, and the outcome as tests.xml. What is compiled for other
# GPUs is not tested again on this one.
GPU_OUT = $(abspath $(OUT))
test-gpu: $(GPU_READY)  ## Run the kernels' tests on the GPU: make test-gpu PYTHON=python3 OUT=folder
	$(if $(OUT),mkdir -p $(GPU_OUT) && TRITON_CACHE_DIR=$(GPU_OUT)/cache/triton TORCHINDUCTOR_CACHE_DIR=$(GPU_OUT)/cache/inductor \
	  HYPOTHESIS_STORAGE_DIRECTORY=$(GPU_OUT)/cache/hypothesis PYTHONPYCACHEPREFIX=$(GPU_OUT)/cache/python) \
	  $(PYTHON) -m pytest -W default -W ignore::pytest.PytestConfigWarning \
	  $(if $(OUT),-o cache_dir=$(GPU_OUT)/cache/pytest --basetemp=$(GPU_OUT)/tmp --junitxml=$(GPU_OUT)/tests.xml) \
	  -m "gpu or not slow" $(filter-out %_compiled.py,$(wildcard tests/test_kernels*.py)) tests/test_gpu.py $(ARGS)

families: $(INSTALLED)  ## Run every MoE family and write the README's table of them
	CUDA_VISIBLE_DEVICES= $(PYTHON) -m pytest tests/test_families.py --families-report tests/families.json
	PYTHONPATH=tests $(PYTHON) tests/families_table.py

check: $(INSTALLED)  ## Check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check-compile: $(INSTALLED)  ## Compile the kernels for five GPUs without one and judge the code: ARGS="--target sm_90"
	$(PYTHON) bench/check_compile.py $(ARGS)

bench: $(BENCH_INSTALLED)  ## Measure on this machine; results go to bench/results
	CUDA_VISIBLE_DEVICES= $(PYTHON) bench/run.py $(ARGS)

bench-gpu: $(GPU_READY)  ## Measure copying ahead over the GPU's bus: make bench-gpu PYTHON=python3 OUT=folder ARGS="--minutes 8"
	$(PYTHON) bench/proactive_gpu.py $(if $(OUT),--out $(OUT)) $(ARGS)

bench-kernels: $(GPU_READY)  ## Measure the kernels on the GPU: make bench-kernels PYTHON=python3 OUT=folder ARGS="--minutes 8"
	$(PYTHON) bench/gpu/run.py $(if $(OUT),--out $(OUT)) $(ARGS)

paper: $(BENCH_INSTALLED)  ## Simulate the counterparts of the paper's tables and figures
	$(PYTHON) bench/paper/run.py $(ARGS)

figures: $(BENCH_INSTALLED)  ## Draw the figures from the results
	$(PYTHON) bench/figures.py $(ARGS)

clean:  ## Remove the virtual environment, caches and build outputs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON):
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(BOOTSTRAP) is $$($(BOOTSTRAP) --version 2>&1);" \
	    "name another with make BOOTSTRAP=python3.12" >&2; exit 1; }
	$(BOOTSTRAP) -m venv $(VENV)

# The order-only prerequisite: a new interpreter in .venv is no reason to install again, a missing one is.
$(INSTALLED): constraints.txt pyproject.toml | $(PYTHON)
	@echo 'Installing the tested versions into $(VENV) (a few minutes the first time)'
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	@$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@
