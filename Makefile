# `make` lists the tasks.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)  ## install everything, at the tested versions, into .venv

demo: install  ## the two-stage recipe in miniature, on a GPU or on the CPU, beside a dense run
	@echo "Minutes are those of two idle CPU cores; other work on them slows the stages unequally."
	@echo "After an interruption, 'make demo' goes on where it was; 'make clean' makes it start over."
	@DENSE_STEPS=60 MINUTES="1 1 2" scripts/train_two_stage.sh train_configs/demo.toml outputs/demo

test: install  ## run the test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: install  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove what demo wrote
	rm -rf outputs/demo

.PHONY: help install demo test lint clean
