# The two commands: `make quickstart` sets up and trains a small model; `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
EVAL_INSTALLED := $(VENV)/eval-installed
BENCH_INSTALLED := $(VENV)/bench-installed
# Each xdist worker computes with one thread: two-thread torch beside another busy process is many times slower.
WORKERS ?= 2
# What `make bench` runs: make bench PART=kernels
PART ?= training kernels sweep distributed checkpoints scoring analysis

.PHONY: quickstart test test-slow test-gpu check format bench clean

quickstart: $(INSTALLED)
	$(RUN) -m engram.data prepare configs/quickstart.yaml
	$(RUN) train.py configs/quickstart.yaml
	$(RUN) -m eval report runs/quickstart

# With lm-eval, whose adapter it tests.
test: $(EVAL_INSTALLED)
	$(RUN) -m pytest -n $(WORKERS) -m "not slow"

# Real dimensions and long runs, one process after the other: one of them needs 13 GiB.
test-slow: $(INSTALLED)
	$(RUN) -m pytest -n 0 -m slow

# Installs nothing: name the Python of a machine with a GPU and its own torch.
test-gpu:
	$(PYTHON) -m pytest -m gpu

check: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -p no:cacheprovider tests/test_imports.py

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# One part after the other, so that none disturbs another's times.
bench: $(BENCH_INSTALLED)
	@set -e; for part in $(PART); do $(RUN) -m benchmarks.$$part; done

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(EVAL_INSTALLED): $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[eval]'
	touch $(EVAL_INSTALLED)

# Peers that only benchmarks compare with.
$(BENCH_INSTALLED): $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	touch $(BENCH_INSTALLED)

clean:
	rm -rf $(VENV) data runs build *.egg-info
