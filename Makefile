# make demo: the main job on the embedded model. make test: lint, types and tests. Both set themselves up.
# torch comes as the registry serves it; another build: make install TORCH=torch==2.13.0+cu130 TORCH_FLAGS='--index-url URL'
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint gates bench bench-table clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first: nothing that follows may pull another build of it in
$(STAMP): setup.py constraints.txt Makefile | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH_FLAGS) '$(TORCH)'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/rewire demo

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	mkdir -p .typing/rewire  # mypy follows folders, not the editable finder's mapping
	for room in engine kernels stats cli bench hparams; do ln -sfn ../../$$room .typing/rewire/$$room; done
	for file in __init__.py py.typed; do ln -sfn ../../rewire/$$file .typing/rewire/$$file; done
	MYPYPATH=.typing $(BIN)/mypy -p rewire

# the interpreter decides at import time, so gate A has a process of its own
test: lint
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "not interpreter and not gpu"

# every autotune configuration of every kernel, compiled for every chip
gates: install
	REWIRE_ALL_CONFIGS=1 $(BIN)/pytest -q -n auto -m compile

# every operation and every phase of an edit under pytest-benchmark, at the shapes that a CPU times; a phase that lost a
# quarter of the ratio committed in docs/benchmarks.md fails
bench: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/bench/test_speed.py tests/bench/test_phases.py --benchmark-only

# writes that table anew; for a quiet machine
bench-table: install
	REWIRE_BENCH_TABLE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/bench/test_phases.py --benchmark-only

clean:
	rm -rf .venv build *.egg-info .gates .typing .mypy_cache .ruff_cache .pytest_cache
