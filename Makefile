# make demo | test | test-all | sanitize | lint | bench. Each sets up what it needs: a virtual
# environment in $(VENV) with torch and the package built in it. `make PYTHON=python3 VENV= test`
# uses the current interpreter instead and installs nothing but this package.
PYTHON ?= python3
VENV ?= .venv
# 2.13.0 is the version this is measured with; any torch >= 2.10 works: make TORCH=torch test
TORCH ?= torch==2.13.0
# A CUDA build of torch brings the triton it is made for, and keeps it; beside a CPU build this one
# interprets the kernels in the tests.
TRITON ?= triton==3.7.1
# More options of pytest-benchmark: make bench BENCH="--benchmark-compare
# --benchmark-compare-fail=median:5%" holds the suites against the last saved run.
BENCH ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMPS := build/stamps
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
endif

SOURCES := $(shell find csrc python -type f) CMakeLists.txt pyproject.toml
RUN := OMP_NUM_THREADS=$(shell nproc) $(PY) -m
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(shell nproc)

.PHONY: demo test test-all sanitize lint bench clean

demo: $(STAMPS)/package
	$(RUN) emo_kernels demo

test: $(STAMPS)/package
	$(PYTEST) -m "not slow"

test-all: $(STAMPS)/package $(STAMPS)/peers
	$(PYTEST)

# The cpu kernels under AddressSanitizer and UndefinedBehaviorSanitizer. The interpreter's own leaks
# are not looked for; symbols of libtorch take longer to read than the tests.
SANITIZERS = $(foreach l,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(l)))
SANITIZED = build/sanitize

sanitize: $(STAMPS)/package
	PATH=$(abspath $(VENV)/bin):$$PATH cmake -S . -B $(SANITIZED) -G Ninja \
	  -DCMAKE_BUILD_TYPE=Release -DEMO_SANITIZE=ON \
	  -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	PATH=$(abspath $(VENV)/bin):$$PATH cmake --build $(SANITIZED) --target _C
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:symbolize=0 OMP_NUM_THREADS=1 \
	  $(PY) tests/sanitized.py $(SANITIZED)

lint: $(STAMPS)/package
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc python tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(if $(strip $(VENV)),$(VENV)/bin/)clang-format --dry-run --Werror

# A quarter of an hour, whatever the machine: what comes too late is named.
bench: $(STAMPS)/package $(STAMPS)/peers
	$(PY) -m pytest bench/bench_operators.py bench/bench_models.py -q -rs --minutes 4.5 \
	  --benchmark-storage=build/bench --benchmark-autosave $(BENCH)
	$(PY) bench/bench_cpu.py --minutes 9

$(STAMPS)/dependencies: pyproject.toml
ifneq ($(strip $(VENV)),)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet "cmake>=3.24" ninja
ifeq ($(shell uname -s),Linux)
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)"
endif
endif
	mkdir -p $(STAMPS) && touch $@

# Editable: Python changes are live, C++ changes rebuild here.
$(STAMPS)/package: $(STAMPS)/dependencies $(SOURCES)
ifeq ($(strip $(VENV)),)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/editable -e .
else
	$(PY) -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=3.0"
	PATH=$(abspath $(VENV)/bin):$$PATH $(PY) -m pip install --quiet --no-build-isolation \
	  -Cbuild-dir=build/editable -e ".[dev]"
endif
	touch $@

$(STAMPS)/peers: $(STAMPS)/package
ifneq ($(strip $(VENV)),)
	$(PY) -m pip install --quiet ".[bench]" --no-build-isolation
endif
	touch $@

clean:
	rm -rf build $(VENV)
