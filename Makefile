# Two commands: `make demo` and `make test`. Everything lives in .venv; the second call sets nothing up.
#
#   PYTHON            the Python 3.11 or 3.12 to use                  (default: the first that runs)
#   HARDWARE          cpu or gpu: which lock to install               (default: gpu if nvidia-smi works)
#   TORCH_INDEX_URL   index that has torch's CPU build                (default: PyTorch's own)
#   TORCH_FIND_LINKS  folder of wheels that has it, instead of an index
#   ARGS              more flags for demo, lab, train and soak

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
ifndef HARDWARE
HARDWARE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
export TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

LOCK = requirements/$(HARDWARE).lock
KEY := $(shell cat requirements/*.lock requirements/install.py pyproject.toml | cksum | cut -d' ' -f1)
READY = $(VENV)/.ready-$(HARDWARE)-$(KEY)
TESTABLE = $(READY)-test

.DEFAULT_GOAL := help
.PHONY: help setup demo test lab train soak lock clean

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## only set .venv up

demo: $(READY) ## ten recommendations for one user, through the whole line (sets .venv up first)
	@$(PY) -m hstu_lab recommend --strategy unified $(ARGS)

test: $(TESTABLE) ## style, kernels, unit tests, every notebook, widgets in a browser; test-STEP runs one of style, kernels, unit, notebooks, browser
	@$(PY) tests/run.py

test-%: $(TESTABLE)
	@$(PY) tests/run.py $*

lab: $(READY) ## JupyterLab on the first notebook
	@$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_start_here.ipynb $(ARGS)

train: $(READY) ## train the small preset on the synthetic world for five minutes
	@$(PY) -m hstu_lab train $(ARGS)

soak: $(READY) ## trouble for the service, then every strategy in a loop: ten minutes, watching memory, latency and answers
	@$(PY) tests/soak.py $(ARGS)

lock: $(READY) ## resolve requirements/*.in into the locks again (UPGRADE=1: newest versions)
	@$(PY) requirements/lock.py $(if $(UPGRADE),--upgrade)

clean: ## remove .venv, caches and reports; data stays
	rm -rf $(VENV) .build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(READY):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 here. Install one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv;\
	 elsewhere: conda create -n py311 python=3.11) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(SUPPORTED)' || { echo "$(PYTHON) does not run or is no Python 3.11 or 3.12: set PYTHON to one" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: sudo apt-get install $(notdir $(PYTHON))-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) from $(LOCK) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(PY) requirements/install.py $(LOCK) --project
	@rm -f $(VENV)/.ready-*
	@touch $@

$(TESTABLE): | $(READY)
	@$(PY) requirements/install.py requirements/test.lock
	@$(PY) -c "import sys; from hstu_lab.environment import chromium; sys.exit(chromium() is None)" || $(PY) -m playwright install chromium \
	 || echo "No Chromium: the browser tests will fail; install one, e.g. sudo apt-get install chromium" >&2
	@touch $@
