# Needs git, make and python3 >= 3.11; everything else goes into .venv (and, for a second interpreter, .venv-newest).

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
NEWEST := .venv-newest
# Of what is installed a tenth is imported: who imports it compiles it, and nothing is compiled by two processes.
PIP := -m pip --disable-pip-version-check --no-input --quiet install --no-compile
unexport PYTHONDONTWRITEBYTECODE
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# All root folders by name: ruff does not follow the links in coalesce/.
SOURCES := coalesce passes scheduler models experiments tests tools setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint interpreters newest pytest pytest-newest soak native clean

# One thing after the other, but for what `make test` does at once.
ifndef AT_ONCE
.NOTPARALLEL:
endif

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp  ## fuse a few tenants and show what happened
	@$(VENV)/bin/python -m experiments.demo

test: interpreters  ## lint, and the suite on python3, then on the newest interpreter found
	@$(MAKE) --no-print-directory -j 2 AT_ONCE=1 newest lint pytest
	@$(MAKE) --no-print-directory pytest-newest

lint: $(VENV)/test.stamp $(VENV)/lint.stamp  ## ruff, pyright, import-linter
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/pyright
	@$(VENV)/bin/lint-imports --no-logo

interpreters: | $(VENV)/bin/python
	@echo "First interpreter: $$($(VENV)/bin/python --version)"
	@if python=$$($(PYTHON) tools/newest_python.py --newer-than $(VENV)/bin/python 2>/dev/null); then \
	    echo "Second interpreter: $$($$python --version)"; \
	else \
	    echo "No newer interpreter on PATH or in pyenv: the suite runs on this one only."; \
	fi

pytest: $(VENV)/test.stamp  ## the suite on python3 alone
	@$(VENV)/bin/python $(PYTEST)

# After the first environment is there: both write what setuptools keeps beside the sources.
newest: | $(VENV)/test.stamp
	@if python=$$($(PYTHON) tools/newest_python.py --newer-than $(VENV)/bin/python 2>/dev/null); then \
	    $(MAKE) --no-print-directory PYTHON=$$python $(NEWEST)/test.stamp; \
	fi

pytest-newest: newest  ## the suite on the newest interpreter found, with the newest JAX
	@if $(PYTHON) tools/newest_python.py --newer-than $(VENV)/bin/python >/dev/null 2>&1; then \
	    $(NEWEST)/bin/python $(PYTEST) --hypothesis-profile quick --unchecked -m "not slow and not soak and not once"; \
	fi

soak: $(VENV)/test.stamp  ## the suite compiled as XLA does by itself, then the slow tests and many examples a property
	@$(VENV)/bin/python $(PYTEST) --xla own
	@$(VENV)/bin/python $(PYTEST) --xla own -m "slow or soak" --hypothesis-profile soak --timeout 0

native: $(VENV)/test.stamp  ## compile what the policy thinks with, in place, until `make clean` (needs a C compiler)
	@rm -f *__mypyc*.so scheduler/*.so
	@COALESCE_MYPYC=1 $(VENV)/bin/python $(PIP) --no-build-isolation --no-deps --editable .

clean:  ## remove what was built, the environments included
	rm -rf $(VENV) $(NEWEST) .cache .hypothesis .pytest_cache .ruff_cache .import_linter_cache .mypy_cache build dist *.egg-info *__mypyc*.so scheduler/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# DIR/EXTRA.stamp: the environment DIR holds the checkout (editable) and what the extra asks for.
%/bin/python:
	@python=$$($(PYTHON) tools/newest_python.py) && echo "Making $* with $$python" && $$python -m venv $*

.SECONDARY: $(VENV)/bin/python $(NEWEST)/bin/python

define STAMP
%/$(1).stamp: pyproject.toml | %/bin/python
	@echo "Installing coalesce-jax[$(1)] into $$*"
	@$$*/bin/python $$(PIP) --editable ".[$(1)]"
	@touch $$@
endef
$(foreach extra,demo test lint,$(eval $(call STAMP,$(extra))))

$(VENV)/lint.stamp: | $(VENV)/test.stamp
