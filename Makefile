# What can be done here. Everything a target needs is installed by deploy/setup: only make itself has to be there.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
ARGS :=
# Some machines tell Python to keep no compiled files. Each of the many processes that tests start would compile anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Python, the locked packages, the voxcache command
	@deploy/setup

.PHONY: demo
demo: ## a cold and a warm study through a real S3 gateway and a real Triton (ARGS=--json for machines)
	@deploy/setup ceph triton
	@$(BIN)/voxcache demo $(ARGS)

.PHONY: check
check: setup ## format, lint, types, import contracts and the quick tests, side by side; under a minute
	@$(MAKE) --no-print-directory --jobs 3 --output-sync lint quick-cache quick-others

.PHONY: lint
lint: setup
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

QUICK := $(BIN)/pytest -q -p no:cacheprovider -p no:schemathesis --hypothesis-profile quick -m "not service and not slow"

.PHONY: quick-cache quick-others
quick-cache: setup
	$(QUICK) tests/cache
quick-others: setup
	$(QUICK) tests --ignore tests/cache

.PHONY: test
test: ## every test, also those on real servers (ARGS picks some)
	@deploy/setup ceph triton redis orthanc perf prometheus browser
	@deploy/versions
	$(BIN)/pytest -m "" $(ARGS)

.PHONY: format
format: setup ## put code in its form and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: setup ## write the tables of settings, metrics, errors and ops anew
	$(BIN)/python -m serving.tables

.PHONY: bench bench-full
bench: ## voxcache under load and beside its peers, in under 15 minutes: loadtest/results/DATE/report.html; the last line is JSON
	@deploy/setup ceph triton redis orthanc bench peers
	@$(BIN)/python -m loadtest.bench $(ARGS)
bench-full: ## the same in its long forms, an hour and a half; two hours on a slow machine
	@deploy/setup ceph triton redis orthanc bench peers
	@$(BIN)/python -m loadtest.bench --full $(ARGS)

.PHONY: profile-hit profile-miss
profile-hit: ## flame graphs of the daemon while it serves hits: loadtest/results/profile-hit-*.svg
	@deploy/setup ceph bench
	@$(BIN)/python -m loadtest.profile hit $(ARGS)
profile-miss: ## … and while it makes tensors of what the bucket has
	@deploy/setup ceph bench
	@$(BIN)/python -m loadtest.profile miss $(ARGS)

.PHONY: screenshots
screenshots: ## take the pictures of the status page in docs/ anew, from real daemons
	@deploy/setup triton redis browser
	@$(BIN)/python -m tests.screenshots $(ARGS)

.PHONY: dashboards
dashboards: setup ## write Grafana's dashboards and Prometheus' rules anew (ARGS="--runbooks URL": where docs/operations.md is)
	$(BIN)/python -m dashboards.generate $(ARGS)

.PHONY: bench-handoff
bench-handoff: ## the hand-off beside Redis, nginx and diskcache; the last line is JSON
	@deploy/setup bench
	@$(BIN)/python -m loadtest.handoff $(ARGS)

.PHONY: bench-warm
bench-warm: setup ## arrivals, and hits and misses during a flood of warm-ups; the last line is JSON
	@$(BIN)/python -m loadtest.warm $(ARGS)

.PHONY: bench-embeddings
bench-embeddings: setup ## the nearest of 1 000, 10 000 and 100 000 embeddings beside one matrix; the last line is JSON
	@$(BIN)/python -m loadtest.embeddings $(ARGS)

.PHONY: bench-observe
bench-observe: ## what it costs to watch, and whether three ways to tell p99 agree; the last line is JSON
	@deploy/setup bench prometheus
	@$(BIN)/python -m loadtest.observe $(ARGS)

.PHONY: bench-infer
bench-infer: ## inference by reference beside bytes, regions and an empty proxy; the last line is JSON
	@deploy/setup bench triton perf
	@$(BIN)/python -m loadtest.infer $(ARGS)

.PHONY: chaos-triton
chaos-triton: ## ten thousand inferences while Triton is killed every few seconds; the last line is JSON
	@deploy/setup triton
	@$(BIN)/python -m loadtest.chaos_triton $(ARGS)

.PHONY: crash-arrivals
crash-arrivals: ## 10 000 arrivals while the daemon and Redis are killed, and 500 that two nodes share; the last line is JSON
	@deploy/setup ceph redis
	@$(BIN)/python -m tests.acceptance.arrivals $(ARGS)

.PHONY: bench-answers
bench-answers: ## answers that were given before, kept here or in Triton's response cache; the last line is JSON
	@deploy/setup triton
	@$(BIN)/python -m loadtest.answers $(ARGS)

.PHONY: bench-eviction
bench-eviction: setup ## eviction policies on traces, beside libcachesim's and what no policy could do better; the last line is JSON
	@$(BIN)/python -m loadtest.eviction $(ARGS)

.PHONY: conformance
conformance: setup ## every kind of frame decoded twice and compared; the last line is JSON
	@$(BIN)/python -m loadtest.conformance $(ARGS)

.PHONY: bench-decode
bench-decode: setup ## decoding beside the codecs alone and plain pydicom; the last line is JSON
	@$(BIN)/python -m loadtest.decode $(ARGS)

.PHONY: bench-tiers
bench-tiers: setup ## the tiers beside the device, the origin and doing without them; the last line is JSON
	@$(BIN)/python -m loadtest.tiers $(ARGS)

ROUNDS := 500

.PHONY: crash
crash: setup ## kill -9 at random instants under load (ROUNDS=…): wrong bytes, overruns, recovery; the last line is JSON
	@$(BIN)/python -m loadtest.crash --rounds $(ROUNDS) $(ARGS)

.PHONY: soak
soak: setup ## a million steps of the store against a dict, with faults and kills (ARGS="--steps 20000" for fewer); the last line is JSON
	@$(BIN)/python -m tests.soak $(ARGS)

SECONDS := 600

.PHONY: fuzz
fuzz: setup ## ten minutes of objects that nobody would write, against the DICOM code (SECONDS=…); the last line is JSON
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: --require-hashes \
		-r deploy/lock/fuzz.txt || { echo "fuzz: no atheris for this machine: it has wheels for Linux on x86-64 and" \
		"Python 3.11 to 3.13, and here is $$($(BIN)/python -c 'import platform as p; print(p.platform(), p.python_version())')" >&2; exit 1; }
	@$(BIN)/python -m tests.fuzz.dicom --seconds $(SECONDS)

# Universal: one lock for every supported Python. No annotations and no index, so that it names no host.
COMPILE := deploy/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	--no-emit-index-url --no-emit-find-links

.PHONY: lock
lock: setup ## renew the locks of all packages (UPGRADE=--upgrade for newer versions)
	$(COMPILE) $(UPGRADE) pyproject.toml -o deploy/lock/run.txt
	$(COMPILE) $(UPGRADE) pyproject.toml --extra tracing --group test --group lint --group bench --group dashboards -o deploy/lock/dev.txt
	$(COMPILE) $(UPGRADE) --group fuzz -o deploy/lock/fuzz.txt
	echo pip | $(COMPILE) $(UPGRADE) - -o deploy/lock/pip.txt
	printf '%s\n' tritonclient==2.48.0 nvidia-cuda-runtime-cu12 | $(COMPILE) $(UPGRADE) --no-deps - -o deploy/lock/perf.txt
	printf '%s\n' numpy nvidia-pytriton | $(COMPILE) $(UPGRADE) --no-deps - -o deploy/lock/triton.txt
