# Two commands: `make demo` and `make test`. They need Python (>= 3.10), pip and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= results/store/demo
WORKERS ?= 2

.PHONY: demo test lint format install browser clean

demo: $(VENV)/.demo  ## sweep configs/demo.yaml on the embedded model, print the table, write the report
	HF_HUB_OFFLINE=1 $(BIN)/vtc sweep configs/demo.yaml --out $(OUT)

test: $(VENV)/.dev $(VENV)/.oldest  ## the whole suite, on the newest and on the oldest supported transformers
	$(BIN)/python -c "import transformers; print('newest: transformers', transformers.__version__)"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -c "import transformers; print('oldest: transformers', transformers.__version__)"
	PYTHONPATH=$(VENV)/oldest HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[pocket,plot]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# the oldest supported transformers beside the newest, in one environment: a folder put in front of the path
$(VENV)/.oldest: $(VENV)/.dev tests/oldest.txt
	rm -rf $(VENV)/oldest
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/oldest -r tests/oldest.txt
	touch $@

browser:  ## Chromium for the report's tests in a real browser (Debian's package; needs root)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y --no-install-recommends chromium; }

clean:
	rm -rf $(VENV) build dist *.egg-info
