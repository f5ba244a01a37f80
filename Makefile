# make install: the environment `.venv` alone
# make demo [DATA=folder] [OUT=folder]: the whole chain, from images to an INT8 model and its report, and what the shipped weights find in photographs; again, it goes on where it was stopped
# make test: the whole test: notebooks and package agree, every notebook runs (make notebooks), whole-system tests (make system, make cluster)
# make kills [KILLS=50]: runs that are killed at random moments end as others; make mutations: do the tests notice when the product is wrong?
# make docs: the book as a site, in _docs; make readme: README.md from nbs/index.ipynb
# make clean: remove the environment, and no run
PYTHON ?= python3.11
BIN := .venv/bin
DATA ?= digits
OUT ?= runs/demo-$(notdir $(patsubst %/,%,$(DATA:/data.yaml=)))
# small images and little augmentation: legible digits within minutes on two cores
DEMO := $(addprefix -p ,input_size=128x160 epochs=16 batch_size=8 mosaic=0 scale=0.2 hue=0 saturation=0.3 value=0.3 flip=0)
# a person, a cat and a motorbike, which come with scikit-image: the shipped weights find them
PHOTOGRAPHS := from importlib.resources import files; print(*(files('skimage')/'data'/f'{name}.png' for name in ('astronaut', 'chelsea', 'motorcycle_left')))

.PHONY: install demo test notebooks system cluster kills mutations packages missing check-export readme docs clean
install: .venv/installed

demo: .venv/installed
	$(BIN)/yolov9001 run --data "$(DATA)" --out "$(OUT)" --resume $(if $(subst digits,,$(DATA)),,$(DEMO))
	$(BIN)/yolov9001 detect $$($(BIN)/python -c "$(PHOTOGRAPHS)") --out "$(OUT)/photographs"

test: .venv/installed .venv/compare terraform/.venv/installed check-export
	$(MAKE) --jobs=2 notebooks system cluster
	@$(MAKE) --silent missing

# two at a time, one thread each: most of them compute on one core and wait for the disk or each other
notebooks: .venv/installed
	cd nbs && OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" ../$(BIN)/nbdev_test --n_workers 1 --timing

CLUSTER := $(wildcard tests/test_cluster.py tests/test_terraform_*.py)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=10
system: .venv/installed
	$(PYTEST) $(addprefix --ignore=,$(CLUSTER)) tests

cluster: .venv/installed
	$(PYTEST) $(CLUSTER)

KILLS ?= 50
kills: .venv/installed
	$(BIN)/python tests/kill_loop.py --kills $(KILLS)

mutations: .venv/installed
	$(BIN)/python tests/mutations.py

# command=package: programs that tests of the cluster's scripts run, which pip does not have
PROGRAMS := aria2c=aria2 cloud-init=cloud-init curl=curl ip=iproute2 nginx=nginx ssh=openssh-client sshd=openssh-server screen=screen shellcheck=shellcheck unzip=unzip
packages:
	@echo $(foreach pair,$(PROGRAMS),$(lastword $(subst =, ,$(pair))))

missing:
	@for pair in $(PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v "$${pair%=*}" >/dev/null || without="$$without $${pair#*=}"; done; \
	[ -z "$$without" ] || echo "some tests were skipped; to run them too, as root: apt-get install -y --no-install-recommends$$without"

check-export: .venv/installed
	$(BIN)/python tests/check_export.py
	$(BIN)/python tests/readme.py --check

# README.md from nbs/index.ipynb, whose cells run first: after a change of either, or of the results that it shows
readme: .venv/installed
	$(BIN)/python tests/readme.py
	$(BIN)/nbdev_clean --fname nbs/index.ipynb

# the site, built from the stored outputs of the notebooks, read offline: a warning is an error, for instance a notebook that docs/toc.yml lacks
docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d _docs/doctrees -c docs . _docs/html
	@echo "site: $(CURDIR)/_docs/html/index.html"

.venv/docs: settings.ini .venv/installed
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

# rknn-toolkit2 declares old torch and opencv, works with current ones, and was tried on x86-64 Linux only: it comes without its pins
.venv/installed: settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/pip install -q --no-deps rknn-toolkit2==2.5.0; fi
	touch $@

# the peers of a comparison
.venv/compare: settings.ini .venv/installed
	$(BIN)/pip install -q -e '.[compare]'
	touch $@

# what terraform/ is tested with, in an environment of its own: it has other versions of much
terraform/.venv/installed: terraform/requirements.txt
	$(PYTHON) -m venv terraform/.venv
	terraform/.venv/bin/pip install -q -r terraform/requirements.txt
	touch $@

clean:
	rm -rf .venv terraform/.venv build _docs docs/api *.egg-info
