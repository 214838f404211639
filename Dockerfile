# A GPU node: vLLM's public image, whose torch and CUDA libraries are the ones that constraints-vllm.txt pins, and vold.
#   docker build -t vold .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/checkpoints:/work/checkpoints" \
#       -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" vold \
#       torchrun --nproc-per-node 8 -m vold rl configs/qwen2.5-vl-3b/vold.yaml
# flash-attn is not in it (docs/install.md has its line); attention then runs on torch's own kernels.
FROM vllm/vllm-openai:v0.32.0

ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

WORKDIR /opt/vold
COPY pyproject.toml setup.py constraints-vllm.txt README.md LICENSE ./
COPY vold vold
COPY kernels kernels
RUN python3 -m pip install -c constraints-vllm.txt ".[gpu,loggers,vllm]" && vold --version

WORKDIR /work
COPY configs configs

# The base image starts vLLM's server; `vold serve` does that here.
ENTRYPOINT []
CMD ["vold", "--help"]
