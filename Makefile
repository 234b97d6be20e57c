# `make demo` and `make test` do all set-up on a fresh machine: they make .venv and install the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test slow browser screenshots lint types audit check docs bench archs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant,optim,tensorboard,trackio,dev]'
	touch $@

demo: $(VENV)/.installed        ## train a LoRA with a training adapter on the embedded miniature
	$(BIN)/detour demo --out demo

test: $(VENV)/.installed        ## the default tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.installed        ## kills, damage, every optimizer, photographs
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

browser: $(VENV)/.installed     ## the web UI's pages in Chromium (apt-get install chromium), one browser at a time
	$(BIN)/python -m pytest -m browser -rs

screenshots: $(VENV)/.installed ## draw docs/screenshots again: trains the miniature twice, then looks at every page
	$(BIN)/python tests/browser/screenshots.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

audit:                          ## known holes in the pinned versions; needs the network
	$(PYTHON) .ci/audit

archs: $(VENV)/.installed       ## every architecture, from its example job file to a proven LoRA
	$(BIN)/python benchmarks/archs.py

check: lint types test slow browser     ## what CI runs

docs: $(VENV)/.installed        ## write the generated pages again
	$(BIN)/python -m detour.config.reference > docs/options.md
	$(BIN)/python -m detour.config.reference schema > docs/job.schema.json
	$(BIN)/python -m detour.archs.reference > docs/architectures.md.new && mv docs/architectures.md.new docs/architectures.md

bench: $(VENV)/.installed       ## the tables of docs/benchmarks.md
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/web.py

clean:
	rm -rf $(VENV) demo build dist
