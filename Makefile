# make install: the environment `.venv` alone
# make demo [DATA=folder] [OUT=folder]: the whole chain, from images to an INT8 model and its report; again, it goes on where it was stopped
# make test: notebooks and package agree, every notebook runs (make notebooks), whole-system tests (make system, make cluster)
# make clean: remove the environment, and no run
PYTHON ?= python3.11
BIN := .venv/bin
DATA ?= digits
OUT ?= runs/demo-$(notdir $(patsubst %/,%,$(DATA:/data.yaml=)))
# small images and little augmentation: legible digits within minutes on two cores
DEMO := $(addprefix -p ,input_size=128x160 epochs=20 batch_size=8 lr=0.005 mosaic=0 scale=0.2 hue=0 saturation=0.3 value=0.3 flip=0)

.PHONY: install demo test notebooks system cluster check-export clean
install: .venv/installed

demo: .venv/installed
	$(BIN)/yolov9001 run --data "$(DATA)" --out "$(OUT)" --resume $(if $(subst digits,,$(DATA)),,$(DEMO))

test: .venv/installed check-export
	$(MAKE) --jobs=2 notebooks system cluster

# two at a time, one thread each: most of them compute on one core and wait for the disk or each other
notebooks: .venv/installed
	cd nbs && OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/nbdev_test --n_workers 1 --timing

CLUSTER := $(wildcard tests/test_cluster.py tests/test_terraform_*.py)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=10
system: .venv/installed
	$(PYTEST) $(addprefix --ignore=,$(CLUSTER)) tests

cluster: .venv/installed
	$(PYTEST) $(CLUSTER)

check-export: .venv/installed
	$(BIN)/python tests/check_export.py

# rknn-toolkit2 declares old torch and opencv, works with current ones, and was tried on x86-64 Linux only: it comes without its pins
.venv/installed: settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/pip install -q --no-deps rknn-toolkit2==2.5.0; fi
	touch $@

clean:
	rm -rf .venv build *.egg-info
