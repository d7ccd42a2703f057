#!/bin/sh
# Installs NVIDIA's packages from PyPI into the folder $1 of the cache, once, and prints where their files stand. $2 says
# what they are; the packages follow. Needs python3 with venv; no CUDA installation and no GPU.
set -eu

root="${KVASIR_CACHE:-$HOME/.cache/kvasir}/$1"
what=$2
shift 2

if [ ! -e "$root/ready" ]; then
    echo "installing $what into $root" >&2
    rm -rf "$root"
    mkdir -p "$root"
    python3 -m venv "$root/venv" >&2
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$@" >&2
    touch "$root/ready"
fi

set -- "$root"/venv/lib/python3*/site-packages/nvidia/cu13
echo "$1"
