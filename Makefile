# `make help` lists the commands. Each does its own set-up, once, in .venv.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
D2 := $(PIP) --no-build-isolation -r requirements-detectron2.txt
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
DEMO := output/demo

.PHONY: help demo compare test test-slow lint benchmark gpu-check clean

help:
	@echo "make demo       train a small Libra Faster R-CNN, evaluate it and draw what it finds"
	@echo "make compare    train the demo and its plain twin, and compare them"
	@echo "make test       run the tests"
	@echo "make test-slow  damage configs, data and checkpoints, kill runs, export graphs and more (half an hour)"
	@echo "make lint       check style and formatting"
	@echo "make benchmark  measure speed and memory (minutes; ARGS=--help for options)"
	@echo "make gpu-check  run the tests that need a GPU, and measure what docs/benchmarks.md is to hold"
	@echo "make clean      remove .venv, generated data sets and output"

demo: .venv/requirements
	@$(MAKE) --no-print-directory .venv/detectron2 2> /dev/null || { \
	  echo "make demo needs detectron2, and it could not be installed from its repository;" \
	    ".venv/detectron2.log says why" >&2; exit 1; }
	@$(PY) train_net.py --config-file configs/Demo/demo.yaml --overwrite \
	  OUTPUT_DIR $(DEMO) SOLVER.FAST True $(ARGS)
	@$(PY) tools/predict.py $(DEMO) digits_val --num-images 8 --sheet $(DEMO)/predictions.jpg --overwrite
	@$(PY) tools/analyse.py run $(DEMO) $(DEMO)/training.png --overwrite

compare: .venv/requirements .venv/detectron2
	@$(PY) tools/ablate.py tools/plans/demo.yaml --output output/compare $(ARGS)

test: .venv/requirements
	@$(MAKE) --no-print-directory .venv/detectron2 2> /dev/null || true
	@$(PYTEST) $(ARGS)

test-slow: .venv/requirements .venv/detectron2
	@FUZZ_EXAMPLES=10000 $(PYTEST) tests/test_fuzz.py --timeout 36000 $(ARGS)
	@$(PYTEST) -m slow --ignore tests/test_damage.py $(ARGS)
	@FUZZ_RUNS=1000 $(PYTEST) tests/test_damage.py -m "slow or not slow" --timeout 36000 $(ARGS)

lint: .venv/requirements
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

benchmark: .venv/requirements .venv/detectron2
	@$(PY) tools/benchmark.py $(ARGS)

# What a machine with a GPU is to be asked; its tables are for docs/benchmarks.md.
gpu-check: .venv/requirements .venv/detectron2
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "make gpu-check needs a GPU that torch finds" >&2; exit 1; }
	@$(PYTEST) tests/test_matching.py tests/test_modeling.py tests/test_retinanet.py tests/test_sampling.py \
	  tests/test_look.py tests/test_loader.py tests/test_max_iou.py tests/test_packing.py tests/test_proposals.py tests/test_gpu.py
	@$(PY) tools/benchmark.py samplers matching proposals speed gpu-short --repeats 10 $(ARGS)

clean:
	rm -rf .venv datasets/digits output

.venv/requirements: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "libra_d2 needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "installing requirements into .venv (several GB, minutes, once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt -r requirements-dev.txt
	@touch $@

# detectron2 compiles against the torch it finds, hence after it and without build isolation; and
# without what pip has kept of it, which may be of another torch.
.venv/detectron2: requirements-detectron2.txt .venv/requirements
	@echo "building detectron2 from its repository (about two minutes, once)"
	@GIT_TERMINAL_PROMPT=0 $(D2) --no-deps --force-reinstall --no-cache-dir > .venv/detectron2.log 2>&1
	@GIT_TERMINAL_PROMPT=0 $(D2) >> .venv/detectron2.log 2>&1  # what it depends on
	@touch $@
