# Three commands do everything on a fresh machine; each makes its own virtual environment.
#   make demo        train a small model, quantize it per head, verify it, compare its accuracy
#   make demo-real   a real model from PyPI in five schemes, each loaded in transformers (and, with
#                    VLLM_PYTHON, in vLLM) and held against what `ckptq evaluate` says
#   make test        all tests (no network, no GPU)
# make test-newest runs what reads models, recipes and sources with the newest transformers and
# compressed-tensors, which llm-compressor does not take yet, in an environment of its own.
# make figures puts the figures of benchmarks/results into README and docs (benchmarks/figures.py).
# make engine-table VLLM_PYTHON=... asks a vLLM what it does with each architecture (docs/engines.md).
# make ci-example runs examples/ci/run.sh, the steps of a CI job, on a trained model: one line of its
# task has 19 tokens, and lines joined are nothing that it knows. VLLM_PYTHON runs it in vLLM too
# (SCHEME=kv-fp8 where that has no kernel for FP8 experts).

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
BIN = $(VENV)/bin
DEMO ?= demo
REAL ?= real
FAMILY ?= llama
SCHEME ?= fp8
# of make bench and bench-kernels: write results files too
RECORD ?= --record benchmarks/results

export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1
# Empty: compiled modules are kept. Tests start many processes, which would each compile ckptq.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo demo-real ci-example engine-table test test-newest lint test-gpu test-engines bench \
    bench-kernels figures clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/python examples/make_checkpoint.py --family $(FAMILY) $(DEMO)/$(FAMILY)
	$(BIN)/ckptq quantize $(DEMO)/$(FAMILY) --scheme fp8-per-head -o $(DEMO)/per-head \
	    --data $(DEMO)/$(FAMILY)/calibration.txt --seq-len 64
	$(BIN)/ckptq quantize $(DEMO)/$(FAMILY) --scheme fp8-per-tensor -o $(DEMO)/per-tensor \
	    --data $(DEMO)/$(FAMILY)/calibration.txt --seq-len 64
	$(BIN)/ckptq verify $(DEMO)/per-head --source $(DEMO)/$(FAMILY)
	$(BIN)/python examples/swap_heads.py $(DEMO)/per-head $(DEMO)/swapped
	$(BIN)/python examples/accuracy.py $(DEMO)/$(FAMILY) $(DEMO)/per-head $(DEMO)/per-tensor \
	    $(DEMO)/swapped

demo-real: $(VENV)/installed
	$(BIN)/python examples/real_model.py $(REAL)
	$(BIN)/python examples/real_demo.py $(REAL)

ci-example: export PATH := $(abspath $(BIN)):$(PATH)
ci-example: export SEQ_LEN ?= 19
ci-example: $(VENV)/installed
	test -d $(DEMO)/$(FAMILY) || \
	    $(BIN)/python examples/make_checkpoint.py --family $(FAMILY) $(DEMO)/$(FAMILY)
	rm -rf $(DEMO)/ci $(DEMO)/ci-refused
	bash examples/ci/run.sh $(DEMO)/$(FAMILY) $(DEMO)/ci $(SCHEME)-per-head
	@echo "and its twin, one scale for all heads, which has to be refused:"
	bash examples/ci/run.sh $(DEMO)/$(FAMILY) $(DEMO)/ci-refused $(SCHEME)-per-tensor; \
	    test $$? -eq 1

# A file stays in one process: its fixtures, and what it compiles, are made once. Files keep their
# order, by which those of a folder share more, and the longest come first (tests/conftest.py).
test: $(VENV)/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
	    --no-loadscope-reorder

test-newest: $(NEWEST)/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist loadfile \
	    tests/recipes tests/models tests/plan tests/checkpoint tests/quantize \
	    tests/calibrate/test_calibrate_shared_cache.py tests/convert/test_convert_fp8_sources.py \
	    tests/convert/test_convert_stream.py tests/convert/test_convert_push.py

$(NEWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[real]' \
	    'pytest>=8' 'pytest-xdist>=3' 'hypothesis>=6' \
	    'transformers>=5.24' 'compressed-tensors>=0.20' 'huggingface_hub>=2'
	touch $@

engine-table: $(VENV)/installed
	test -n "$(VLLM_PYTHON)" || { echo "VLLM_PYTHON: name a Python that has vLLM"; exit 2; }
	PYTHONPATH=tests $(BIN)/python -m families.sources $(DEMO)/families
	$(VLLM_PYTHON) ckptq/engines/extract_vllm $(DEMO)/observations.jsonl $(DEMO)/families/*
	$(BIN)/python -m ckptq.engines.tabulate $(DEMO)/observations.jsonl ckptq/engines

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu:
	$(PYTHON) -m pytest tests/kernels tests/calibrate/test_calibrate_gpu.py tests/evaluate/test_evaluate_gpu.py \
	    tests/convert/test_convert_gpu.py \
	    tests/convert/test_convert_foreign_gpu.py tests/gptq/test_gptq_signs.py

# VLLM_PYTHON names the Python of an environment that has vLLM; its CPU build is enough
test-engines: $(VENV)/installed
	test -n "$(VLLM_PYTHON)"
	VLLM_PYTHON=$(VLLM_PYTHON) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engine

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench_convert.py $(RECORD)

figures:
	$(PYTHON) benchmarks/figures.py

bench-kernels:
	$(PYTHON) benchmarks/bench_kernels.py $(RECORD)
	$(PYTHON) benchmarks/bench_attention.py $(RECORD)
	$(PYTHON) benchmarks/bench_calibrate.py $(RECORD)
	$(PYTHON) benchmarks/bench_calibrate.py --shape llama4 --samples 32 $(RECORD)

clean:
	rm -rf $(VENV) $(NEWEST) $(DEMO) $(REAL)
