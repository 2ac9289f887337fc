# The commands of this project; `make` alone lists them. Everything is installed into .venv.
#
#   make clean setup TORCH=torch==2.11.0    another torch: any arguments of `pip install`
#   make clean setup PYTHON=python3.12      another Python

TORCH ?= torch==2.13.0
PYTHON ?= python3

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP_SOURCES = $$(git ls-files '*.h' '*.hpp' '*.cpp' '*.cu' '*.cuh')
# An editable install knows the modules that it found: where one is added or moved, it is done again.
MODULES := $(shell find python -name '*.py' | sort | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/project-$(MODULES).stamp
HAVE_GTEST = printf '\#include <gtest/gtest.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1

.PHONY: help setup demo test test-fast test-cpp bench docs notebook lint format wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## .venv with torch, the build tools and this project (editable)

demo: setup  ## train a language model dense and block sparse, and compare (under 5 minutes)
	python examples/train_language_model.py --out out/demo

test: setup test-cpp  ## all tests: C++ (where GoogleTest is found), then Python
	python -m pytest -n auto --dist worksteal

test-fast: setup  ## the Python tests but for the slowest (under 5 minutes on two cores)
	python -m pytest -n auto --dist worksteal -m "not slow"

bench: setup  ## time the products against torch's dense ones, and check the bars
	python benchmarks/overhead.py
	python benchmarks/bars.py

docs: setup  ## the documentation site, build/site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

notebook: setup  ## run the notebook of the documentation anew, its outputs included (minutes)
	jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False docs/notebooks/*.ipynb

lint: setup  ## formatting, style and types
	ruff check .
	ruff format --check .
	mypy
	python benchmarks/figures.py --check
	clang-format --dry-run -Werror $(CPP_SOURCES)

format: setup  ## rewrite the sources in the project's format
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_SOURCES)

wheel: setup  ## dist/pytorch_block_sparse-<version>-py3-none-<platform>.whl
	python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove what make made: .venv, build, dist, out
	rm -rf .venv build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The C++ tests link no torch; the kernels that they test are those that the package was built of.
test-cpp: setup
	@if $(HAVE_GTEST); then \
	  cmake -B build/editable -DBLOCK_SPARSE_TESTS=ON \
	  && cmake --build build/editable --target block_sparse_tests \
	  && ctest --test-dir build/editable --output-on-failure; \
	else \
	  echo 'C++ tests skipped: no GoogleTest (sudo apt-get install libgtest-dev)'; \
	fi

# A stamp says that a step was done with this Makefile and this pyproject.toml. A changed C++ or
# Python source needs no set-up: importing the package rebuilds what changed.
.venv/python.stamp:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo; \
	  echo 'To create .venv, first run:  sudo apt-get install python3-venv'; exit 1; }
	touch $@

# torch first, on its own: the project builds against it, and nothing later may bring another.
.venv/torch.stamp: Makefile | .venv/python.stamp
	python -m pip install $(TORCH)
	python -m pip install 'scikit-build-core>=0.11' cmake ninja
	touch $@

$(INSTALLED): .venv/torch.stamp pyproject.toml
	python -m pip install --no-build-isolation \
	  --config-settings=cmake.define.BLOCK_SPARSE_WERROR=ON --editable '.[demo,transformers,peft,test,docs,lint]'
	touch $@
