# make demo: everything from an empty machine to pictures.    make test: the whole test suite.
# make demo DATA=IMAGES HOURS=2: the same with images of your own, in about so many hours, in runs/quickstart.
# make browser: the browser in which the tests look at a report, where it can be installed; without it they skip that.
# make slurm: srun and sbatch on a SLURM of this machine alone, which root can install (Debian); not a part of `test`.
# make test-gpu: the tests that need a GPU, on one of this machine; ON=cpu tries them on the CPU. The others see no GPU.
# make soak: training under faults, MINUTES=10 of it.    make test-slow: the slow tests.
# make fuzz: damaged files to every reader, MINUTES=10 of it.
# make install LOCKED=1: only files whose SHA-256 stands in requirements.lock.    make lock: write that file anew.
# make docs: the pages of docs/, with the names to use from Python, as a web site in build/site.
# make licences: the licence of every installed package.
# PYTHON=python3.11 make demo chooses the interpreter; RANKS=4 the number of ranks;
# without it the demo has 2, and quickstart 1, or on a machine with GPUs one for each (the demo at most 2).

PYTHON ?= python3
MINUTES ?= 10
ON ?= cuda
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
QUICKSTART ?= runs/quickstart
HOURS ?= 2

.PHONY: demo demo-clean test test-slow test-gpu slurm soak fuzz lint types docs install lock licences browser clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mpi,demo,test]'
endif
	touch $@

lock: install
	$(BIN)/python tools/lock.py

licences: install
	$(BIN)/python tools/licences.py

demo: install
ifdef DATA
	$(BIN)/python scripts/quickstart.py --data_dir "$(DATA)" --hours $(HOURS) $(if $(RANKS),--ranks $(RANKS) )--out $(QUICKSTART)
else
	$(BIN)/python scripts/demo.py $(if $(RANKS),--ranks $(RANKS) )--out $(DEMO)
endif

demo-clean:
	rm -rf $(DEMO)

# Four processes for two cores: many tests wait, for ranks that start and for time that passes.
test: install lint
	$(BIN)/python -m pytest -n 4 --dist loadfile --durations 10

# Tests of the mark `slow`: they take long, or need what a machine of continuous integration lacks, and say what.
test-slow: install
	$(BIN)/python -m pytest -m slow -rs

test-gpu: install
	$(BIN)/python -m pytest -m cuda -rs --on $(ON)

slurm: install
	@command -v srun slurmctld > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	    timeout 300 sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	    --no-install-recommends slurm-wlm munge' > /dev/null 2>&1; } || \
	    echo 'no SLURM, and it cannot be installed: its tests are skipped'
	$(BIN)/python -m pytest -m slow -rs tests/system/test_slurm.py

# Not a part of `test`, which runs it for half a minute: the longer, the more moments are struck.
soak: install
	$(BIN)/python tests/system/soak.py --minutes $(MINUTES)

# Nor is this; the tests feed a few files to each reader.
fuzz: install
	$(BIN)/python tests/system/fuzz.py --minutes $(MINUTES)

lint: install types
	$(BIN)/python -m ruff check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python cm evaluations scripts datasets tools

docs: install
	$(BIN)/python -m mkdocs build --strict

browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	    timeout 300 sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	    --no-install-recommends chromium fonts-dejavu-core' > /dev/null 2>&1; } || \
	    echo 'no chromium, and it cannot be installed: the tests of the report in a browser are skipped'

clean: demo-clean
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
