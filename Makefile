# All commands do all their own set-up in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-network test lint clean

demo: .venv/.demo
	$(BIN)/dpfl train examples/newswire.toml --out runs/newswire-$$(date +%Y%m%d-%H%M%S)

demo-network: .venv/.demo-network
	$(BIN)/dpfl up examples/newswire-network.toml --out runs/network-$$(date +%Y%m%d-%H%M%S)

test: .venv/.test lint
	@# Two workers: more threads in each would wait for one another.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term -q -m "not slow"

lint: .venv/.test
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/interrogate -q src

.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.demo-network: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[network]"
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# Its rules need nothing but torch, numpy and scipy; what it asks for would bring another build of torchvision.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^byzfl==' constraints.txt)"
	touch $@

clean:
	rm -rf .venv
