# Every target makes .venv by itself, once; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
NODE := tests/consumers/node
SOURCES := reference files torch_impl export serve cli demo benchmarks
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all gpu evidence evidence-quick fuzz test-consumers consumers mutants lint bench bench-large architectures verify-table clean

help:
	@echo "make demo      fine-tune, merge, export, verify and run two tasks on a real model"
	@echo "make test      the tests, under 15 minutes on two cores"
	@echo "make test-all  the tests and the long suites"
	@echo "make test-consumers  exported folders in other people's runtimes: Optimum, transformers.js, Chromium, ..."
	@echo "make fuzz      1.1 million changed files for every reader; ten minutes on two cores"
	@echo "make mutants   do the tests notice every change of reference/? ROOM=files, MODULES=\"linear bounds\" for others"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make bench     side-by-side measurements"
	@echo "make bench-large  exports of models of 1.1B and 7B parameters; 30 GB of disk"
	@echo "make evidence  the paper's claims, measured: benchmarks/results, with a page; hours, and it goes on where it was"
	@echo "make evidence-quick  the same of small models in a few minutes, into build/evidence-quick"
	@echo "make gpu       the tests and measurements that need a CUDA device; docs/gpu.md"
	@echo "make architectures  docs/architectures.md"
	@echo "make verify-table   the tables of docs/verify.md; needs .venv-peers for some"

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,onnx,demo,serve]'
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,onnx,demo,serve,dev]'
	@touch $@

demo: .venv/run.stamp
	$(BIN)/python -m loracle.demo --out demo-out

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not slow'

test-all: .venv/dev.stamp consumers lint fuzz evidence-quick
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

fuzz: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $(if $(SEED),--seed $(SEED))

test-consumers: .venv/dev.stamp consumers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/consumers tests/test_export_genai.py

# The runtimes of tests/consumers: Optimum, Node.js with transformers.js, Chromium.
consumers: .venv-peers/stamp $(NODE)/node_modules/stamp
	@bash tests/consumers/install.sh

$(NODE)/node_modules/stamp: $(NODE)/package-lock.json
	@bash tests/consumers/install.sh
	cd $(NODE) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

mutants: .venv/dev.stamp
	$(BIN)/python -m tests.mutation.run $(MODULES) $(if $(ROOM),--room $(ROOM)) $(if $(TESTS),--tests $(TESTS))

# mypy reads the namespace `loracle` off a folder that holds it under that name.
lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy_cache/root && ln -sfn "$(CURDIR)" .mypy_cache/root/loracle
	cd .mypy_cache/root && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir .. \
		$(SOURCES:%=-p loracle.%)
	$(BIN)/lint-imports

.venv-peers/stamp: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r benchmarks/peers.txt
	@touch $@

bench: .venv/dev.stamp .venv-peers/stamp
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.tightness
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.export
	$(BIN)/python -m benchmarks.tasks

bench-large: .venv/dev.stamp
	$(BIN)/python -m benchmarks.export --models 1.1b --rounds 3 --out benchmarks/results/export_1.1b.json
	$(BIN)/python -m benchmarks.export --models 7b --rounds 1 --out benchmarks/results/export_7b.json

evidence: .venv/dev.stamp
	$(BIN)/python -m benchmarks.evidence

evidence-quick: .venv/dev.stamp
	$(BIN)/python -m benchmarks.evidence --quick

gpu: .venv/dev.stamp
	$(BIN)/python -m benchmarks.gpu

architectures: .venv/dev.stamp
	$(BIN)/python tests/architectures_page.py

verify-table: .venv/dev.stamp .venv-peers/stamp
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/verify_page.py

clean:
	rm -rf .venv .venv-peers $(NODE)/node_modules examples/browser/node_modules demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
