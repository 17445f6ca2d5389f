# Every target that needs the environment depends on its stamp, which is as new as pyproject.toml and the constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all gpu check export-check serving-check format clean docs

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

# Exports of every method, width and kind of task, read by each trainer's own parser in an environment of its own, and
# trained for a few steps where that takes no GPU; writes benchmarks/results/export-check.md.
EXPORT_CHECKS := trl llama-factory axolotl ms-swift unsloth

vpath requirements-%.txt tests/export tests/serving

.venvs/%/.installed: requirements-%.txt
	test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet --requirement $<
	test ! -f $(dir $<)requirements-$*-alone.txt || \
		.venvs/$*/bin/python -m pip install --quiet --no-deps --requirement $(dir $<)requirements-$*-alone.txt
	test ! -f $(dir $<)requirements-$*-without.txt || \
		.venvs/$*/bin/python -m pip uninstall --quiet --yes --requirement $(dir $<)requirements-$*-without.txt
	touch $@

export-check: $(STAMP) $(EXPORT_CHECKS:%=.venvs/%/.installed)
	rm -rf .venvs/cases
	PYTHONPATH=.:tests $(BIN)/python tests/export/make_cases.py .venvs/cases > .venvs/cases.log
	PYTHONPATH=tests $(BIN)/python tests/export/run_checks.py .venvs > benchmarks/results/export-check.md

# Merged models and adapters, loaded by transformers 4, llama.cpp and vLLM in environments of their own (5 GB), and compared
# with plain transformers token by token; writes benchmarks/results/serving-check.md.
LLAMA_CPP := llama-cpp-python==0.3.36

.venvs/llama-cpp/source: .venvs/llama-cpp/.installed
	PATH="$(CURDIR)/.venvs/llama-cpp/bin:$$PATH" .venvs/llama-cpp/bin/python -m pip download --quiet --no-deps \
		--no-build-isolation --no-binary llama-cpp-python --dest .venvs/llama-cpp $(LLAMA_CPP)
	rm -rf $@ $@.part
	mkdir $@.part
	tar xzf .venvs/llama-cpp/llama_cpp_python-*.tar.gz -C $@.part --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py' '*/vendor/llama.cpp/convert_*.py'
	mv $@.part $@

serving-check: $(STAMP) .venvs/llama-cpp/source .venvs/vllm/.installed
	rm -rf .venvs/serving
	$(BIN)/python tests/serving/make_models.py .venvs/serving > .venvs/serving.log
	PYTHONPATH=tests $(BIN)/python tests/serving/run_checks.py .venvs > benchmarks/results/serving-check.md

docs: $(STAMP)
	$(BIN)/python -m autopeft.methods.document > docs/methods.md

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis
