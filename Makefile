# Python 3.11 or newer and make are all that has to be there. `make help` lists the targets.

PYTHON ?= python3
# A GPU box has a torch of its own: `make gpu` needs neither .venv nor a network.
GPU_PYTHON ?= python3
OUT ?= benchmarks/results
FAMILIES ?= mixtral qwen3_moe deepseek_v3 gpt_oss
BIN := .venv/bin
STAMP := .venv/.moespec-setup

.DEFAULT_GOAL := help
.PHONY: help setup conformance test check docs docs-serve browser notebooks lab bench matrix gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r name what; do printf 'make %-13s %s\n' "$$name" "$$what"; done

setup: $(STAMP) ## make .venv with everything the other targets need (nothing to do if unchanged)

$(STAMP): pyproject.toml constraints.txt .ci/setup_venv.py
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' is not a command here;" \
		"moespec needs Python 3.11 or newer: make setup PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) .ci/setup_venv.py
	@touch $(STAMP)

conformance: setup ## check this project's kernels and the layers of Hugging Face transformers
	@$(BIN)/moespec check optimized $(FAMILIES:%=transformers/%-grouped_mm)

# One test process per core; threads of torch within each would only wait for each other.
test: setup ## run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations=12

check: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: notebooks ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: notebooks ## build the documentation, show it on 127.0.0.1:8000, and again after each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

browser: setup ## open every page of site/ in a headless Chromium; `make docs` makes it
	$(BIN)/python -m pytest docs/tests

notebooks: setup ## run every notebook that has changed from the first cell to the last
	$(BIN)/python docs/run_notebooks.py

lab: setup ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/01_gating.ipynb

bench: setup ## time the experts on this processor, and dry-run the timing matrix of `make gpu`
	$(BIN)/python benchmarks/cpu_experts.py --operation forward
	$(BIN)/python benchmarks/cpu_experts.py --operation training
	$(BIN)/python benchmarks/gpu.py --device cpu --dry-run --out build/bench

matrix: setup ## check every library of benchmarks/libraries.toml (LIBRARY=name for one); needs a network
	$(BIN)/python benchmarks/libraries.py $(LIBRARY)

gpu: ## on a GPU box, at most nine minutes: conformance, then the timing matrix, as JSON into OUT
	@$(GPU_PYTHON) -c "import torch" 2>/dev/null || { echo "'$(GPU_PYTHON)' has no torch:" \
		"make gpu GPU_PYTHON=/path/to/python; see benchmarks/README.md"; exit 1; }
	PYTHONPATH="$(CURDIR)/reference:$(CURDIR)/optimized:$(CURDIR)/conformance$${PYTHONPATH:+:$$PYTHONPATH}" \
		timeout --kill-after=5 535 $(GPU_PYTHON) benchmarks/gpu.py --device cuda \
		--conformance 200 --seconds 510 --out "$(OUT)"

clean: ## remove what was built; .venv stays
	rm -rf build dist site moespec-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
