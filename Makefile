# make demo | test | setup [EXTRAS=dev,parity] | lint | soak      (PYTHON=python3.12 chooses the interpreter)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
EXTRAS ?=
DEMO_WORKDIR ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# One stamp per set of extras: a repeated call is instant, and asking for another set installs it beside the first.
# The base is always part of it, so `make demo` after `make test` installs nothing.
WANTED := $(sort $(subst $(comma), ,$(EXTRAS)))
STAMP := $(VENV)/.installed-base$(subst $() ,,$(foreach extra,$(WANTED),-$(extra)))
WITH_DEV := $(MAKE) --no-print-directory setup EXTRAS=$(subst $() ,$(comma),$(sort dev $(WANTED)))

# What the Bash setting's sandbox needs on Debian and Ubuntu.
SANDBOX_PACKAGES := bubblewrap uidmap acl
# A Slurm of this machine's own for the launcher's tests: client, controller, node, and the authentication between them.
SLURM_PACKAGES := slurm-client slurmctld slurmd munge
# The browser of the reports' tests, about 400 MB with what it needs, and a font, without which it shows boxes.
BROWSER_PACKAGES := chromium fonts-dejavu-core
# Test files are spread over so many processes; each file stays in one.
TEST_PROCESSES ?= 2

.PHONY: chaos help demo test setup setup-sandbox sandbox-if-possible setup-browser browser-if-possible setup-slurm test-slurm lint soak clean

help:
	@echo "make demo                    the API setting end to end at the tiny preset, into $(DEMO_WORKDIR)"
	@echo "make test                    the whole test suite"
	@echo "make soak                    chaos and endurance: kills, full disks, fuzzing, 1,000 sandboxes"
	@echo "make chaos                   twenty disturbed rounds of a distillation on two processes (needs root: it fills a disk)"
	@echo "make test-slurm              the Slurm launcher in a real Slurm, which it installs (as root, or with sudo)"
	@echo "make setup-sandbox           Debian packages of the Bash setting's sandbox (as root, or with sudo)"
	@echo "make setup-browser           Debian's Chromium for the tests of the reports, about 400 MB (as root, or with sudo)"
	@echo "make lint                    ruff and pyright"
	@echo "make setup [EXTRAS=dev,...]  only $(VENV); extras: gpu tpu oracles parity report inspect dev"
	@echo "make clean                   removes $(VENV)"

setup: $(STAMP)
	@:

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' on PATH; install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: $(PYTHON) is Python %d.%d, subl_jax needs 3.11 or newer; say make PYTHON=python3.11" % v[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Constraints pin what was tested on 3.11; newer Pythons take newer releases within the ranges of setup.py.
$(STAMP): setup.py constraints.txt CITATION.cff | $(BIN)/python
	@pins=(); if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then pins=(-c constraints.txt); fi
	echo "installing subl_jax$(if $(WANTED), with $(WANTED)) into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $${pins[@]+"$${pins[@]}"} \
	  -e '.$(if $(WANTED),[$(subst $() ,$(comma),$(WANTED))])'
	touch $@
	touch $(VENV)/.installed-base

demo: setup
	@$(BIN)/python -m experiments.api_deletion --preset=tiny --workdir=$(DEMO_WORKDIR)
	echo "report: $(abspath $(DEMO_WORKDIR))/report.html"

setup-sandbox:
	@command -v apt-get >/dev/null || { echo "error: no apt-get here; install the equivalents of: $(SANDBOX_PACKAGES)" >&2; exit 1; }
	missing=
	for program in bwrap newuidmap setfacl; do command -v "$$program" >/dev/null || missing="$$missing $$program"; done
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo); fi
	if [ -n "$$missing" ]; then
	  echo "installing $(SANDBOX_PACKAGES)"
	  $${root[@]+"$${root[@]}"} apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive $${root[@]+"$${root[@]}"} apt-get install -y -qq --no-install-recommends $(SANDBOX_PACKAGES) >/dev/null
	fi
	# Users of the world are numbers that the host lends; root needs none.
	if [ "$$(id -u)" -ne 0 ] && ! { grep -q "^$$(id -un):" /etc/subuid && grep -q "^$$(id -un):" /etc/subgid; } 2>/dev/null; then
	  echo "lending sub-uids to $$(id -un)"
	  sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "$$(id -un)"
	fi

# Where it may (root or sudo without a password, and apt); elsewhere the sandbox's tests say what they miss.
sandbox-if-possible:
	@if command -v apt-get >/dev/null && { [ "$$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then \
	  $(MAKE) --no-print-directory setup-sandbox || echo "the sandbox could not be installed: its tests will say so"; fi

setup-browser:
	@command -v apt-get >/dev/null || { echo "error: no apt-get here; install the equivalents of: $(BROWSER_PACKAGES)" >&2; exit 1; }
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo); fi
	if ! command -v chromium >/dev/null; then
	  echo "installing $(BROWSER_PACKAGES), about 400 MB"
	  $${root[@]+"$${root[@]}"} apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive $${root[@]+"$${root[@]}"} apt-get install -y -qq --no-install-recommends $(BROWSER_PACKAGES) >/dev/null
	fi

# As the sandbox: where it may; elsewhere the reports' tests in a browser say what they miss.
browser-if-possible:
	@if command -v apt-get >/dev/null && { [ "$$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then \
	  $(MAKE) --no-print-directory setup-browser || echo "the browser could not be installed: its tests will say so"; fi

test: sandbox-if-possible browser-if-possible
	@$(WITH_DEV)
	$(BIN)/python -m pytest -m "not soak and not slurm" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15

soak: sandbox-if-possible browser-if-possible
	@$(WITH_DEV)
	code=0; $(BIN)/python -m pytest -m "soak and not slurm" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15 || code=$$?
	if [ $$code -eq 5 ]; then echo "no soak tests were collected"; exit 0; fi
	exit $$code

chaos:
	@$(WITH_DEV)
	$(BIN)/python -m tests.chaos --runs=20

setup-slurm:
	@command -v apt-get >/dev/null || { echo "error: no apt-get here; install the equivalents of: $(SLURM_PACKAGES)" >&2; exit 1; }
	missing=
	for program in munged slurmctld slurmd sbatch; do PATH="$$PATH:/usr/sbin" command -v "$$program" >/dev/null || missing="$$missing $$program"; done
	root=(); if [ "$$(id -u)" -ne 0 ]; then root=(sudo); fi
	if [ -n "$$missing" ]; then
	  echo "installing $(SLURM_PACKAGES)"
	  $${root[@]+"$${root[@]}"} apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive $${root[@]+"$${root[@]}"} apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null
	fi

test-slurm: setup-slurm
	@$(WITH_DEV)
	SUBL_SLURM_REQUIRED=1 $(BIN)/python -m pytest tests/launching/test_slurm.py -m slurm

lint:
	@$(WITH_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	@rm -rf $(VENV)
