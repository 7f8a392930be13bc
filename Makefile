# make demo    the whole pipeline on real small models, on a CPU, in .demo/
# make test    lint-free is `make check`; this is every test
.PHONY: demo test check env models gpu-env clean-work clean

PY := .venv/bin/python

demo: models
	@$(PY) scripts/demo.py

test: models
	@$(PY) -m pytest

check: env
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

env:
	@scripts/make_env.sh

gpu-env:
	@scripts/make_env.sh gpu

models: env
	@$(PY) scripts/prepare_models.py

clean-work:
	rm -rf .work .demo/.work

clean: clean-work
	rm -rf .demo
