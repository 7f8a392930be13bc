# make demo    the whole pipeline on real small models, on a CPU, in .demo/
# make test         every test that takes less than 5 seconds, a process a core
# make test-slow    the others
# make check        lint and types
# make docs         the pages and the API reference, into .docs-site/
# make check-gpu-env   the GPU environment resolves (metadata only)
.PHONY: demo test test-slow check check-gpu-env docs env models gpu-env clean-work clean

PY := .venv/bin/python
# Tests run in a process a core; TESTS="-n 0 tests/core" runs some of them in one.
TESTS ?= --numprocesses=logical --maxprocesses=8 --dist=loadfile --durations=40

# Of the environment's 33,000 modules few are ever imported: Python compiles those once, and pip none. A container that has
# Python keep no bytecode would have every process compile them again (`import transformers` takes 2.5 times the processor time).
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

demo: models
	@$(PY) scripts/demo.py

test: models
	@$(PY) -m pytest -m "not slow" $(TESTS)

test-slow: models
	@$(PY) -m pytest -m slow $(TESTS)

check: env
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: env
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

env:
	@scripts/make_env.sh

gpu-env:
	@scripts/make_env.sh gpu
	@$(PY) scripts/check_gpu.py

check-gpu-env: env
	@scripts/lock_gpu.sh check

models: env
	@$(PY) scripts/prepare_models.py

clean-work:
	rm -rf .work .demo/.work

clean: clean-work
	rm -rf .demo
