# Needs only Python, make and a package index: each target but "gpu" creates .venv first.
#   make demo                               a teacher, and a small student alone and distilled
#   make check                              ruff, mypy --strict, codespell
#   make test                               all tests but slow ones and those that need a GPU
#   make test-all                           all tests but those that need a GPU
#   make docs                               the site, in docs/_build/html; a warning or a dead link in it is an error
#   make coverage                           the same, with branch coverage
#   make gpu PYTHON=python3 OUT=runs/gpu    tests and throughput on a GPU, in an interpreter that has the packages
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the networks are tiny: more threads only wait for one another
export OMP_NUM_THREADS = 1
export PYTHONUNBUFFERED = 1

.PHONY: demo test test-all coverage gpu check docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/installed
	@echo "== 1/2  a teacher on all training labels (configs/teacher_digits.yaml)"
	@test -f runs/teacher_digits/version_0/student.safetensors \
		&& echo "is done: runs/teacher_digits/version_0" || $(MAKE) --no-print-directory teacher
	@echo "== 2/2  a small student on 10 labels per class, alone and distilled (configs/distill_digits.yaml)"
	$(BIN)/python -m kd_lightning experiment configs/distill_digits.yaml --seeds 3

.PHONY: teacher
teacher: $(VENV)/installed
	rm -rf runs/teacher_digits/version_0
	$(BIN)/python -m kd_lightning fit --config configs/teacher_digits.yaml
	$(BIN)/python -m kd_lightning test --config configs/teacher_digits.yaml

PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/installed-test
	$(PYTEST) -m "not gpu"

coverage: $(VENV)/installed-test
	$(PYTEST) -m "not gpu" --cov --cov-branch --cov-report=term

# installs nothing; ends after 8 minutes at most; exit status 0 and one line where there is no GPU
OUT ?= runs/gpu
gpu:
	$(PYTHON) tests/gpu/run.py --out $(OUT)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml $(VENV)/bin/python
	@echo "== installing into $(VENV): a few minutes and a few GB, once"
	$(BIN)/python -m pip install --progress-bar off --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/bin/python
	@echo "== installing into $(VENV): a few minutes and a few GB, once"
	$(BIN)/python -m pip install --progress-bar off --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml $(VENV)/bin/python
	@echo "== installing into $(VENV): a few minutes and a few GB, once"
	$(BIN)/python -m pip install --progress-bar off --editable '.[docs]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
