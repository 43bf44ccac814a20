# Needs Python 3.11 or newer, pip and make; a C++ compiler if there is one. Everything else goes into .venv.
PYTHON ?= $(shell scripts/find_python.sh first)
NEWEST ?= $(shell scripts/find_python.sh newest)
PYTEST_ARGS ?= -n 2
# Wheels for other processors, and how long each fuzz target runs.
ZIG_TARGETS ?= aarch64-linux-gnu.2.17
SECONDS ?= 600

# What an installation depends on. Python files are not among them: the install is editable, and the native library
# is built into embax/kernels/_native.
INSTALLED := pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*.cc csrc/*.map) $(shell find third_party -type f)

.PHONY: docs train test lint native nightly bench bench-peers wheels wheel-check sanitize fuzz clean

train: .venv/train.stamp
	.venv/bin/embax train completejourney --overwrite

test: lint
	EMBAX_QUICK_COMPILE=1 .venv/bin/python -m pytest $(PYTEST_ARGS) -m "not slow and not nightly and not optimized"
	.venv/bin/python -m pytest $(PYTEST_ARGS) -m "optimized"
	$(MAKE) docs
ifneq ($(NEWEST),)
	$(MAKE) .venv-newest/test.stamp
	@.venv-newest/bin/python -c "import sys, jax; print('embax: again on Python', sys.version.split()[0], 'jax', jax.__version__)"
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS) -m "not slow and not nightly and not once"
else
	@echo "embax: skipped the tests on the newest jax: no Python newer than $(PYTHON) was found"
endif

lint: .venv/test.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python

native: .venv/test.stamp

# The site, in build/site; whatever does not resolve is an error. With --quiet it would not be one.
docs: .venv/test.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

nightly: .venv/test.stamp
	EMBAX_EXAMPLES=200 .venv/bin/python -m pytest $(PYTEST_ARGS) -m "not once"
ifneq ($(NEWEST),)
	$(MAKE) .venv-newest/test.stamp
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS) -m "slow or nightly or once"
endif

bench: .venv/test.stamp
	.venv/bin/python -m benchmarks

# The peers of `python -m benchmarks.cpu`; without them their columns stay empty.
bench-peers: .venv/test.stamp
	.venv/bin/python -m pip install --quiet --editable '.[benchmarks]'
	.venv/bin/python -m pip install --quiet --no-deps fbgemm-gpu-cpu==1.8.0

# By the system's compiler for this processor, by ziglang's for the other.
wheels: .venv/test.stamp
	rm -rf build/wheel dist
	.venv/bin/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl
	.venv/bin/python -m pip install --quiet ziglang
	PYTHON=.venv/bin/python scripts/zig_wheels.sh dist $(ZIG_TARGETS)

wheel-check:
	PYTHON="$(PYTHON)" NEWEST="$(NEWEST)" scripts/wheel_check.sh

sanitize:
	scripts/sanitize.sh

fuzz:
	scripts/fuzz.sh $(SECONDS)

clean:
	rm -rf .venv .venv-newest build dist embax/kernels/_native

# $(1): folder, $(2): interpreter. Debian's Python may come without ensurepip: then the outer pip fills the new one.
define make_venv
	$(2) -m venv $(1) || { $(2) -m venv --without-pip $(1) && $(2) -m pip --python $(1)/bin/python install pip; }
endef

.venv/bin/python:
	$(call make_venv,.venv,$(PYTHON))

.venv-newest/bin/python:
	$(call make_venv,.venv-newest,$(NEWEST))

.venv/train.stamp: $(INSTALLED) | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[train]'
	touch $@

.venv/test.stamp: $(INSTALLED) | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[test,dev]'
	touch $@ .venv/train.stamp

# One native library serves every Python: the first environment has built it into the checkout.
.venv-newest/test.stamp: $(INSTALLED) .venv/test.stamp | .venv-newest/bin/python
	.venv-newest/bin/python -m pip install --quiet --editable '.[test]' --config-settings=wheel.cmake=false
	touch $@
