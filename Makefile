# `make demo` and `make test` work as the first command: whatever is missing is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_UPSTREAM := $(VENV)/.installed-upstream
RELEASE ?= training/release
TINY_REPOS := build/tiny-repos
# `make drift`: where its environments are, and the tests that touch most of what other libraries may change
DRIFT ?= build/drift
DRIFT_TESTS := tests/test_registry.py tests/test_compatibility.py \
	tests/test_hub_loading.py tests/k20/test_hub.py tests/k22/test_loading.py tests/k3/test_loading.py \
	tests/conversion/test_convert.py tests/k21/test_golden_pipelines.py tests/k3/test_quantization.py \
	tests/test_cards.py tests/test_hub.py tests/test_hub_pipelines.py tests/test_generation.py \
	tests/test_examples.py
INPUTS ?= 20000

.PHONY: help install demo examples test test-gpu fuzz drift drift-oldest drift-newest upstream-tests check format bench clean

help:
	@echo "make demo     convert the tiny Kandinsky 2.1 of training/ and draw a page of pictures, into demo_output/"
	@echo "make examples run each script of examples/ on tiny repositories, into example_output/"
	@echo "make test     run the tests (ARGS='-k prior -x' goes to pytest)"
	@echo "make test-gpu run the tests that need a CUDA device"
	@echo "make drift    test with the oldest and with the newest versions that setup.cfg admits (ARGS=tests: all tests)"
	@echo "make fuzz     read hostile files, INPUTS=20000 of them (CASE=zip:17: one alone), figures into build/fuzz.json"
	@echo "make upstream-tests DIFFUSERS=CHECKOUT"
	@echo "              run diffusers' own tests of Kandinsky on our classes (ARGS=--stock: on stock's)"
	@echo "make check    lint, formatting, types"
	@echo "make format   let ruff repair what it can"
	@echo "make bench    time, memory and difference against stock diffusers, at full size (ARGS='--only prior': of that)"
	@echo "make install  only prepare $(VENV)"
	@echo "make clean    remove what the others left behind, except $(VENV)"

install: $(INSTALLED)

# the stamp makes every later call quick, and a changed dependency install again
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(INSTALLED_UPSTREAM): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[upstream]'
	@touch $@

# one thread: for tiny models more would only wait for each other
demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1 $(BIN)/kandinsky-diffusers demo $(RELEASE) $(ARGS)

examples: $(INSTALLED)
	@rm -rf $(TINY_REPOS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.support.tiny_repos $(TINY_REPOS)
	@for script in examples/*.py; do \
		HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error \
		$(BIN)/python $$script --repos $(TINY_REPOS) --output example_output --size 128 --steps 4 || exit 1; done

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu --numprocesses=0 tests/gpu $(ARGS)

# both, even if the first one fails
drift:
	$(MAKE) --keep-going drift-oldest drift-newest

# made anew each time, as the newest versions are others every day
drift-oldest drift-newest: drift-%: $(INSTALLED)
	rm -rf $(DRIFT)/$*
	$(BIN)/python -m venv $(DRIFT)/$*
	$(BIN)/python -m tests.support.dependencies $* > $(DRIFT)/$*/constraints.txt
	$(DRIFT)/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(DRIFT)/$*/constraints.txt -e '.[test]'
	$(DRIFT)/$*/bin/python -m pytest $(or $(ARGS),$(DRIFT_TESTS))

fuzz: $(INSTALLED)
	@mkdir -p build
	KANDINSKY_FUZZ=$(INPUTS) KANDINSKY_FUZZ_CASE="$(CASE)" KANDINSKY_FUZZ_REPORT=build/fuzz.json \
		$(BIN)/python -m pytest -m fuzz --numprocesses=0 tests/fuzz $(ARGS)

upstream-tests: $(INSTALLED_UPSTREAM)
	@test -n "$(DIFFUSERS)" || { echo "Name a checkout: make upstream-tests DIFFUSERS=path/to/diffusers" >&2; exit 1; }
	$(BIN)/python tests/upstream/run.py "$(DIFFUSERS)" $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ARGS="--only prior,2.2 --repeats 3", see `python -m benchmarks --help`
bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist demo_output example_output benchmark_output *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
