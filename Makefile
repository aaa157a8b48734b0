# Two commands: `make demo` and `make test`. They need Python (>= 3.10), pip and make, nothing else, and install from the lock in
# requirements/. `make lock` makes the lock again, `make newest` tries the newest of everything and raises bounds and lock
# (docs/upstream.md), `make drift` says what the newest transformers would break.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= results/store/demo
WORKERS ?= 2
ONCE ?= -m "not once"

.PHONY: demo test lint format install lock newest drift released rows browser clean

demo: $(VENV)/.demo  ## sweep configs/demo.yaml on the embedded model, print the table, write the report
	HF_HUB_OFFLINE=1 $(BIN)/vtc sweep configs/demo.yaml --out $(OUT)

test: $(VENV)/.dev $(VENV)/.oldest  ## the whole suite on the newest transformers; on the oldest all that hangs on it (ONCE=: all)
	$(BIN)/python -c "import transformers; print('newest: transformers', transformers.__version__)"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -c "import transformers; print('oldest: transformers', transformers.__version__)"
	PYTHONPATH=$(VENV)/oldest HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ONCE)

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.dev

lock: $(VENV)/.uv  ## compile requirements/ again, with as few changes as the ranges in pyproject.toml ask for
	$(BIN)/python scripts/lock.py

newest: $(VENV)/.uv  ## the suite on the newest of everything; when it is green, raise the bounds and the lock
	$(BIN)/python scripts/newest.py --workers $(WORKERS)

drift: $(VENV)/.dev  ## a part of the suite on the newest transformers, where there is a newer one; reports, and never fails
	-$(BIN)/python scripts/newest.py --drift --workers $(WORKERS)

# an environment is remembered as installed; the package itself comes without dependencies (the lock has them) and without a build
# environment of its own (the lock has setuptools, too)
EDITABLE := --no-deps --no-build-isolation --editable .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=23'

$(VENV)/.demo: $(BIN)/python pyproject.toml requirements/demo.txt
	$(BIN)/python -m pip install --quiet -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet $(EDITABLE)
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml requirements/test.txt
	$(BIN)/python -m pip install --quiet -r requirements/test.txt
	$(BIN)/python -m pip install --quiet $(EDITABLE)
	touch $@

# the oldest supported transformers beside the newest, in one environment: a folder put in front of the path
$(VENV)/.oldest: $(VENV)/.dev requirements/oldest.txt
	rm -rf $(VENV)/oldest
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/oldest -r requirements/oldest.txt
	touch $@

$(VENV)/.uv: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	touch $@

released: $(VENV)/.dev  ## what vtc does with every checkpoint of tests/released.json: renews results/released.md (half an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/released.py

rows: $(VENV)/.dev  ## every reducer, family and padding side: rows of a batch get what they get alone
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VTC_EVERY_FAMILY=1 $(BIN)/pytest -n $(WORKERS) tests/test_rows.py

browser:  ## Chromium for the report's tests in a real browser (Debian's package; needs root)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y --no-install-recommends chromium; }

clean:
	rm -rf $(VENV) build dist *.egg-info

# two threads, no AVX-512, no AVX2: other CPUs round differently, and the tests that compare numbers hold on all of them
CPUS := "OMP_NUM_THREADS=1" "OMP_NUM_THREADS=2" "OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2" \
	"OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2"
NUMBERS := $(patsubst %,tests/test_%.py,golden reducers_* flowcut todre kernels contract packed)

.PHONY: cpus
cpus: $(VENV)/.dev  ## the tests that compare numbers, as other CPUs compute them
	failed=0; for cpu in $(CPUS); do echo "$$cpu"; \
	env HF_HUB_OFFLINE=1 $$cpu $(BIN)/pytest -n $(WORKERS) -k "not compiles_within" $(NUMBERS) || failed=1; done; exit $$failed

.PHONY: oracle mutants mutants-table
N ?= 1000
oracle: $(VENV)/.dev  ## N compositions and conversations drawn at random, against the slow reference (a third of a second each)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VTC_ORACLE=$(N) $(BIN)/pytest -n $(WORKERS) -p no:cacheprovider tests/test_compositions.py

mutants-table: $(VENV)/.dev  ## put known bugs in, one by one, in a copy, and say which the tests notice (minutes)
	$(BIN)/python tests/mutants

COUNT ?= 150
mutants: $(VENV)/.dev  ## change the code at random, COUNT times, and say in results/mutants.md what no test notices (goes on where it was)
	$(BIN)/python tests/mutants/sample.py --count $(COUNT)
