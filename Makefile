# Every target sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# All of this is for CPUs; with libtpu installed JAX would look for a TPU first.
export JAX_PLATFORMS ?= cpu

.PHONY: demo demo-music demo-images demo-copy test test-all lint bench audit clean

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# And the TPU compiler, which needs no TPU.
.venv/all: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tpu]'
	touch $@

# What asks about packages is no part of them.
.venv/audit: .venv/bin/python constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt pip-audit
	touch $@

demo: .venv/demo  ## train, evaluate and sample on real books, on a CPU
	$(BIN)/python tools/demo.py --what=books --workdir=runs/demo

demo-music: .venv/demo  ## the same on piano performances
	$(BIN)/python tools/demo.py --what=music --workdir=runs/demo-music

demo-images: .venv/demo  ## the same on tiles of photographs
	$(BIN)/python tools/demo.py --what=images --workdir=runs/demo-images

demo-copy: .venv/demo  ## the same on copies of 1,024 tokens
	$(BIN)/python tools/demo.py --what=copy --workdir=runs/demo-copy

# Two processes, a file's tests in one of them: compiling uses one core.
test: .venv/dev  ## the quick tests
	$(BIN)/pytest -n 2 --dist loadfile

# And whoever is done first takes over: of these some take minutes. One more
# than there are cores, as jobs of several processes often wait for each other.
test-all: .venv/all  ## every test, the slow ones too
	$(BIN)/pytest -n 3 --dist worksteal -m ''

lint: .venv/dev  ## style, imports, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/dev  ## timings, as shares of this machine's matmul rate
	$(BIN)/python tools/benchmark.py

audit: .venv/audit  ## known vulnerabilities of the pinned packages
	$(BIN)/python tools/audit.py

clean:
	rm -rf .venv runs
