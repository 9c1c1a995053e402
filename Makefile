# Everything runs from .venv, which the first target that needs it creates. `make help` lists the targets.
#
#   PYTHON=python3.12   the Python to make .venv with (default python3)
#   ARGS="-k point"     more arguments for demo, test and bench
#   TORCH=own|system    install torch into .venv, or use the one that $(PYTHON) has. The default is system only where
#                       that one is new enough and sees a GPU (a GPU box, perhaps offline): nothing is downloaded then.
PYTHON ?= python3
ARGS ?=
TORCH ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(sort $(wildcard csrc/*.*))
SYSTEM_TORCH = grep -qs '^include-system-site-packages = true' $(VENV)/pyvenv.cfg

define PROBE
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"fastode needs Python 3.10 to 3.13; this is {sys.version.split()[0]}. Name another: make PYTHON=python3.11")
try:
    import torch
    usable = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9) and torch.cuda.is_available()
except Exception:
    usable = False
print("system" if usable else "own")
endef
export PROBE

# A virtual environment made from another one does not see its packages, so they are linked by a .pth file. It gets no
# pip and setuptools of its own either: those that come with Python are older and would hide the parent's.
define LINK_PARENT
import pathlib, site, subprocess, sys
paths = subprocess.check_output([sys.argv[1], "-c", "import site; print(*site.getsitepackages(), sep='\\n')"], text=True)
lines = [f"import site; site.addsitedir({path!r})\n" for path in paths.splitlines()]
pathlib.Path(site.getsitepackages()[0], "parent.pth").write_text("".join(lines))
endef
export LINK_PARENT

HAS_SETUPTOOLS = import setuptools; print("--no-build-isolation" * (int(setuptools.__version__.split(".")[0]) >= 77))
export HAS_SETUPTOOLS

.PHONY: help demo test bench results lint format types clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-core  ## install what is needed, then draw images with each kind of solver
	@$(VENV)/bin/fastode demo $(ARGS)

# Files of tests are shared out over up to 8 processes, where pytest-xdist is installed.
WORKERS = $(shell $(PY) -c "import os, xdist; print('-n', min(8, os.cpu_count() or 1), '--dist loadfile')" 2>/dev/null)
test: $(VENV)/.stamp-test  ## all tests; ARGS="-k name" chooses
	@$(PY) -m pytest -q $(WORKERS) $(ARGS)

bench: $(VENV)/.stamp-bench  ## all benchmarks
	@$(PY) -m benchmarks.run $(ARGS)

RESULTS := --model mnist --nfe 3-10 --dtype bfloat16 --compile --screen 16
results: $(VENV)/.stamp-test  ## the README's and docs' tables and pictures; goes on with out/results if it was stopped
	@$(VENV)/bin/fastode compare $(RESULTS) --samples 1000 --solvers $$($(PY) -m benchmarks.solvers --list solved) \
	    --out out/results/compare.jsonl $(ARGS)
	@$(VENV)/bin/fastode compare $(RESULTS) --samples 504 --solvers $$($(PY) -m benchmarks.solvers --list published) \
	    --out out/results/published.jsonl $(ARGS)
	@cp out/results/compare.jsonl out/results/compare.html out/results/published.jsonl benchmarks/results/
	@$(PY) -m benchmarks.solvers --readme README.md --docs docs/solvers.md
	@cp out/results/compare-rmse.png docs/solvers.png
	@$(VENV)/bin/fastode demo --out docs

lint: $(VENV)/.stamp-dev  ## ruff and clang-format, changing nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@find csrc -type f | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.stamp-dev  ## the same, changing the files
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@find csrc -type f | xargs -r $(VENV)/bin/clang-format -i

types: $(VENV)/.stamp-dev  ## mypy
	@$(PY) -m mypy

clean:  ## remove what was built, and the caches; `rm -rf .venv` removes the environment
	rm -rf build dist *.egg-info fastode/_native*.so fastode/_native_build.json $(VENV)/.stamp-*
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find fastode kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# The environment and torch. An existing .venv is used as it is. torch comes before the package, at its pinned version:
# on Linux a free choice of torch may bring gigabytes of CUDA libraries.
$(VENV)/.stamp-torch:
	@set -e; if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    mode=$$($(PYTHON) -c "$$PROBE"); mode=$${TORCH:-$$mode}; \
	    echo "making $(VENV) ($$mode torch)"; \
	    if [ $$mode = system ]; then \
	        $(PYTHON) -m venv --system-site-packages --without-pip $(VENV); \
	        $(PY) -c "$$LINK_PARENT" $(PYTHON); \
	        $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip; \
	    else \
	        $(PYTHON) -m venv $(VENV); \
	    fi; \
	fi; \
	if ! $(PY) -c "import torch" 2>/dev/null; then \
	    echo "installing torch"; $(PIP) install -c constraints.txt torch; \
	fi
	@touch $@

# fastode itself, editable: .stamp-core plain, .stamp-test with the extra `test`, and so on. With the system's torch
# nothing is downloaded as long as the system has the other core dependencies and setuptools.
$(VENV)/.stamp-%: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@echo "installing fastode $(patsubst [core],,[$*])"
	@set -e; if $(SYSTEM_TORCH); then \
	    with=$$($(PY) -c "$$HAS_SETUPTOOLS" 2>/dev/null || true); \
	    $(PIP) install --no-deps $$with -e .; \
	    $(PY) -c "import numpy, safetensors, tqdm, PIL" 2>/dev/null || $(PIP) install numpy safetensors tqdm pillow; \
	else \
	    $(PIP) install -c constraints.txt -e '.$(patsubst [core],,[$*])'; \
	fi
	@touch $(VENV)/.stamp-core $@
