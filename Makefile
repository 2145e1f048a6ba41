# make demo: everything from nothing, then a small SFT and KTO run with a table of what they reached.
# make test: everything from nothing, then the tests. Both install into $(VENV), once.

PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed
RUN = $(VENV)/bin/python

LOSS ?= kto
SEED ?= 1
TEST_PROCESSES ?= logical
ALONE = tests/test_launch.py tests/test_locks.py tests/test_compare_process.py

.PHONY: demo test test-slow lint docs check clean

demo: $(INSTALLED)
	$(RUN) scripts/demo.py --loss $(LOSS) --seed $(SEED) $(ARGS)

# With ARGS, a part of the tests. All of them run on all cores, but for those that start and kill processes.
test: $(INSTALLED)
ifeq ($(strip $(ARGS)),)
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ALONE:%=--ignore=%)
	$(RUN) -m pytest $(ALONE)
else
	$(RUN) -m pytest $(ARGS)
endif

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The documentation as a site, in site/. A warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet $(ARGS)

check: lint docs test

clean:
	rm -rf $(VENV)

# torch first and by exact version: resolved together with the rest it may come as another build, of gigabytes.
$(INSTALLED): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(VENV)/bin/pip install --quiet -r requirements.lock
	touch $@
