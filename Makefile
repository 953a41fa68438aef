# Everything from a fresh clone: each target makes what it needs (.venv, system packages) first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A window for Qt: the person's own display where there is one, else a virtual one.
SCREEN := xvfb-run -a -s "-screen 0 1600x1000x24 +extension GLX"
WINDOW = $(if $(DISPLAY)$(WAYLAND_DISPLAY),,$(SCREEN))

NAME ?= all
# Test files go to two processes: most of a test is one thread's work.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check bench install clean system

install: $(READY)

system:
	@sh tools/system-packages.sh

$(READY): setup.cfg pyproject.toml constraints.txt
	@sh tools/system-packages.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[gui,hdf5,dev]"
	@touch $@

demo: $(READY)
	$(WINDOW) $(BIN)/napari-recon demo $(if $(DISPLAY)$(WAYLAND_DISPLAY),,--screenshot demo.png)

test: $(READY)
	$(SCREEN) $(PYTEST)

test-all: $(READY)
	$(SCREEN) $(PYTEST) -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/npe2 validate napari_recon/napari.yaml
	@cmp napari.yaml napari_recon/napari.yaml

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gui,hdf5,dev,rtk]" || echo "itk-rtk is not to be had here: its rows are left out"
	$(SCREEN) $(BIN)/napari-recon bench $(NAME)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
