#!/bin/sh
# Installs cuBLAS from PyPI into the cache, once, and prints the path of libcublasLt.so.13, for images: it is all that
# kvasir-server loads besides the driver. Needs python3 with venv; about 420 MB are downloaded.
set -eu

version=13.1.0.3
cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}"
root="$cache/cublas-$version"

if [ ! -e "$root/ready" ]; then
    echo "installing cuBLAS $version into $root (about 420 MB)" >&2
    rm -rf "$root"
    mkdir -p "$root"
    python3 -m venv "$root/venv" >&2
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "nvidia-cublas==$version" >&2
    touch "$root/ready"
fi

set -- "$root"/venv/lib/python3*/site-packages/nvidia/cu13/lib/libcublasLt.so.13
echo "$1"
