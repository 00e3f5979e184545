# Everything starts here; on a fresh Debian 12, as root, with make and git.
# tools/setup.sh brings the rest. What runs write is under build/.

VENV := .venv
BIN := $(VENV)/bin
OPENSTACK_BIN := .venv-openstack/bin
PYTEST_ARGS ?=
DEMO_ARGS ?=
OPENSTACK_DEMO_ARGS ?=
TRIALS ?= 500
SEED ?=
CAMPAIGN_ARGS ?=
EVAL_ARGS ?=
BENCH_ARGS ?= --memory 128,4096 --dirty 1000,5000,20000

.DEFAULT_GOAL := help
.PHONY: help setup demo openstack-setup openstack-demo openstack-test test unit bench eval campaign campaign-output lint genconfig docs clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## System packages and .venv (the others call this; quick when done)
	@tools/setup.sh

demo: setup ## Protect a guest, kill its host's QEMU, see it go on; writes build/demo/
	@mkdir -p build/demo
	$(BIN)/nova-pmt-lab demo $(DEMO_ARGS)

openstack-setup: ## System packages and .venv-openstack, with all of OpenStack's services
	@tools/setup.sh openstack

openstack-demo: openstack-setup ## A real Nova: protect a server, kill its host, see it go on; writes build/openstack-demo/
	@mkdir -p build/openstack-demo
	$(OPENSTACK_BIN)/nova-pmt-lab openstack-demo $(OPENSTACK_DEMO_ARGS)

openstack-test: openstack-setup ## Tests against a real Nova, as root (40 minutes)
	@mkdir -p build/test
	$(OPENSTACK_BIN)/pytest tests/integration --durations=10 --junitxml=build/test/junit-openstack.xml $(PYTEST_ARGS)

test: setup ## ruff, then unit and functional tests (functional: as root)
	$(BIN)/ruff check .
	@mkdir -p build/test
	$(BIN)/pytest tests/unit tests/functional --timeout=300 --durations=10 --junitxml=build/test/junit.xml $(PYTEST_ARGS)

unit: setup ## The unit tests alone, within seconds
	$(BIN)/pytest tests/unit $(PYTEST_ARGS)

bench: setup ## Measure pauses against their floor; writes build/bench/pause.json
	@mkdir -p build/bench
	$(BIN)/nova-pmt-bench pause $(BENCH_ARGS) --json build/bench/pause.json

eval: setup ## PMT, Kemari and auto compared (an hour; EVAL_ARGS=--quick); writes build/eval/
	@mkdir -p build/eval
	$(BIN)/nova-pmt-eval run $(EVAL_ARGS)

campaign: setup ## All kinds of faults under requests: TRIALS=500 SEED=n; writes build/campaign/
	@mkdir -p build/campaign
	$(BIN)/nova-pmt-campaign faults --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) $(CAMPAIGN_ARGS)

campaign-output: setup ## Kills alone, between two hosts without managers; writes build/campaign-output/
	@mkdir -p build/campaign-output
	$(BIN)/nova-pmt-campaign run --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) \
	  --directory build/campaign-output $(CAMPAIGN_ARGS)

lint: setup ## ruff, bashate, codespell, mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/lint.sh

genconfig: setup ## Write etc/nova_pmt/nova-pmt.conf.sample
	@mkdir -p etc/nova_pmt
	$(BIN)/oslo-config-generator --config-file etc/oslo-config-generator/nova-pmt.conf

# Sphinx and its theme come only when somebody wants the documentation.
$(VENV)/.docs-stamp: doc/requirements.txt
	@echo '==> installing the documentation tools'
	@$(BIN)/pip install -q --disable-pip-version-check -r doc/requirements.txt
	@touch $@

docs: setup ## Build the documentation into build/docs/html
	@$(MAKE) --no-print-directory $(VENV)/.docs-stamp
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/docs/doctrees doc/source build/docs/html

clean: ## Remove what runs wrote (build/), keep .venv
	rm -rf build
	find nova_pmt tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV) .venv-openstack .tox ./*.egg-info
