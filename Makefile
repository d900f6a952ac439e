# make demo   train, predict and evaluate on synthetic cases, on a CPU
# make test   all tests that need no GPU
# make nightly  the long tests: thousands of drawn cases, mutated files, kills and steps (docs/reliability.md)
# make sanitize  the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint   ruff and mypy
# make docs   the documentation as a web site in site/
# make gpu    all tests and benchmarks that need a GPU, with $(PYTHON) as it is: no set-up, no network;
#             PART=tests, ops, bench or sanitize runs that part alone; bench goes on where ops stopped, and ops too
#             with RESUME=1; what was said is in OUT/PART.log
# make clean  remove what was built here; the virtual environment too
#
# demo, test, nightly, lint and docs set up their own virtual environment first.

VENV := .venv
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.14.1
JOBS ?= 2
OUT ?= bench/results
PART ?=

# The workers of pytest share the cores already.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# Tests of Triton kernels, run by Triton's interpreter in a process of their own.
INTERPRETED := $(wildcard tests/test_*_triton.py) tests/test_channelwise.py tests/test_norm_tables.py

.PHONY: demo test nightly sanitize lint docs gpu clean setup lock licences check-abi

demo: setup
	$(VENV)/bin/python -m focusnet.demo demo

test: setup
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(JOBS) -m "not gpu and not large and not nightly" tests
	TRITON_INTERPRET=1 $(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(JOBS) -m "not gpu and not large and not nightly" $(INTERPRETED)

nightly: setup
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(JOBS) -m nightly -rP tests
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(JOBS) --hypothesis-profile nightly --durations 0 tests/test_properties.py

# The C++ kernels' own tests, and drawn cases of every op. torch.compile does not come back under the sanitizers.
sanitize: setup
	$(ONE_THREAD) tools/sanitize.sh $(VENV)/bin/python -m "not gpu and not large and not nightly" -k "not compile" \
	    $(patsubst csrc/%.cpp,tests/test_%.py,$(wildcard csrc/*.cpp)) tests/test_properties.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -q

gpu:
	tools/gpu.sh "$(PYTHON)" "$(OUT)" "$(PART)"

clean:
	rm -rf $(VENV) build dist site *.egg-info focuskernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup: $(VENV)/.installed

$(VENV)/.dependencies: requirements.lock tools/setup_venv.sh
	tools/setup_venv.sh $(VENV) $(TORCH_VERSION) "$(PYTHON)"
	touch $@

# Compiled apart from pip, which would hide what is said about kernels that were left out.
$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml setup.py $(wildcard csrc/*)
	rm -f focuskernels/_C*.so
	$(VENV)/bin/python setup.py -q build_ext --inplace
	FOCUSKERNELS_BUILD=0 $(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Its packages are no part of the lock, and of nobody else's set-up.
$(VENV)/.docs: pyproject.toml | setup
	FOCUSKERNELS_BUILD=0 $(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[docs]'
	touch $@

# Needs uv. torch stays out of the lock: see requirements.in.
lock:
	echo torch | uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --excludes - \
	    --extra dev pyproject.toml requirements.in -o requirements.lock

# Needs uv.
licences: setup
	tools/licences.sh $(VENV)/bin/python docs/licences.md

# One wheel, built once, tried under several versions of torch; each is downloaded into an environment of its own.
check-abi: setup
	tools/check_wheel.sh $(VENV)/bin/python $(TORCH_VERSIONS)
