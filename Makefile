# make demo | make test | make test-all | make nightly | make env | make check | make compat | make chaos | make gpu | make slurm
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.complete
PINS   := requirements/runtime.txt requirements/dev.txt
WHEELS := $(VENV)/wheels

COMPAT_PYTHON ?= python3.12

.PHONY: demo test test-all nightly compat env check chaos gpu slurm clean

demo: env          ## Train, export and sample a small MeSH model on this machine's CPU (TEXT=path for your own text)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh $(if $(TEXT),"$(TEXT)")

# More workers than cores: tests of jobs, signals and hangs mostly wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

test: env          ## Test every unit, and one run or more of each kind
	@$(PYTEST) $(WORKERS) -m 'not full and not long' $(PYTEST_ARGS)

test-all: test     ## make test, and what it leaves out but for the longest
	@$(PYTEST) $(WORKERS) -m 'full and not long' $(PYTEST_ARGS)

nightly: chaos     ## What make test-all leaves out
	@$(PYTEST) -m long $(PYTEST_ARGS)

compat:            ## Run make test-all under Python 3.12 and megatron-core 0.19, in .venv-compat (COMPAT_PYTHON=path/to/python3.12)
	@$(MAKE) test-all VENV=.venv-compat PYTHON="$(COMPAT_PYTHON)"

slurm: env         ## Test examples/slurm on a SLURM of two nodes that it starts here (.ci/install_slurm installs one)
	@$(PYTEST) tests/slurm -m 'long or not long' $(PYTEST_ARGS)

SECONDS ?= 1600
gpu: env           ## Run what needs a GPU, tests and measurements, within SECONDS, into benchmarks/results/gpu (STEPS="trace loss": just those)
	@PYTHON="$(CURDIR)/$(BIN)/python" bash benchmarks/on_gpu.sh benchmarks/results/gpu $(SECONDS) $(STEPS)

KILLS ?= 200
chaos: env         ## Kill runs KILLS times at random moments and compare them with runs left alone (about 3 s a kill)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/survival/chaos.py --kills $(KILLS)

check: env         ## Style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

env: $(STAMP)      ## Create .venv with all that training, tools and tests need

$(STAMP): $(PINS) requirements/te.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 12), "Python 3.10 to 3.12 is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(addprefix -r ,$(PINS))
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	rm -rf $(WHEELS)  # Transformer Engine's Python, which tests run on the CPU and go without where it is missing
	-$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --dest $(WHEELS) -r requirements/te.txt
	touch $@

clean:             ## Remove what the demo and the test suite left, not the environment
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
