# The same targets serve people and CI. `make demo` and `make test` do their own set-up.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export TOKENIZERS_PARALLELISM := false
# Compiled modules are kept even where the shell says no: or each command that a test starts compiles all it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo study test test-faults test-nightly lint types bench docs clean

install: .venv/installed

# torch goes in first and pinned: whatever is installed after it must not pull another build.
# RecBole goes in last without its dependencies: it pins a Ray that no current Python has.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps recbole==1.2.1 thop
	touch .venv/installed

demo: install
	$(BIN)/vlm2rec demo --out runs/demo

# Every table and figure of the paper on the drawn catalogue: about an hour on two cores, interrupted and gone on with
# as one likes. One thread: two that wait for one another on a busy machine are slower than one.
# `make study QUICK=1` runs a few steps of everything, to see that it works.
study: install
	OMP_NUM_THREADS=1 $(BIN)/vlm2rec study --demo --jobs $(JOBS) --out runs/study$(if $(QUICK),-quick --quick)

# Whole files go to workers in the order of their names, so that what a file builds once is built once.
# One thread each: two that wait for one another on a busy machine are slower than one.
# What is marked slow is left out: `make test-nightly`.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10

# The first fifty faults of tests/FAULTS.md, those that need minutes among them.
test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k test_fault -m ''

# Everything that draws its own cases, a thousand of each; ten thousand damaged files of each format, with their counts at
# the end; and everything that needs minutes.
test-nightly: install
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -m 'hypothesis or fuzz or slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The packages install as vlm2rec.*: mypy sees them under that name through links.
types: install
	mkdir -p build/types/vlm2rec
	for part in embedder downstream pipelines; do ln -sfn ../../../$$part build/types/vlm2rec/$$part; done
	MYPYPATH=build/types $(BIN)/mypy -p vlm2rec.embedder -p vlm2rec.downstream -p vlm2rec.pipelines

bench: install
	for script in tests/benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# The pages in docs/ as a site that opens without a server.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html"

clean:
	rm -rf build runs .mypy_cache .ruff_cache
