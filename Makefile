# make demo   set up .venv, pretrain on the embedded data, evaluate, draw     (minutes, 2 CPU cores)
# make test   set up .venv, run the tests: a quarter of an hour on 2 cores
# make test-slow  the rest, hours on 2 cores: each config trained, stopped and resumed on another
#             mesh; processes that are killed; every form of a foreign model, a source and an
#             export; drills of faults. `make test-slow SLOW=tests/data` runs one folder.
# make bench  the speed of a training step beside others', and of the loop with its input (minutes)
PYTHON ?= python3.11
VENV := .venv
SLOW ?= tests
BIN := $(VENV)/bin
SETUP_SECONDS := $(VENV)/setup_seconds
# Large pages for what the C library allocates: a step on CPU asks for all its memory anew, and
# spends a tenth to a quarter of its time in getting it page by page (glibc 2.35, Linux).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo --output demo --setup-seconds $$(cat $(SETUP_SECONDS))

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(SLOW)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# open_clip takes part where the requirements of the tests are installed.
bench: $(VENV)/.installed
	mkdir -p .cache/bench
	$(BIN)/python -m tools.perf.step --config configs/bench_small.py --apart --peer plain \
		$$($(BIN)/python -c 'import importlib.util as u; print("--peer open_clip" if u.find_spec("open_clip") else "")') \
		--json .cache/bench/step.json
	$(BIN)/python -m tools.perf.loop --json .cache/bench/loop.json

clean:
	rm -rf $(VENV) .cache demo *.egg-info build

$(VENV)/.installed: requirements.txt pyproject.toml
	begin=$$(date +%s) \
	&& $(PYTHON) -m venv $(VENV) \
	&& $(BIN)/pip install -q --disable-pip-version-check -r requirements.txt -e . \
	&& echo $$(( $$(date +%s) - begin )) > $(SETUP_SECONDS)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-test.txt
	touch $@
