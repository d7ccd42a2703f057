#!/bin/sh
# Installs cuBLAS, once, and prints the path of libcublasLt.so.13, for images: it is all that kvasir-server loads besides
# the driver.
set -eu

version=13.1.0.3
packages=$("$(dirname "$0")/from_pypi.sh" "cublas-$version" "cuBLAS $version (about 420 MB)" "nvidia-cublas==$version")
echo "$packages/lib/libcublasLt.so.13"
