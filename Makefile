# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
# one exact version, so that pip takes a build that is already on disk
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: setup demo test test-slow lint bench clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[train,test]'
	touch $@

demo: setup
	$(BIN)/python -m copd study --config configs/demo.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n 2 --durations=10
	$(BIN)/python -m pytest -q -n 2 bench --benchmark-disable

test-slow: setup
	$(BIN)/python -m pytest -q -s -m slow

# torch is named again, or the rivals' open ranges would pull another build
bench: setup
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH) -e '.[bench]'
	$(BIN)/python -m pytest -q bench --results bench/results --fresh
	$(BIN)/python -m bench.report

clean:
	rm -rf .venv build *.egg-info
