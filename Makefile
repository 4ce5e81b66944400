# make help lists the targets. The environments are made on first use and made anew when their pins change.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BENCH := .venv-bench
DOCS := .venv-docs
RUN ?= runs/demo
# pytest processes, each with one thread: faster than one process with many. Compiled modules are kept whatever the
# environment says: tests start dozens of processes, and half of the time to collect tests goes into compiling them.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n auto --maxprocesses=8 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format bench bench-quick notebooks docs release-check clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## inspect a trained network on handwritten digits; prints the path of the report
	$(VENV)/bin/curvature inspect digits-cnn --out $(RUN) --overwrite

test: lint ## lint, then all tests (PYTEST_ARGS="-k lanczos" narrows them)
	$(TEST) $(PYTEST_ARGS)

check: lint ## lint, and the tests of what changed
	$(TEST) -x $$($(VENV)/bin/python tests/changed.py)

lint: $(VENV)/.ready ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready ## rewrite the sources as ruff would have them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(BENCH)/.ready ## measure against other libraries, in parts; again to continue (PARTS="eigen-gpt noise" picks)
	$(BENCH)/bin/python -m benchmarks.common.parts $(PARTS)

bench-quick: $(VENV)/.ready ## measure a few rows again and say what moved (3 minutes)
	$(VENV)/bin/python -m benchmarks.common.quick

notebooks: $(VENV)/.ready ## execute the notebooks and write their .ipynb
	$(VENV)/bin/python notebooks/execute.py

docs: $(VENV)/.ready $(DOCS)/.ready ## build the site into site/: code is run, links are followed, every page is looked at
	$(TEST) -q tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q
	$(VENV)/bin/python docs/look.py

release-check: $(VENV)/.ready ## build the wheel, install and use it on every supported Python there is (minutes each)
	RELEASE_CHECK=1 $(VENV)/bin/python -m pytest -q -s -rs tests/test_install.py

clean: ## remove environments, runs and caches
	rm -rf $(VENV) $(BENCH) $(DOCS) runs site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch first, by version and with its own dependencies; the lock after it, without, since the lock is complete; this
# project last, built by the setuptools of the lock. See requirements/lock.txt.
$(VENV)/.torch $(BENCH)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'The pinned environment needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install $(TORCH)
	touch $@

$(VENV)/.lock: requirements/lock.txt $(VENV)/.torch
	$(@D)/bin/python -m pip install --no-deps -r requirements/lock.txt
	touch $@

$(BENCH)/.lock: requirements/lock.txt requirements/benchmark.txt $(BENCH)/.torch
	$(@D)/bin/python -m pip install --no-deps -r requirements/lock.txt -r requirements/benchmark.txt
	touch $@

$(VENV)/.ready $(BENCH)/.ready: %/.ready: pyproject.toml %/.lock
	$(@D)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --no-deps -r requirements/docs.txt
	touch $@
