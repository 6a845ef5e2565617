# make demo   merge the miniature's LoRAs, draw, judge, and write a report
# make test   lint, then every test that needs no webui
# make test-ui   the tab as a page of its own, by both versions of gradio; in Chromium if there is one
# All set up .venv first; git, make, Python 3.10+ and pip are all they need.

PYTHON ?= python3
# Pinned, and installed alone and first: whatever is installed later finds a torch that fits and pulls no other build
# (the newest one brings several GB of CUDA). Where the package index has no CPU build of it, name PyTorch's CPU index:
#   make demo TORCH="torch==2.13.0 --index-url …"   (the address is on pytorch.org under Get Started, Linux, Pip, CPU)
TORCH ?= torch==2.13.0
PLAYWRIGHT ?= playwright==1.65.2
RUN = .venv/bin/python -m
QUIET = --quiet --disable-pip-version-check

.PHONY: demo test test-ui test-webui clean

demo: .venv/ready
	$(RUN) loraclr demo

test: .venv/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pytest --ignore=tests/webui

# Chromium: the one in CHROMIUM, else Debian's. Without it the tests in a browser are skipped, and say so.
test-ui: .venv/ready .venv/gradio-3.41/ready .venv/gradio-4.40/ready
	@if [ -x "$${CHROMIUM:-/usr/bin/chromium}" ]; then $(RUN) pip install $(QUIET) $(PLAYWRIGHT); fi
	$(RUN) pytest -rs tests/webui/alone

# A folder that comes before the packages of .venv: torch and the like are there once.
.venv/gradio-%/ready: tests/webui/alone/gradio-%.txt .venv/ready
	rm -rf $(@D)
	$(RUN) pip install $(QUIET) --no-deps --target $(@D) -r $<
	touch $@

# Needs a stable-diffusion-webui checkout in WEBUI_DIR, the python it runs with in WEBUI_PYTHON, and Chromium.
test-webui: .venv/ready
	@test -n "$(WEBUI_DIR)" || { echo "Set WEBUI_DIR to a stable-diffusion-webui checkout (see CONTRIBUTING.md)."; exit 2; }
	$(RUN) pip install $(QUIET) $(PLAYWRIGHT)
	$(RUN) pytest tests/webui --ignore=tests/webui/alone

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install $(QUIET) $(TORCH)
	$(RUN) pip install $(QUIET) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
