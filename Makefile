# make pretrain   train the default model on real text, in its own virtual environment
# make test       the suite (minutes): of a test with many cases one, drawn anew each time
# make check      everything: lint, types, all other cases, slow tests, proofs, the next Python
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# A second interpreter, for the newest jax: the first of these that is there.
NEXT ?= $(shell for p in python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[23]*/bin/python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PYTEST = -m pytest -q -n $(JOBS) --dist loadfile
PROOFS = $(CURDIR)/.cache/proofs.jsonl
PASSED = $(CURDIR)/.cache/passed

# Options of tests/conftest.py take their values by "=": until pytest has found that file it does not know them, and a
# word of its own would name a place to look for tests.
.PHONY: pretrain test check rest lint slow proofs next clean

pretrain: $(VENV)/.core
	$(VENV)/bin/python scripts/pretrain.py $(ARGS)

test: $(VENV)/.test
	mkdir -p .cache && rm -f $(PROOFS)
	XYLEM_PROOFS=$(PROOFS) $(VENV)/bin/python $(PYTEST) --cases=drawn --passed=$(PASSED) $(ARGS)

check: test rest

rest: lint slow proofs next

lint: $(VENV)/.check
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# What the last `make test` left: slow tests, and cases that it did not draw.
slow: $(VENV)/.check
	mkdir -p .cache
	XYLEM_PROOFS=$(PROOFS) XYLEM_CHECK_TYPES=no $(VENV)/bin/python $(PYTEST) --cases=left --passed=$(PASSED) $(ARGS)

# After test and slow: what they proved, as pages.
proofs: $(VENV)/.core
	$(VENV)/bin/python scripts/proofs.py $(PROOFS) docs/proofs.md docs/peft.md

next: .venv-next/.test
	XYLEM_CHECK_TYPES=no .venv-next/bin/python $(PYTEST) -m "not oracle" --cases=drawn

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e . && touch $@

$(VENV)/.test: setup.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.[test]' && touch $@ $(VENV)/.core

$(VENV)/.check: setup.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.[test,dev,plan]' && touch $@ $(VENV)/.test $(VENV)/.core

.venv-next/.test: setup.py
	@test -n "$(NEXT)" || { echo "error: no Python 3.12 or newer was found; set NEXT=/path/to/python"; exit 2; }
	$(NEXT) -m venv .venv-next
	.venv-next/bin/python -m pip install -q -e '.[test]' && touch $@

clean:
	rm -rf .venv .venv-next .cache build *.egg-info
