# Everything from a fresh clone with Python >= 3.11, pip, a C/C++ compiler and make:
#   make demo    convert a bundled model, run it with stock llama-cpp-python and with us, compare
#   make test    lint and tests
# The first run builds llama-cpp-python (minutes, all cores); its wheel is kept for other clones, see bootstrap.py.

# The first interpreter that runs and is new enough (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
NATIVE := $(wildcard cpatch/*.c cpatch/*.h cpatch/*.py)

.PHONY: demo test test-long test-levels test-cross lint setup sources clean distclean

demo: setup
	$(BIN)/powerinfer demo

test: setup sources lint
	$(BIN)/python -m pytest -q

test-long: setup sources lint
	$(BIN)/python -m pytest -q --run-long

# Everything again with the kernels of lesser CPUs, and in C alone. Levels: see kernels.h.
test-levels: setup sources
	for level in avx2 portable; do POWERINFER_KERNELS=$$level $(BIN)/python -m pytest -q || exit 1; done

# Needs clang, a compiler for 64-bit ARM and an emulator of it (it says which packages); ARM's kernels run emulated.
test-cross: setup
	$(BIN)/python -m pytest -q --run-cross -m cross

lint: setup
	$(BIN)/ruff check .

setup: $(STAMPS)/installed

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "powerinfer-ext needs Python 3.11 or newer: install it, or run make with PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

# Builds llama-cpp-python where it is missing, out of range or crashes when it decodes.
$(STAMPS)/dependency: $(STAMPS)/venv bootstrap.py pyproject.toml powerinfer_ext/amx_tile_fix.h powerinfer_ext/compiler.py powerinfer_ext/probe.py
	$(BIN)/python bootstrap.py
	touch $@

$(STAMPS)/installed: $(STAMPS)/dependency setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# Headers and tests of the dependency that our tests compare with.
sources: $(STAMPS)/installed
	$(BIN)/python bootstrap.py --sources

clean:
	rm -rf build dist *.egg-info powerinfer_ext/*.so $(STAMPS)/installed

distclean: clean
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis
