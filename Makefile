# Every target sets up the environment it needs; only make, pip's index and a Python >= 3.12 are assumed.
# Another interpreter: make test PYTHON=/path/to/python3.13

PYTHONS := $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python \
	$(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3))
GPU := $(shell nvidia-smi -L 2>/dev/null)
CUDA ?= cuda13
JOBS ?= 2
LOCK := requirements-dev.lock
# Python compiles a module when it is first imported, and keeps that: pip would compile all that is never imported too,
# and where it is not kept, `import jax` takes three times as long in every process.
PIP_INSTALL := bin/pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

CPU := JAX_PLATFORMS=cpu
PYTEST := .venv/bin/python -m pytest
WORKERS := -n $(JOBS) --dist worksteal

.PHONY: help demo test test-ci test-all environment test-xla test-kernels test-codegen test-gpu test-matrix codegen bench lint
.PHONY: docs faults fuzz gallery generate long-context test-drawn test-ptxas lock clean
.PRECIOUS: %/bin/pip

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/demo.stamp ## train a small language model with flash attention and with Flax's own; plot both
	$(if $(GPU),,$(CPU)) .venv/bin/python examples/train_char_lm.py

gallery: .venv/demo.stamp ## check two dozen kinds of attention against their definitions; write their page
	$(if $(GPU),,$(CPU)) .venv/bin/python examples/attention_gallery.py

generate: .venv/demo.stamp ## serve a small model with dense and paged caches; check its text against recomputation
	$(if $(GPU),,$(CPU)) .venv/bin/python examples/generate.py

long-context: .venv/demo.stamp ## train on sequences that four processes hold together; compare with one process
	.venv/bin/python examples/train_long_context.py --processes 4

# Both run the stages below, one after the other, and end with what each took (tests/stages.py).
STAGED = MAKE="$(MAKE)" .venv/bin/python tests/stages.py
ifeq ($(shell uname -s),Linux) # there is no Triton elsewhere
TRITON := test-kernels test-codegen
MATRIX := test-matrix
endif
# Each day `make test` looks at another third of the combinations of options, and another ninth of the tuned kernels
# (test-ci at a third); the matrix has rows that are run every third day, and rows of which a third is run.
TODAY := $(shell echo $$(( $$(date -u +%s) / 86400 )))
TODAYS = THIRD=$(or $(THIRD),$(shell echo $$(($(TODAY) % 3)))) NINTH=$(or $(NINTH),$(shell echo $$(($(TODAY) % 9))))

test: | .venv/bin/pip ## lint, types, tests (of combinations a third), and the check of the generated GPU code
	@$(TODAYS) $(STAGED) test environment lint test-xla $(TRITON) $(if $(GPU),test-gpu)

test-ci: | .venv/bin/pip ## what `make test` does, a third of the tuned kernels, dist, and test-matrix
	@$(TODAYS) NINTH= $(STAGED) test-ci environment lint docs dist test-xla $(TRITON) $(MATRIX)

test-all: | .venv/bin/pip ## every test, compiled as for users, every tuned kernel, dist, and test-matrix
	@THIRD= NINTH= FULLY=--fully $(STAGED) test-all environment lint docs dist test-xla $(TRITON) $(MATRIX) $(if $(GPU),test-gpu)

# The stages. Made by itself, each runs everything; with THIRD=0, 1 or 2, or NINTH=0 to 8, that part of it.
SOME := $(if $(THIRD),--third $(THIRD))

environment: .venv/dev.stamp

test-xla: .venv/dev.stamp
	$(CPU) $(PYTEST) $(WORKERS) tests --ignore=tests/test_kernels.py $(SOME) $(FULLY)

test-kernels: .venv/dev.stamp
	TRITON_INTERPRET=1 $(CPU) $(PYTEST) $(WORKERS) $(addprefix tests/test_,kernels.py context_kernels.py decode_kernels.py translate.py gallery.py score_mod.py) $(SOME)

test-drawn: .venv/dev.stamp ## 300 drawn score functions, on both backends, and 300 drawn paged problems
	DRAWN=300 $(CPU) $(PYTEST) $(WORKERS) tests/test_score_mod.py tests/test_paged.py -k drawn
	DRAWN=300 TRITON_INTERPRET=1 $(CPU) $(PYTEST) $(WORKERS) tests/test_translate.py -k drawn
	DRAWN=60 TRITON_INTERPRET=1 $(CPU) $(PYTEST) $(WORKERS) tests/test_decode_kernels.py -k drawn

fuzz: .venv/dev.stamp ## 10,000 random calls against the definition; goes on where the last run stopped (hours)
	$(CPU) .venv/bin/python tests/fuzz.py --draws $(or $(DRAWS),10000) --jobs $(JOBS)

faults: .venv/dev.stamp ## kill, starve and share: faults injected at random, and a table of what came of them (15 minutes)
	$(CPU) .venv/bin/python tests/faults.py

test-every: .venv/dev.stamp ## every option with every method, order and number of devices
	EVERY=1 $(CPU) $(PYTEST) $(WORKERS) tests/test_context_parallel.py -k "alone or pairs"

test-codegen: .venv/dev.stamp
	$(CPU) .venv/bin/python -m benchmarks.codegen --check $(if $(NINTH),--part $(NINTH)/9,$(if $(THIRD),--part $(THIRD)/3))

test-gpu: .venv/dev.stamp
	$(PYTEST) --gpu tests/test_gpu.py $(SOME)

test-matrix: .venv/dev.stamp test-ptxas ## other versions of Python, JAX, Triton, Flax and Equinox; the oldest CUDA
	.venv/bin/python tests/matrix.py --jobs $(JOBS) $(if $(THIRD),--third $(THIRD))

# CUDA's ptxas, the oldest for each chip: what JAX may assemble with.
ASSEMBLED := causal=True,head_dim=128,extra=|dropout|blocks

test-ptxas: .venv/dev.stamp .ptxas/12.6.85/stamp .ptxas/12.8.61/stamp .ptxas/12.9.41/stamp
	$(call ASSEMBLE,12.6.85,80|86|89)
	$(call ASSEMBLE,12.8.61,90)
	$(call ASSEMBLE,12.9.41,100|120)

ASSEMBLE = $(CPU) .venv/bin/python -m benchmarks.codegen --only "arch=$(2),$(ASSEMBLED)" \
  --ptxas .ptxas/$(1)/nvidia/cuda_nvcc/bin/ptxas

codegen: .venv/dev.stamp ## print registers, spills, shared memory and hot-loop instructions of every tuned kernel
	$(CPU) .venv/bin/python -m benchmarks.codegen

bench: .venv/dev.stamp ## the quick set of every benchmark on this machine, and a page of the results
	@for name in mha attention_mask sparse_masks block_masks components sdpa; do \
	  $(if $(GPU),,$(CPU)) .venv/bin/python -m benchmarks $$name --quick || exit 1; \
	done
	$(CPU) .venv/bin/python -m benchmarks decode --quick
	.venv/bin/python -m benchmarks cold_start --quick
	.venv/bin/python -m benchmarks report

docs: .venv-docs/stamp ## build the documentation into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/dev.stamp ## ruff and pyrefly
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check

# By tools of its own, the same ones every time, and with the setuptools of the lock. `build` makes the wheel of the
# sdist, so that one without the other cannot be right. What setuptools left of an earlier build would find its way in.
DIST_TOOLS := build==1.6.1 twine==7.0.0 check-wheel-contents==0.6.3

.PHONY: dist
dist: .venv/dev.stamp .venv-dist/stamp ## the sdist and the wheel, checked, installed by themselves, and tried
	rm -rf dist *.egg-info
	.venv-dist/bin/python -m build --no-isolation . >/dev/null
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/check-wheel-contents dist/*.whl
	.venv/bin/python tests/installing.py dist

# What is held back, and why, stands in pyproject.toml: the extra "triton".
lock: .venv/bin/pip ## renew the pinned development set: the newest releases that fit together
	@command -v uv >/dev/null || .venv/$(PIP_INSTALL) uv
	@printf '%s\n' '# The development set of pyproject.toml, pinned. Made by "make lock"; do not edit.' > $(LOCK).new
	@printf '%s\n' 'setuptools>=80' | PATH="$$PATH:.venv/bin" uv pip compile --quiet --universal \
	  --python .venv/bin/python --python-version 3.12 --group dev --extra triton \
	  --no-header --no-annotate --no-emit-index-url pyproject.toml - >> $(LOCK).new
	@mv $(LOCK).new $(LOCK)

clean: ## remove the environments and everything generated
	rm -rf .venv .venv-* .ptxas .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Environments. A stamp says that one is complete; it is renewed when the lock or the project's settings change.

%/bin/pip:
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 12)' 2>/dev/null; then \
	    echo "$*: $$($$python --version), packages follow (a minute or two the first time)"; \
	    exec $$python -m venv $*; \
	  fi; \
	done; \
	echo "No Python 3.12 or newer (with venv and ensurepip) among: $(PYTHONS)." >&2; \
	echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1

.venv/demo.stamp: $(LOCK) pyproject.toml | .venv/bin/pip
	.venv/$(PIP_INSTALL) -c $(LOCK) setuptools flax optax orbax-checkpoint matplotlib tqdm
	.venv/$(PIP_INSTALL) -c $(LOCK) --no-build-isolation -e '.$(if $(GPU),[$(CUDA)])'
	@touch $@

.venv/dev.stamp: $(LOCK) pyproject.toml | .venv/bin/pip
	.venv/$(PIP_INSTALL) --no-deps -r $(LOCK)
	.venv/$(PIP_INSTALL) -c $(LOCK) --no-build-isolation -e '.$(if $(GPU),[$(CUDA)])'
	@touch $@ .venv/demo.stamp

# The site is made of pages and docstrings as they are written: neither JAX nor the package is installed for it.
.venv-docs/stamp: $(LOCK) pyproject.toml | .venv-docs/bin/pip
	$(@D)/$(PIP_INSTALL) -c $(LOCK) $$($(@D)/bin/python -c \
	  'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["dependency-groups"]["docs"])')
	@touch $@

.ptxas/%/stamp: | .venv/bin/pip
	.venv/$(PIP_INSTALL) --upgrade --target $(@D) --no-deps nvidia-cuda-nvcc-cu12==$*
	chmod +x $(@D)/nvidia/cuda_nvcc/bin/ptxas
	@touch $@

.venv-dist/stamp: $(LOCK) | .venv-dist/bin/pip
	.venv-dist/$(PIP_INSTALL) -c $(LOCK) setuptools $(DIST_TOOLS)
	@touch $@
