# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
# Further overrides of the demo's config, such as ARGS="--env.blank_images true".
ARGS ?=
DIGITS := outputs/digits

.PHONY: setup demo test test-unit lint format fuzz faults bench lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Makes the pictures and the model, then trains: minutes on two cores, no GPU.
demo: setup
	$(BIN)/python examples/digits/prepare.py --data $(DIGITS)/data --model $(DIGITS)/model-$(SEED) --seed $(SEED)
	$(BIN)/pointillist rl @ examples/digits/rl.toml --seed $(SEED) --model.name $(DIGITS)/model-$(SEED) \
		--output-dir $(DIGITS)/run-$(SEED)-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup $(VENV)/torchvision-reference
	PYTHONPATH=$(VENV)/torchvision-reference $(BIN)/python -m pytest tests/torchvision_reference
	$(BIN)/python -m pytest

# The Kimi processor that we compare with needs torchvision, which the project does not: only its tests see it.
$(VENV)/torchvision-reference: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ torchvision==0.28.0

# Seconds instead of minutes: no processes are started.
test-unit: setup
	$(BIN)/python -m pytest -m "not integration"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hostile input, over 200,000 of it: minutes.
fuzz: setup
	FUZZ_EXAMPLES=55000 $(BIN)/python -m pytest tests/fuzz --timeout 3000

# Writers of the image store killed at random points, and flipped bits: minutes.
faults: setup
	$(BIN)/python -m tests.faults.store_faults

# All claims about speed and memory, each a ratio measured side by side: a quarter of an hour.
bench: setup $(VENV)/torchvision-reference
	$(BIN)/python -m benchmarks $(VENV)/torchvision-reference

# Resolves pyproject.toml anew in an empty environment and writes what it got.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check ".[dev]"
	{ echo "# Exact versions that Pointillist is tested with; made by 'make lock' from pyproject.toml."; \
		build/lock/bin/python -m pip freeze --exclude pointillist | sed 's/+cpu//'; } > requirements.lock
	rm -r build/lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
