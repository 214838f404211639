#!/usr/bin/env bash
# `make test-vllm`: real vLLM on a CPU, against the numbers transformers gives: what vold exports, and vold's own engine.
# vLLM has an environment of its own, .venv-vllm, made when it is missing or requirements.txt has changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

pins=tests/vllm/requirements.txt
main=${VENV:-.venv}/bin/python
vllm=.venv-vllm/bin/python

[[ -x $main ]] || make env

if ! cmp --silent "$pins" .venv-vllm/.ready; then
  echo "installing vLLM into .venv-vllm: some minutes, 2.5 GB"
  $main -m venv --clear .venv-vllm
  $vllm -m pip install -qq --disable-pip-version-check --no-deps -r "$pins"
  $vllm -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
  cp "$pins" .venv-vllm/.ready
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

$main tests/vllm/expectations.py "$scratch"

# No compilation (it costs half a minute), no engine process beside the tests, no usage report.
export TORCH_COMPILE_DISABLE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
export VOLD_VLLM_EXPECTATIONS=$scratch/expectations.json PYTHONPATH=$PWD/tests/vllm/shim
# A process for each file: an engine in the process keeps its memory until the process ends, and plain vLLM's clean-up
# destroys every process group, also those of the tests after it.
status=0
for file in tests/vllm/test_*.py tests/train/test_stages_with_vllm.py; do
  echo "$file"
  $vllm -m pytest -m vllm "$file" || status=$?
done
exit "$status"
