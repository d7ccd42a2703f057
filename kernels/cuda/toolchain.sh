#!/bin/sh
# Installs nvcc, once for each version, and prints where it stands (a CUDA_HOME).
set -eu

exec "$(dirname "$0")/from_pypi.sh" nvcc-13.0.88-2 "nvcc 13.0.88 (105 MB, about 30 s)" \
    nvidia-cuda-nvcc==13.0.88 \
    nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 \
    nvidia-cuda-cuobjdump==13.2.86 \
    nvidia-cuda-nvdisasm==13.2.86
