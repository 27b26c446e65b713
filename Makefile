# make demo: install into .venv and run the main job on a sample. make test: everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
# One process a core, with one thread each: small networks gain nothing from more. A file's tests stay together; files
# come in the order of tests/conftest.py.
SIDE_BY_SIDE := -n auto --dist loadfile --no-loadscope-reorder

# What depends on the versions of diffusers, huggingface_hub and safetensors: files, networks, schedulers, the Hub's client.
OLDEST_TESTS := tests/ipg/test_versions.py tests/ipg/test_parts.py tests/ipg/test_pipeline.py tests/ipg/test_weights.py \
	tests/ipg/test_hub.py tests/demo/test_tiny.py tests/training/test_objective.py tests/training/test_starting.py

.PHONY: demo test stress lint docs bench clean

demo: .venv/demo.stamp
	mkdir -p out
	$(BIN)/pose2id demo --picture out/demo.png --overwrite

test: .venv/dev.stamp .oldest/stamp .models/stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)
	OMP_NUM_THREADS=1 PYTHONPATH=.models $(BIN)/python -m pytest tests/test_models.py -k "openvino or transformers or weights_that"
	OMP_NUM_THREADS=1 PYTHONPATH=.oldest $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(OLDEST_TESTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Full counts of kills, fuzz cases and examples: whoever builds a capability runs it once before it is done.
stress: .venv/dev.stamp .oldest/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --stress $(SIDE_BY_SIDE)
	OMP_NUM_THREADS=1 PYTHONPATH=.oldest $(BIN)/python -m pytest --stress $(SIDE_BY_SIDE) \
		tests/ipg tests/training tests/demo

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev.stamp
	$(BIN)/mkdocs serve

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/core.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[plots]'
	touch $@

# rtmlib without the two wheels of OpenCV that it asks for: they would overwrite the headless one of the tests.
.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps rtmlib
	touch $@ .venv/demo.stamp

# What generation is built on, in the oldest versions that pyproject.toml allows, to be put before the newest ones.
.oldest/stamp: .venv/dev.stamp constraints-oldest.txt Makefile
	rm -rf .oldest
	$(BIN)/python -m pip install -q --target .oldest -c constraints-oldest.txt diffusers huggingface_hub safetensors
	touch $@

# Packages whose models are run for real, apart from the others: diffusers imports transformers wherever it is.
.models/stamp: .venv/dev.stamp constraints.txt Makefile
	rm -rf .models
	$(BIN)/python -m pip install -q --target .models -c constraints.txt --no-deps transformers tokenizers openvino
	touch $@

clean:
	rm -rf .venv .oldest .models out site dist build
