# Needs Python 3.11 or 3.12, pip, git and make. The first target that is run sets up .venv; later ones find it there.
#   PYTHON=...        which Python, when the one on the PATH is not the one meant
#   EXTRAS="s3 qlora" what to install besides; with a set-up that is there already: make -B setup EXTRAS=s3
#   PARAMS=...        another file of params/

PARAMS ?= params/quickstart.yaml
CRON ?= 0 3 * * 1
EXTRAS ?=
MINUTES ?= 60

bin := .venv/bin
ready := .venv/.ready

.PHONY: help setup run ui schedule test test-slow test-gpu fuzz lint format lock clean
.DELETE_ON_ERROR:

help:
	@echo "make run        retrain by $(PARAMS), from data to a registered adapter; again: all cached"
	@echo "make ui         MLflow and Prefect in the browser, on this machine only"
	@echo "make schedule   retrain by $(PARAMS) whenever '$(CRON)' says so"
	@echo "make test       what must hold, minutes; test-slow and test-gpu: what takes longer or a GPU"
	@echo "make fuzz       the reader and templating against whatever a fuzzer thinks of, for MINUTES=$(MINUTES)"
	@echo "make lint       style and types; format: put them right"
	@echo "make lock       resolve the dependencies anew (needs uv)"
	@echo "make clean      remove the set-up and caches; .retuner/ and data/ stay"

setup: $(ready)

run: $(ready)
	$(bin)/retuner run $(PARAMS)

ui: $(ready)
	$(bin)/retuner ui

schedule: $(ready)
	$(bin)/retuner schedule $(PARAMS) --cron "$(CRON)"

test: $(ready)
	$(bin)/python -m pytest -n 2 --dist worksteal

test-slow: $(ready)
	$(bin)/python -m pytest -m slow

test-gpu: $(ready)
	$(bin)/python -m pytest -m gpu

fuzz: $(ready)
	$(bin)/python -m fuzz -max_total_time=$$(( $(MINUTES) * 60 ))

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: $(ready)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

lock:
	locks/update

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: a set-up that was cut short is taken up again, never mistaken for a whole one.
# A Python on the PATH may be a shim that finds nothing, or lack venv: each is tried, not only looked for.
pythons := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3 python)
fits := -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null

$(ready): pyproject.toml locks/install $(wildcard locks/*.lock)
	@rm -f $@; \
	for python in $(pythons); do if "$$python" $(fits); then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then \
	    echo "no working Python: $(if $(PYTHON),$(PYTHON) is not one,tried $(pythons))" >&2; \
	    echo "  expected: Python 3.11 or 3.12 with venv (Debian and Ubuntu: apt install python3-venv)" >&2; \
	    echo "  do: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$found" --version): about two minutes, once."; \
	if [ -n "$(PYTHON)" ] || ! $(bin)/python $(fits) || ! $(bin)/python -m pip --version >/dev/null; then \
	    "$$found" -m venv --clear .venv || exit 1; \
	fi; \
	locks/install $(bin)/python $(EXTRAS) && touch $@
