# `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
# cpu or gpu: which FAISS is installed.
FAISS ?= cpu
BIN := .venv/bin

# The world of `make evidence`: what its H&E reveals, its seed, and what `lgd ablate` is asked for.
COUPLING ?= 1.0
SHORTCUT ?= 0
SEED ?= 7001
EVIDENCE ?= runs/evidence
ABLATE ?= --seeds 5 --jobs 2

.PHONY: demo test check bench faults evidence evidence-coupling clean

demo: .venv/installed
	$(BIN)/lgd demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: .venv/installed-dev
	LGD_FAULTS=all $(BIN)/python -m pytest -m faults

bench: .venv/installed
	$(BIN)/lgd bench

evidence: .venv/installed
	$(BIN)/lgd synth $(EVIDENCE)/tissue --pairs 4800 --slides 400 --size 96 --test 0.3 --seed $(SEED) \
		--coupling $(COUPLING) --shortcut $(SHORTCUT)
	$(BIN)/lgd build-shards --layout bci --root $(EVIDENCE)/tissue --out $(EVIDENCE)/shards \
		--slides $(EVIDENCE)/tissue/truth.csv --split keep:0.05 --labelled 24
	$(BIN)/lgd ablate --config configs/evidence.yaml --run.dir $(EVIDENCE) $(ABLATE)

# The same world where the H&E reveals less, and nothing (the null world), with three seeds each.
evidence-coupling: evidence
	for coupling in 0 0.5 0.75; do \
		$(MAKE) evidence COUPLING=$$coupling EVIDENCE=$(EVIDENCE)-$$coupling ABLATE="--seeds 3 --jobs 2" || exit 1; \
	done
	$(BIN)/python tools/plot_coupling.py $(EVIDENCE)/coupling.png 0=$(EVIDENCE)-0 0.5=$(EVIDENCE)-0.5 \
		0.75=$(EVIDENCE)-0.75 $(COUPLING)=$(EVIDENCE)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS)]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS),dev]'
	touch $@

clean:
	rm -rf .venv runs
