.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where it is set, as in many containers, each of the hundreds of processes that tests start would compile all modules.
unexport PYTHONDONTWRITEBYTECODE

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

# torch first and pinned: an unpinned requirement would take a build with gigabytes of CUDA libraries.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about two minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@touch $@

install: $(STAMP)  ## install everything into .venv

demo: $(STAMP)  ## train a small MoE model on two ranks, as usual and with moeplan beside it (three minutes)
	@$(BIN)/python examples/demo.py

compare: $(STAMP)  ## plan from a recorded trace and compare policies on steps they did not see
	@$(BIN)/python examples/compare_policies.py

# Files of tests side by side, as most of their time is spent waiting for daemons and ranks; kernels are compiled before.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
kernels: $(STAMP)  ## compile the kernels that tests use, where they are not compiled already (two minutes)
	@PYTHONPATH=. $(BIN)/python tests/support/compile_kernels.py

test: kernels  ## run the tests
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(STAMP) docs  ## run the tests, those that take minutes too, with new random examples, and build the documentation
	@$(BIN)/python -m pytest -m "slow or not slow" --hypothesis-profile=new

browser:  ## install Chromium from the system's packages (Debian, Ubuntu; as root), for tests of pages and pictures
	@apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core

pictures: $(STAMP)  ## make the screenshots of README and docs; needs Chromium (make browser)
	@PYTHONPATH=. $(BIN)/python docs/site/pictures.py

docs: $(STAMP)  ## build the documentation site into build/site, without network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

FRAMEWORKS ?= $(CURDIR)/build/frameworks

frameworks:  ## make environments of torchtitan and Megatron-core for their tests, in FRAMEWORKS
	@tests/runtime_client/integrations/environments.sh $(FRAMEWORKS) $(PYTHON)

# Not in .venv, whose torch has no CUDA: torch >= 2.11 for CUDA, Triton, numba and lazy-loader must be there.
test-gpu:  ## check passes without the host on two GPUs of one host, or one for both ranks
	@PYTHONPATH=solvers:proto:runtime_client:$$PYTHONPATH $(PYTHON) -m torch.distributed.run --nproc-per-node 2 \
		tests/runtime_client/device/gpu_checks.py

check: $(STAMP) check-proto  ## lint and type-check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

proto:  ## generate the gRPC stubs of proto/
	@PYTHON=$(PYTHON) proto/generate.sh

check-proto:  ## lint the API, look for breaking changes and stale stubs
	@PYTHON=$(PYTHON) proto/generate.sh --check

fix: $(STAMP)  ## format, and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

dist: $(STAMP)  ## build wheel and source archive into dist/; a tag of this commit must be the version
	@tag=$$(git tag --points-at HEAD 'v*'); version=$$($(BIN)/python -m hatchling version); \
		test -z "$$tag" || test "$$tag" = "v$$version" || { echo "tag $$tag: the version is $$version"; exit 1; }
	@$(BIN)/python -m hatchling build

coverage: $(STAMP)  ## which lines the tests run, in all their processes
	@PYTHONPATH=. $(BIN)/python tests/support/compile_kernels.py
	@$(BIN)/coverage erase && $(BIN)/coverage run -m pytest $(SIDE_BY_SIDE); \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report

tables: $(STAMP)  ## make the tables of the documents from the results of benchmarks
	@$(BIN)/python benchmarks/tables.py

bench: $(STAMP)  ## measure layouts against SGLang's planners (downloads their wheel once)
	@$(BIN)/python benchmarks/layouts.py

.PHONY: help install kernels demo compare test test-all test-gpu browser pictures frameworks docs check proto check-proto fix dist coverage \
	tables bench
