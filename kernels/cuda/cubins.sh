#!/bin/sh
# Compiles every kernel for sm_90a into the folder $1 (one cubin a source), about 1 s each, and fails if one spills
# registers at head size 64 or 128; other spills are listed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=$1
nvcc=${NVCC:-$("$here/toolchain.sh")/bin/nvcc}
mkdir -p "$out"
report=$(mktemp)
trap 'rm -f "$report"' EXIT

for source in "$here"/*.cu; do
    "$nvcc" -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -cubin -Xptxas -v \
        -o "$out/$(basename "$source" .cu).cubin" "$source" 2>"$report" || { cat "$report" >&2; exit 1; }
    awk -v source="$(basename "$source")" '
        /Compiling entry function/ { split($0, quoted, "\x27"); kernel = quoted[2] }
        /bytes spill stores/ && $0 !~ / 0 bytes spill stores, 0 bytes spill loads/ {
            print source ": " kernel " spills:" $0
            if (kernel !~ /_(80|96|192|256)$/) failed = 1
        }
        END { exit failed }' "$report" >&2
done
