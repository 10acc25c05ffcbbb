# `make demo` and `make test` set up everything themselves: a virtual environment with pinned versions.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu install clean

demo: $(INSTALLED)
	$(BIN)/xcomp compare demo
	$(BIN)/xcomp compare demo_choose

test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Contracts, parity and all pairs of plugins on CUDA; the reference vectors of parity are looked for in XCOMP_GOLDEN.
test-gpu: $(INSTALLED)
	@found=$$($(BIN)/python -c "import torch; print(torch.cuda.is_available())") || exit 1; \
	if [ $$found = False ]; then echo "skipped: no CUDA device here"; exit 0; fi; \
	for dtype in float32 bfloat16; do \
	  $(BIN)/python -m pytest -m device --device cuda --dtype $$dtype || exit 1; \
	done

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist
