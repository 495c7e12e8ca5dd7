# Two targets for users: `make compare` and `make test`. Both set up .venv themselves. Those of a
# GPU set up nothing: PYTHON is one that has a CUDA build of PyTorch.
PYTHON ?= python3
BIN := .venv/bin
# The environment is stale when these change, or when the folder or the interpreter moved.
SOURCES := pyproject.toml constraints.txt Makefile src/gatedffn/__init__.py
HERE := $(shell $(PYTHON) -c "import sys, pathlib; print(sys.version.split()[0], pathlib.Path.cwd())")
# The newest transformers 4 with what it needs older than 5 does, laid over the environment.
OLD := .venv/transformers4
OLD_TESTS := $(addprefix tests/interop/test_replace,.py _left.py _training.py)
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL = $(PIP) install -c constraints.txt

# Of `make gpu`: the folder, the same in each call, and the minutes of a call. `make gpu-tests` ends
# after so many seconds.
GPU_OUT ?= gatedffn-gpu
GPU_MINUTES ?= 9
GPU_TESTS ?= 540
ON_GPU = PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} TRITON_INTERPRET=0

.PHONY: help compare test check format gpu gpu-tests wheel
help:
	@echo "make compare   which feed-forward should I use? eight variants on real text, about eight minutes"
	@echo "               (OPTIONS='--data my.txt' passes options on; see $(BIN)/gatedffn compare --help)"
	@echo "make test      the whole test suite"
	@echo "make check     lint, types, import directions"
	@echo "make wheel     a wheel in dist/, with the CPU kernels compiled for this system"
	@echo "make gpu       on a machine with a GPU: checks it, measures, searches; nine minutes, again to go on"
	@echo "               (PYTHON=... has PyTorch with CUDA and the bench-gpu extra)"
	@echo "make gpu-tests the tests of the kernels on that GPU, in at most nine minutes"
	@echo "               (PYTHON=... has pytest and hypothesis too)"

compare: .venv/compare.stamp
	@$(BIN)/gatedffn compare $(OPTIONS)

# One thread a worker: several that share the cores spend their time waiting for each other.
test: .venv/dev.stamp
	@echo "running the tests on every core"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(OPTIONS)
	@echo "the GPU kernels in Triton's interpreter, which has processes of its own"
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto tests/gpu
	@echo "once more with the models of transformers 4"
	@OMP_NUM_THREADS=1 PYTHONPATH=$(OLD) $(BIN)/python -m pytest -q -n auto $(OLD_TESTS)

check: .venv/dev.stamp
	@echo "checking lint, format, types and the direction of imports"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

wheel: .venv/here
	@echo "compiling the kernels into a wheel in dist/"
	@$(PIP) wheel -c constraints.txt --no-deps --wheel-dir dist .

# Each step is written as it is done, and the same command goes on where it was cut off.
gpu:
	@$(ON_GPU) $(PYTHON) -m gatedffn.bench.gpu_run --out $(GPU_OUT) --minutes $(GPU_MINUTES)

# Most of their time is the compiler's, on one core of each process; what only compiles needs no GPU.
gpu-tests:
	@at_once=$$($(PYTHON) -c 'import xdist; print("-n auto")' 2>/dev/null); \
	  $(ON_GPU) timeout -s INT -k 20 $(GPU_TESTS) $(PYTHON) -m pytest -q $$at_once tests/gpu \
	    --ignore-glob='*_compiled.py'

format: .venv/dev.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# .venv/here holds the interpreter's version and the folder; a difference rebuilds everything.
ifneq ($(shell cat .venv/here 2>/dev/null),$(HERE))
.PHONY: .venv/here
endif
.venv/here:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; set PYTHON=')"
	@if [ -e .venv ] && [ ! -e .venv/here ] && [ ! -e .venv.making ]; then \
	  echo ".venv was not made by this Makefile: move it away"; exit 1; fi
	@echo "making a new environment in .venv"
	@touch .venv.making
	@$(PYTHON) -m venv --clear .venv
	@echo "$(HERE)" > $@
	@rm .venv.making

.venv/compare.stamp: .venv/here $(SOURCES)
	@echo "installing what the comparison needs into .venv (a minute with a warm package cache)"
	@$(INSTALL) -e '.[compare]'
	@touch $@

# These declare packages whose CUDA builds break transformers beside a CPU build of torch, or that
# nothing here uses. Their layers are tested without them.
.venv/dev.stamp: .venv/here $(SOURCES)
	@echo "installing what the tests need into .venv (a minute with a warm package cache)"
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps timm xformers torchtune litgpt
	@$(PIP) install --no-deps --upgrade \
	  --target $(OLD) transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 datasets==3.6.0
	@touch $@
