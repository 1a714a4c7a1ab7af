# make demo   set up .venv, pretrain on the embedded data, evaluate, draw     (minutes, 2 CPU cores)
# make test   set up .venv, run the tests
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP_SECONDS := $(VENV)/setup_seconds

.PHONY: demo test test-slow lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo --output demo --setup-seconds $$(cat $(SETUP_SECONDS))

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m tools.bench_loop

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
