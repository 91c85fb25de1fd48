# `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
# cpu or gpu: which FAISS is installed.
FAISS ?= cpu
BIN := .venv/bin

# What `make evidence` shows: method, coupling, shortcut, background, centers or ki67.
STUDY ?= method

.PHONY: demo test test-encoders check docs bench faults evidence bci mist vendor clean

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

# Encoders of timm, in an environment of its own: torchvision of another torch than .venv's. The rest is tested by `make test`.
test-encoders: .venv-encoders/installed
	.venv-encoders/bin/python -m pytest -n 2 --dist loadfile tests/models tests/train/test_frozen.py tests/cli/test_encoders_of_the_hub.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in runs/site; a broken link is an error. The variable silences a notice of mkdocs-material.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

faults: export LGD_FAULTS = all
faults: .venv/installed-dev
	$(call PYTEST,-m faults -o faulthandler_timeout=3600)

# All benchmarks, or some: make bench NAMES="loader query"
bench: .venv/installed
	$(BIN)/python tools/bench $(NAMES)

evidence: .venv/installed
	$(BIN)/python tools/studies/evidence.py $(STUDY)

# BCI and MIST in full, from the folders as they are published: make bci BCI=FOLDER, and make mist MIST=FOLDER, or with BCI too,
# whose levels then teach with it. Fields of the run: OPTIONS="--train.workers 2 --data.size 256"
REAL = tools/studies/real.py
FIELDS = $(if $(OPTIONS),-- $(OPTIONS))

bci: .venv/installed
	$(BIN)/python $(REAL) bci "$(or $(BCI),$(error name its folder: make bci BCI=FOLDER))" $(FIELDS)

mist: .venv/installed
	$(BIN)/python $(REAL) mist "$(or $(MIST),$(error name its folder: make mist MIST=FOLDER))" \
		$(if $(BCI),--bci "$(BCI)") $(FIELDS)

# What others wrote and lies in the repository: the viewer of lgd serve, and what tests its page. Of npm only `npm pack` is used.
OPENSEADRAGON = openseadragon@6.1.1
AXE = axe-core@4.14.1

vendor:
	@folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; set -e; \
	unpack() { mkdir $$folder/$$2; tar xzf "$$folder/$$(npm pack --silent --pack-destination $$folder $$1)" -C $$folder/$$2; }; \
	unpack $(OPENSEADRAGON) viewer; unpack $(AXE) axe; \
	cp $$folder/viewer/package/build/openseadragon/openseadragon.min.js lgd/serve/static/; \
	cp $$folder/viewer/package/LICENSE.txt lgd/serve/static/openseadragon-LICENSE.txt; \
	cp $$folder/axe/package/axe.min.js tests/serve/; cp $$folder/axe/package/LICENSE tests/serve/axe-LICENSE.txt; \
	cp $$folder/axe/package/LICENSE-3RD-PARTY.txt tests/serve/axe-LICENSE-3RD-PARTY.txt; \
	(cd lgd/serve/static; echo '# $(OPENSEADRAGON)'; sha256sum openseadragon.min.js) > lgd/serve/static/VENDORED.txt; \
	(cd tests/serve; echo '# $(AXE)'; sha256sum axe.min.js) > tests/serve/VENDORED.txt

CONSTRAINTS = $(if $(filter cpu,$(FAISS)),--constraint constraints-cpu.txt)

.venv/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(FAISS),serve]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(FAISS),serve,onnx,dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(FAISS),serve,docs]'
	touch $@

.venv-encoders/installed: pyproject.toml constraints-encoders.txt
	$(PYTHON) -m venv .venv-encoders
	.venv-encoders/bin/python -m pip install --quiet --constraint constraints-encoders.txt --editable '.[cpu,encoders]' \
		pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-encoders runs
