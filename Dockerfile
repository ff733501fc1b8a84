# Training on NVIDIA GPUs with Transformer Engine.
#
# This image has never been built. Look at the gate's lines before you trust it:
#
#     docker build -t mesh-megatron .
#     docker run --rm --gpus all mesh-megatron python benchmarks/gpu_gate.py
#     docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v /data:/data mesh-megatron \
#         torchrun --nproc-per-node 8 pretrain_mesh.py --config /data/run.yaml --save /data/runs/first
#
# CUDA 13, for which PyPI's torch is compiled; nvcc and NCCL's headers compile Transformer Engine's extension of torch.
# The image has no cuDNN of its own: torch brings one, and halves of two versions do not fit together.
FROM nvcr.io/nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mesh-megatron
ENV PATH=/opt/mesh-megatron/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Packages before the code: a change of the code compiles nothing again.
COPY requirements requirements
RUN python3 -m venv .venv \
    && pip install -r requirements/runtime.txt -r requirements/dev.txt \
    && python -c 'import torch; assert (torch.version.cuda or "").startswith("13."), f"torch {torch.__version__} is not compiled for CUDA 13: change the FROM line and core_cu13 to its CUDA"'

# One cuDNN, for compiling, linking and loading: torch's.
RUN ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cudnn" /opt/cudnn \
    && test -e /opt/cudnn/include/cudnn.h
ENV CUDNN_PATH=/opt/cudnn \
    CUDNN_HOME=/opt/cudnn \
    CPATH=/opt/cudnn/include \
    LD_LIBRARY_PATH=/opt/cudnn/lib:$LD_LIBRARY_PATH

# The library is a wheel; its extension of torch is compiled here, against the torch above.
ARG MAX_JOBS=4
RUN pip install setuptools wheel ninja cmake pybind11 packaging \
    && MAX_JOBS=$MAX_JOBS NVTE_FRAMEWORK=pytorch \
        pip install --no-build-isolation -r requirements/te.txt

COPY . .
RUN make env
CMD ["bash"]
