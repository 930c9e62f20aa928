# Every target installs what it needs (as root, on Debian or Ubuntu). `make help` lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: help venv run demo test bench screenshots lint lock audit deb clean

help:
	@echo "make run    the daemon with an etcd of its own, for the Docker Engine of this machine"
	@echo "make demo   a LAN of three Docker hosts on this machine, in namespaces that vanish afterwards"
	@echo "make test   every test"
	@echo "make bench  the numbers in docs/benchmarks.md"
	@echo "make screenshots  the pictures of the page in docs/screenshots"
	@echo "make lint   style and types"
	@echo "make lock   renew requirements.lock: the newest releases that pyproject.toml allows, with their hashes"
	@echo "make audit  ask PyPI for known holes in what requirements.lock names"
	@echo "make deb    a Debian package in dist/, for machines without internet access"
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
	.ci/tools browser
	$(RUN)/python -m pytest

bench: venv
	.ci/tools lab
	.ci/tools browser
	$(RUN)/python -m tests.bench

screenshots: venv
	.ci/tools run
	.ci/tools browser
	$(RUN)/python -m tests.screenshots

lint: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# For all of Python 3.11 to 3.13 at once, which pip itself cannot do.
lock: $(VENV)/locking/.made
	$(VENV)/locking/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

# Without --strict it would pass where PyPI cannot be asked about a package.
audit: $(VENV)/locking/.made
	$(VENV)/locking/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

# Apart, because what they need is not what this project needs.
$(VENV)/locking/.made: $(VENV)/.made
	$(PYTHON) -m venv $(VENV)/locking
	$(VENV)/locking/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1' 'pip-audit>=2.9,<3'
	touch $@

deb: venv
	.ci/deb $(RUN)/python dist

clean:
	rm -rf $(VENV) build dist *.egg-info
