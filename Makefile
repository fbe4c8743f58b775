# `make` sets up and runs the main job in its quick form; `make test` sets up and runs the tests.
PYTHON ?= python3
VENV = .venv/bin

.PHONY: quick test test-slow reproduce lint bench

quick: .venv/installed
	$(VENV)/python plot_parametric_plot.py -n F1 --epochs 20

# Without the tests that take minutes
test: .venv/installed
	$(VENV)/python -m pytest

test-slow: .venv/installed
	$(VENV)/python -m pytest -m slow

# The long runs whose results are in results/; may be stopped at any time
reproduce: .venv/installed
	nice -n 19 $(VENV)/python campaign.py

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

bench: .venv/installed
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(VENV)/python benchmarks/throughput.py
	$(VENV)/python benchmarks/kernels.py
	$(VENV)/python benchmarks/sharpness_cost.py
	$(VENV)/python benchmarks/checkpoint_cost.py
	$(VENV)/python benchmarks/start_up.py

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
