# Two words to run, two to test: `make up`, `make test`. Needs make and Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := worker,local,dev

.DEFAULT_GOAL := help
.PHONY: help up test lint check format lock clean bench bench-compare bench-peers bench-chart bench-waiting bench-worker bench-gpu bench-expiry bench-demo soak soak-guards

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | \
		while read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

up: .venv/installed ## Run the whole service here until Ctrl-C
	@$(BIN)/python -m deploy.local

# Two processes, each with servers of its own; who is done first takes tests from the other.
test: .venv/installed ## Run the tests
	@$(BIN)/pytest -n 2 --dist worksteal

lint: .venv/installed ## Check format, rules, types and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint test ## Everything that must hold before a commit

bench: .venv/installed ## Measure every figure that is quoted, each with its goal (needs wrk)
	@$(BIN)/python -m benchmarks $(if $(SAVE),--save $(SAVE))

bench-compare: .venv/installed ## Measure this tree beside an older one: BASE=<git revision>
	@test -n "$(BASE)" || { echo "Which revision? make bench-compare BASE=main" >&2; exit 1; }
	@$(BIN)/python -m benchmarks.compare $(BASE) $(MODULES)

bench-peers: .venv/installed ## Measure beside FastAPI with the ORM, and RQ or Celery
	@$(BIN)/python -m benchmarks.peers

# matplotlib is needed for nothing else, and so is in none of the other extras.
bench-chart: .venv/installed ## Draw docs/performance.svg from what `make bench SAVE=FILE` saved: FROM=FILE
	@test -n "$(FROM)" || { echo "From which file? make bench SAVE=FILE; make bench-chart FROM=FILE" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m benchmarks.chart $(FROM) docs/performance.svg

bench-waiting: .venv/installed ## Measure what callers who wait cost the others
	@$(BIN)/python -m benchmarks.waiting

bench-worker: .venv/installed ## Measure what a worker adds to the time of its GPU
	@$(BIN)/python -m benchmarks.worker

bench-gpu: .venv/installed ## Measure the full-size model with random weights, on a GPU
	@$(BIN)/python -m benchmarks.gpu

bench-expiry: .venv/installed ## Measure what erasing a million old tasks costs the others
	@$(BIN)/python -m benchmarks.expiry

bench-demo: .venv/installed ## Measure the demo model: loading, drawing, its size
	@$(BIN)/python -m benchmarks.demo

# What strikes at the moments that guards are for, and workers that are slow enough to be struck.
GUARD_FAULTS = --seconds 60 --faults 200 --customers 24 --patience-s 90 --seed 6 --kinds \
	"freeze worker" "kill worker" "cut commit before" "cut commit after" "empty redis"

# Long: 30 minutes of everything that can go wrong, 10 with the real small model, then the fuzzing.
soak: .venv/installed ## Break the service for an hour, and audit what is left
	@$(BIN)/python -m soak.faults --seconds 1800 --faults 1000
	@$(BIN)/python -m soak.faults --seconds 600 --faults 200 --real-model --customers 8
	@$(BIN)/python -m soak.fuzz
	@$(BIN)/python -m soak.malformed
	@$(BIN)/python -m soak.simulation

soak-guards: .venv/installed ## Take each guard away in turn: the audit must notice
	@for guard in fencing charge lease delivery repair; do \
		echo "Without $$guard:"; \
		if SOAK_STEP_S=0.05 $(BIN)/python -m soak.faults $(GUARD_FAULTS) --without $$guard; then \
			echo "Nobody has noticed that $$guard is gone." >&2; exit 1; fi; done

format: .venv/installed ## Write the code as `lint` wants it, where that needs no thought
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv; torch and its like are large, so this may take minutes."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]' -e ./client
	@touch $@

# Tags such as +cpu name a build, not a version: they would tie everyone to one index.
lock: ## Write the newest versions that fit into constraints.txt
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	echo "Installing the newest of everything beside .venv; this may take minutes."; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'; \
	"$$folder/venv/bin/pip" freeze --exclude-editable > "$$folder/frozen"; \
	if grep -n '[@/:]' "$$folder/frozen"; then echo "A version must come from an index." >&2; exit 1; fi; \
	{ echo "# Every version that is installed, by \`make lock\`. For \`pip install -c\`."; \
	sed 's/+[A-Za-z0-9.]*$$//' "$$folder/frozen"; } > "$$folder/constraints.txt"; \
	cp "$$folder/constraints.txt" constraints.txt

clean: ## Remove what can be made again; the data folder stays
	@rm -rf .venv .bench .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
