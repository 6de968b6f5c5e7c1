# make train   from nothing to a trained model and its report
# make test    from nothing to all tests
#
# make test-slurm  a Slurm cluster on this machine, and training on it (root; docs/launch.md says which packages)
# make test-network  two hosts joined by a cable: pulled, slow, losing packets (root, network namespaces)
# make test-memory  a rank that the kernel kills for memory (root, a memory cgroup, no swap)
# make test-image  the CPU image: built, trained in, in one container and two (root)
#
# TARGET=cpu|cuda      which lock file (default: cuda where nvidia-smi answers)
# TORCH_INDEX=<index>  a package index of smaller, CPU-only torch wheels (default: the index pip is set to)
# PYTHON=<program>     a Python >= 3.11 (default: python3.11, or else python3)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
LOCK := locks/$(TARGET).txt
DEV := locks/dev.txt
VENV := .venv
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.13 python3.12)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
TORCH := $(shell grep '^torch==' $(LOCK))

# A stage is done when its stamp exists; the name of a stamp holds what the stage was given, so an edited lock file or
# another target is installed once, and nothing is installed twice.
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH) $(TARGET) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(TARGET)-$(shell (pwd; cat $(LOCK) $(DEV) pyproject.toml) | cksum | cut -d' ' -f1)

.PHONY: train test test-slurm test-network test-memory test-image install lint clean

train: install
	@$(VENV)/bin/tablemesh train configs/quickstart.toml

test: install
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-slurm: install
	@$(VENV)/bin/python -m pytest -m cluster tests/launch/test_slurm.py

test-network: install
	@$(VENV)/bin/python -m pytest -m 'cluster or not cluster' tests/launch/test_network.py

test-memory: install
	@$(VENV)/bin/python -m pytest -m cluster tests/launch/test_out_of_memory.py

test-image: install
	@$(VENV)/bin/python -m pytest -m cluster tests/launch/test_image.py

lint: install
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

install: $(STAMP)

$(VENV)/bin/python:
	@fits() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	for python in $(PYTHONS); do if fits $$python; then break; fi; python=; done; \
	[ -n "$$python" ] || { echo "error: no Python >= 3.11 found (looked for: $(PYTHONS));" \
	  "install one, or say make PYTHON=<program>" >&2; exit 1; }; \
	echo "[1/4] $(VENV) with $$($$python -V)"; \
	rm -rf $(VENV); \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $$python cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }

# With its own dependencies (the plain wheel is a CUDA build that needs them), held to the versions of the lock file.
# From an index of CPU wheels it comes alone: the lock file has all that such a wheel needs.
$(TORCH_STAMP): | $(VENV)/bin/python
	@echo "[2/4] $(TORCH) for $(TARGET)"
	@rm -f $(VENV)/.torch-*
ifdef TORCH_INDEX
	@$(PIP) install --no-deps --index-url '$(TORCH_INDEX)' '$(TORCH)'
else
	@$(PIP) install --constraint $(DEV) --constraint $(LOCK) '$(TORCH)'
endif
	@touch $@

$(STAMP): $(TORCH_STAMP)
	@echo "[3/4] the other packages of $(LOCK) and $(DEV)"
	@rm -f $(VENV)/.installed-*
	@$(PIP) uninstall --yes $(if $(filter cpu,$(TARGET)),fbgemm-gpu,fbgemm-gpu-cpu) 2>/dev/null
	@$(PIP) install --no-deps --requirement $(LOCK) --requirement $(DEV)
	@echo "[4/4] tablemesh itself"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
