# make compare   set up .venv, compare three methods with no constraint on digits, print the verdict (see COMPARE)
# make cost      what the methods cost beside other packages (a short form: make cost COST=--full for all of it)
# make reproduce the first published comparison again, on digits (some 50 minutes); fails where a score differs
# make gpu       tests, costs and a small comparison on a GPU, with the torch that PYTHON has (ARGS=--dry-run: without one)
# make test      set up .venv, run the tests
# make fuzz      train random configurations (ARGS="--count 10000 --seed 7 --jobs 2")
# make lint      formatting, lint, types
# make compatibility  try every method with what PyTorch offers, and write the tables of docs/compatibility.md
# make docs      regenerate the tables in docs/, benchmarks/README.md, and the notebook's outputs

PYTHON ?= python3
BIN := .venv/bin
METHODS ?= own riemannian soft unconstrained default
COMPARE ?= --depth 4 --bias True --scale relu --epochs 20
COST ?= --short
ARGS ?=

.PHONY: compare reproduce cost gpu test fuzz lint compatibility docs clean

compare: .venv/.installed
	$(BIN)/stiefel compare benchmarks/omdsm.py --methods $(METHODS) $(COMPARE) $(ARGS)

reproduce: .venv/.installed
	$(BIN)/python benchmarks/publish/published.py run omdsm $(ARGS)

cost: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/cost.py $(COST) $(ARGS)

gpu: .venv-gpu/.installed
	.venv-gpu/bin/python benchmarks/gpu.py $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

fuzz: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

compatibility: .venv/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/features.py

docs: .venv/.installed
	PYTHONPATH=tests/support $(BIN)/python tests/docs/test_readme.py
	$(BIN)/python benchmarks/publish/published.py readme
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "stiefel needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into .venv (some minutes the first time: torch is large)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --config-settings editable_mode=compat -e ".[compare,bench,notebooks,integrations,dev]"
	@touch $@

# On a machine with a GPU its own torch is kept, whatever version from 2.8 on: nothing here downloads another. Where that
# torch lies in a virtual environment, "system site packages" are not its own: its folder is named besides.
.venv-gpu/.installed: pyproject.toml
	@$(PYTHON) -c 'import torch; print("torch", torch.__version__, "of", torch.__file__)' \
	  || { echo "make gpu uses the torch that is installed; name its Python with: make gpu PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	@$(PYTHON) -c 'import torch; from pathlib import Path; print(Path(torch.__file__).parents[1])' \
	  > "$$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed \
	  --config-settings editable_mode=compat -e ".[compare,gpu]"
	@touch $@

clean:
	rm -rf .venv .venv-gpu runs
