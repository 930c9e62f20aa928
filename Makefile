# Every target installs what it needs (as root, on Debian or Ubuntu). `make help` lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: help venv run demo test bench lint clean

help:
	@echo "make run    the daemon with an etcd of its own, for the Docker Engine of this machine"
	@echo "make demo   a LAN of three Docker hosts on this machine, in namespaces that vanish afterwards"
	@echo "make test   every test"
	@echo "make bench  the numbers in docs/benchmarks.md"
	@echo "make lint   style and types"
	@echo "make venv   only the virtual environment in $(VENV)"

venv: $(VENV)/.made

$(VENV)/.made: pyproject.toml
	.ci/tools venv
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

run: venv
	.ci/tools run
	.ci/try $(RUN)/ipam-plugin

demo: venv
	.ci/tools lab
	$(RUN)/python -m tests.demo

test: venv
	.ci/tools lab
	$(RUN)/python -m pytest

bench: venv
	.ci/tools lab
	$(RUN)/python -m tests.bench

lint: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
