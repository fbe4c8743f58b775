# `make` sets up and runs the main job in its quick form; `make test` sets up and runs the tests.
PYTHON ?= python3
VENV = .venv/bin

.PHONY: quick test lint bench

quick: .venv/installed
	$(VENV)/python plot_parametric_plot.py -n F1 --epochs 20

test: .venv/installed
	$(VENV)/python -m pytest

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

bench: .venv/installed
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(VENV)/python benchmarks/throughput.py
	$(VENV)/python benchmarks/sharpness_cost.py
	$(VENV)/python benchmarks/checkpoint_cost.py
	$(VENV)/python benchmarks/start_up.py

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
