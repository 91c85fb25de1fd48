# `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
# cpu or gpu: which FAISS is installed.
FAISS ?= cpu
BIN := .venv/bin

# `make evidence`: the world (what its H&E reveals, the stain's shortcut, its seed, its folder), the run's folder, and what
# `lgd ablate` is asked for.
COUPLING ?= 1.0
SHORTCUT ?=
SHORTCUT_IN ?= stain
SEED ?= 7001
EVIDENCE ?= runs/evidence
TISSUE ?= $(EVIDENCE)
ABLATE ?= --seeds 5 --jobs 2

.PHONY: demo test check bench faults evidence evidence-coupling evidence-shortcut evidence-background clean

demo: .venv/installed
	$(BIN)/lgd demo

# Two processes, each with whole files of tests. Of one that crashes the test and the stacks of all threads are printed last,
# beside what Ray logged of workers that crashed.
define PYTEST
@logs=$$(mktemp -d); began=$$(date +%s); \
PYTHONFAULTHANDLER=1 LGD_CRASH_LOGS=$$logs $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0 $(1); status=$$?; \
if [ $$status -ne 0 ]; then \
	for log in $$(grep -ls 'Fatal Python error' $$logs/*); do echo "pytest crashed in"; cat $$log; done; \
	find $${RAY_TMPDIR:-/tmp}/ray -name '*.err' -newermt @$$began 2>/dev/null | \
		xargs -r grep -A 40 'Fatal Python error'; \
fi >&2; rm -r $$logs; exit $$status
endef

test: .venv/installed-dev
	$(call PYTEST)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: export LGD_FAULTS = all
faults: .venv/installed-dev
	$(call PYTEST,-m faults)

# All benchmarks, or some: make bench NAMES="loader query"
bench: .venv/installed
	$(BIN)/python tools/bench $(NAMES)

evidence: .venv/installed
	$(BIN)/lgd synth $(TISSUE)/tissue --pairs 4800 --slides 400 --size 96 --test 0.3 --seed $(SEED) \
		--coupling $(COUPLING) $(if $(SHORTCUT),--shortcut $(SHORTCUT) --shortcut-in $(SHORTCUT_IN))
	$(BIN)/lgd build-shards --layout bci --root $(TISSUE)/tissue --out $(TISSUE)/shards \
		--slides $(TISSUE)/tissue/truth.csv --split keep:0.05 --labelled 24 --mpp 0.46
	$(BIN)/lgd ablate --config configs/evidence.yaml --run.dir $(EVIDENCE) --data.shards "[$(TISSUE)/shards]" $(ABLATE)

# The same world where the H&E reveals less, and nothing (the null world), with three seeds each.
evidence-coupling: evidence
	for coupling in 0 0.5 0.75; do \
		$(MAKE) evidence COUPLING=$$coupling EVIDENCE=$(EVIDENCE)-$$coupling ABLATE="--seeds 3 --jobs 2" || exit 1; \
	done
	$(BIN)/python tools/studies/plot_coupling.py $(EVIDENCE)/coupling.png 0=$(EVIDENCE)-0 0.5=$(EVIDENCE)-0.5 \
		0.75=$(EVIDENCE)-0.75 $(COUPLING)=$(EVIDENCE)

# Training slides of which the H&E's stain (or background) gives nothing (0) or the level of most (0.9) away, while the test
# slides are the same and it tells nothing: how far each method falls, under several strengths of augmentation.
evidence-shortcut: IN = stain
evidence-shortcut: JITTERS = 0 0.2 0.4
evidence-background: IN = background
evidence-background: JITTERS = 0 0.2
JITTER = $(if $(filter stain,$(IN)),stain_jitter,light_jitter)
evidence-shortcut evidence-background: .venv/installed
	for jitter in $(JITTERS); do for shortcut in 0 0.9; do \
		$(MAKE) evidence SHORTCUT=$$shortcut SHORTCUT_IN=$(IN) TISSUE=$(EVIDENCE)-$(IN)-$$shortcut \
			EVIDENCE=$(EVIDENCE)-$(IN)-$$shortcut-jitter-$$jitter \
			ABLATE="--seeds 3 --jobs 2 --data.$(JITTER) $$jitter" || exit 1; \
	done; done
	$(BIN)/python tools/studies/table_shortcut.py $(foreach jitter,$(JITTERS),\
		$(jitter)=$(EVIDENCE)-$(IN)-0-jitter-$(jitter),$(EVIDENCE)-$(IN)-0.9-jitter-$(jitter))

CONSTRAINTS = $(if $(filter cpu,$(FAISS)),--constraint constraints-cpu.txt)

.venv/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(FAISS)]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(FAISS),dev]'
	touch $@

clean:
	rm -rf .venv runs
