# Every target sets up what it needs: .venv at the versions of constraints.txt, made anew when they change.
PYTHON ?= python3
PY := .venv/bin/python
BIN := .venv/bin
VLLM_PY := .venv-vllm/bin/python
SGLANG_PY := .venv-sglang/bin/python

VLLM := vllm or vllm_more or vllm_http
OWN_RUN := sweeps or engines or sglang or browser or ray or ray_vllm or package or deploy or $(VLLM)

# Files with tests of a set, and folders whose conftest.py marks them: the others are not collected.
marked = $(patsubst %/conftest.py,%,$(shell grep -rl 'mark\.$(1)\b' tests --include='test_*.py' --include=conftest.py))

SHELL := /bin/bash
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Tests start hundreds of processes. Without the files that Python compiles, each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-fast test-integration test-browser test-package test-deploy test-sweeps test-engines test-ray test-ray-vllm test-vllm test-vllm-more test-vllm-http test-all simulate fuzz endurance soak relay \
	setup-tests setup-browser setup-site setup-deploy setup-engines setup-ray setup-vllm setup-sglang test-sglang test-sglang-more lint format docs site bench bench-vllm bench-sglang clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv; instant when it is up to date
	@$(PYTHON) scripts/setup_env.py

setup-tests:
	@$(PYTHON) scripts/setup_env.py --tests

setup-browser:
	@$(PYTHON) scripts/setup_env.py --browser

setup-site:
	@$(PYTHON) scripts/setup_env.py --site

setup-deploy:
	@$(PYTHON) scripts/setup_env.py --deploy

setup-engines:
	@$(PYTHON) scripts/setup_env.py --tests --engines

setup-ray:
	@$(PYTHON) scripts/setup_env.py --ray

setup-vllm: ## make .venv-vllm, vLLM for CPUs: 2 GB
	@$(PYTHON) scripts/setup_vllm.py

demo: setup ## ask real questions about real pictures, across two workers
	@$(PY) examples/demo.py

test: setup-tests ## what every change must pass, without engines of other projects: about seven minutes
	@$(MAKE) --no-print-directory --keep-going -j6 $(PARTS:%=part-%)

# Parts of make test, the longest first. Each is a process that collects its own files: every worker of pytest-xdist collects all
# of them, which would be a fifth of the work. "rest" has the folders that no other part names.
PARTS := serve transfer vllm workers rest engine connectors
workers := tests/serve/workers
vllm := tests/serve/vllm tests/serve/top
serve := tests/serve $(workers:%=--ignore=%) $(vllm:%=--ignore=%)
transfer := tests/transfer tests/transports
engine := tests/engine tests/cli tests/fuzz
connectors := tests/connectors tests/disaggregation tests/discovery tests/cache
rest := tests $(patsubst %,--ignore=%,tests/serve $(transfer) $(engine) $(connectors))

$(PARTS:%=part-%): part-%:
	@set -o pipefail; $(PY) -m pytest -m "not ($(OWN_RUN))" $($*) 2>&1 | (trap "" INT; exec sed -u "s/^/$*: /")

test-fast: setup ## no processes, no sockets, no waiting
	@$(PY) -m pytest -m "not integration and not ($(OWN_RUN))" -n 2 --dist worksteal

test-integration: setup-tests ## real processes and sockets
	@$(PY) -m pytest -m "integration and not ($(OWN_RUN))" -n 3 --dist loadfile --no-loadscope-reorder

SEEDS ?= 10000
FIRST ?= 0
simulate: setup ## tell SEEDS stories of whole managers, from seed FIRST on; prints the smallest that breaks
	@$(PY) -m tests.transfer.simulation --seeds $(SEEDS) --first $(FIRST)

N ?= 100000
JOBS ?= 2
TARGET ?=
fuzz: setup ## give N damaged inputs to each parser, or to TARGET, from seed FIRST on; prints the smallest that shows a fault
	@$(PY) -m tests.fuzz --inputs $(N) --first $(FIRST) --jobs $(JOBS) $(if $(TARGET),--target $(TARGET))

TIMES ?= 20
TRANSPORT ?= shm
endurance: setup-tests ## kill and stop each process of a stack in the middle of transfers, TIMES times: half an hour
	@$(PY) -m tests.serve.workers.endurance --times $(TIMES) --transport $(TRANSPORT) $(if $(ONLY),--only $(ONLY))

TRANSFERS ?= 100000
soak: setup-tests ## TRANSFERS transfers in one pair of processes, with aborts and lost connections: a quarter of an hour
	@$(PY) -m tests.transfer.soak --transfers $(TRANSFERS) --transport $(TRANSPORT) --result $(or $(RESULT),soak-$(TRANSPORT))

FLIPS ?= 50
relay: setup-tests ## every fault in every hop of a running stack, and FLIPS flipped bits in each direction of each hop
	@$(PY) -m tests.serve.relay --flips $(FLIPS)

test-sweeps: setup-tests ## every fault in every hop of a running stack, many places, many requests: some minutes
	@$(PY) -m pytest -m "sweeps and not engines" -n 3 --dist loadfile --no-loadscope-reorder $(call marked,sweeps)

test-package: setup ## builds the wheel and the sdist, and installs them into empty environments: a minute
	@$(PY) -m pytest -m package tests/tooling

test-deploy: setup-deploy ## the steps of the image, the compose file and the pods of the chart, run as processes: some minutes; needs root
	@$(PY) -m pytest -m deploy tests/deploy

test-browser: setup-browser ## the live page of a router in a real browser, Chromium
	@$(PY) -m pytest -m browser tests/serve/browser

test-engines: setup-engines ## the mooncake and nixl transports on their real engines
	@$(PY) -m pytest -m "engines and not ($(VLLM))" -n 2 --dist loadfile $(call marked,engines)

test-ray: setup-ray ## Ray Serve on a cluster of three nodes on this machine: lost nodes, bursts; some minutes; needs root
	@$(PY) -m pytest -m "ray and not ray_vllm" tests/deploy/ray

test-vllm: setup-vllm ## vLLM's engines, split by the connector; makes .venv-vllm, 2 GB
	@$(VLLM_PY) -m pytest -m vllm tests/connectors

test-vllm-more: ## the same on every transport, with more models, ranks and faults: some minutes
	@$(PYTHON) scripts/setup_vllm.py --engines
	@$(VLLM_PY) -m pytest -m vllm_more tests/connectors

test-vllm-http: ## vLLM's servers behind the router, asked by the openai client: some minutes
	@$(PYTHON) scripts/setup_vllm.py --engines
	@$(VLLM_PY) -m pytest -m vllm_http tests/serve/vllm tests/bench/serving

test-ray-vllm: ## vLLM on Ray: an instance that encodes and one that answers; adds Ray to .venv-vllm
	@$(PYTHON) scripts/setup_vllm.py --ray
	@$(VLLM_PY) -m pytest -m ray_vllm tests/deploy/ray/test_ray_on_vllm.py

setup-sglang: ## make .venv-sglang, SGLang for CPUs: 1.7 GB
	@$(PYTHON) scripts/setup_sglang.py

test-sglang: setup-sglang ## SGLang's servers, divided by the plug-in; makes .venv-sglang, 1.7 GB
	@$(SGLANG_PY) -m pytest -m sglang tests/connectors/sglang

test-sglang-more: setup-sglang ## a small comparison of SGLang's servers, measured for real: some minutes
	@$(SGLANG_PY) -m pytest -m sglang tests/bench/serving

test-all: test test-browser test-package test-deploy test-sweeps test-engines test-ray test-vllm test-sglang test-sglang-more test-vllm-more test-vllm-http test-ray-vllm ## every test

lint: setup ## style, types, imports, names, lengths, English, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(PY) scripts/check_names.py
	$(PY) scripts/check_lengths.py
	$(PY) scripts/check_english.py
	$(PY) scripts/draw_states.py --check
	$(PY) scripts/document_settings.py --check
	$(PY) scripts/document_errors.py --check
	$(PY) scripts/document_commands.py --check
	$(PY) scripts/document_metrics.py --check
	$(PY) scripts/draw_dashboard.py --check

format: setup ## mend what can be mended by a program
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated documents
	$(PY) scripts/draw_states.py
	$(PY) scripts/document_settings.py
	$(PY) scripts/document_errors.py
	$(PY) scripts/document_commands.py
	$(PY) scripts/document_metrics.py
	$(PY) scripts/draw_dashboard.py

site: setup-site ## build the documentation site in build/site; a warning ends it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/site/index.html"

bench: setup-engines ## every transport beside the alternatives, on this machine: about six minutes
	@$(BIN)/embferry bench transfer

bench-vllm: ## vLLM undivided, and divided by its connectors and by ours, through the same scenarios: forty minutes
	@$(PYTHON) scripts/setup_vllm.py --engines
	@.venv-vllm/bin/embferry bench serve --compare --rounds 2

bench-sglang: ## SGLang undivided, and divided by its own transfers and by ours, through the same scenarios: an hour
	@$(PYTHON) scripts/setup_sglang.py --engines
	@.venv-sglang/bin/embferry bench serve --compare --engine sglang

clean: ## remove everything that was made here
	rm -rf .venv .venv-vllm .venv-sglang build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
