#!/bin/sh
# Installs nvcc from PyPI into the cache, once for each version, and prints where it stands (a CUDA_HOME).
#
# No CUDA installation and no GPU are needed: about 105 MB are downloaded, 30 s. Needs python3 with venv.
set -eu

version=13.0.88
cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}"
root="$cache/nvcc-$version-2"
ready="$root/ready"

if [ ! -e "$ready" ]; then
    echo "installing nvcc $version into $root (105 MB, about 30 s)" >&2
    rm -rf "$root"
    mkdir -p "$root"
    python3 -m venv "$root/venv" >&2
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        "nvidia-cuda-nvcc==13.0.88" \
        "nvidia-nvvm==13.0.88" \
        "nvidia-cuda-crt==13.0.88" \
        "nvidia-cuda-runtime==13.0.96" \
        "nvidia-cuda-cccl==13.0.85" \
        "nvidia-cuda-cuobjdump==13.2.86" \
        "nvidia-cuda-nvdisasm==13.2.86" >&2
    touch "$ready"
fi

set -- "$root"/venv/lib/python3*/site-packages/nvidia/cu13
echo "$1"
