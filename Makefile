# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
# one exact version, so that pip takes a build that is already on disk
TORCH ?= torch==2.13.0
BIN := .venv/bin
VLLM := .venv-vllm

.PHONY: setup demo test test-slow lint bench clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[train,test]'
	touch $@

# for one test, beside .venv: with torchvision processors are others. Tried once; where it cannot be had, the test is
# skipped with the log's last line. torchvision is emptied of what registers CUDA's operators
$(VLLM)/log.txt: tests/loop/vllm.txt | .venv/ready
	$(PYTHON) -m venv --clear $(VLLM)
	-$(VLLM)/bin/pip install -q --disable-pip-version-check --retries 1 --no-deps -r tests/loop/vllm.txt >$@ 2>&1
	for site in $(VLLM)/lib/python3*/site-packages; do \
	    echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	        >$$site/copd.pth; \
	    [ ! -d $$site/torchvision ] || : >$$site/torchvision/_meta_registrations.py; \
	done

demo: setup
	$(BIN)/python -m copd study --config configs/demo.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(VLLM)/log.txt
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
	rm -rf .venv $(VLLM) build *.egg-info
