#!/bin/sh
# Compiles every kernel into the folder $1, one fatbin a source with machine code for sm_90a and sm_80 and PTX for what
# comes after, about 3 s each, and fails if one spills registers at head size 64 or 128; other spills are listed. The folder
# holds interface.h, which build.rs writes.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=$1
nvcc=${NVCC:-$("$here/toolchain.sh")/bin/nvcc}
mkdir -p "$out"

compile() {
    name=$(basename "$1" .cu)
    report="$out/$name.ptxas"
    "$nvcc" -O3 -std=c++17 -I "$out" -Xptxas -v \
        -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=compute_90 \
        -fatbin -o "$out/$name.fatbin" "$1" 2>"$report" || { cat "$report" >&2; return 1; }
    awk -v source="$name.cu" '
        /Compiling entry function/ { split($0, quoted, "\x27"); kernel = quoted[2] " for " quoted[4] }
        /bytes spill stores/ && $0 !~ / 0 bytes spill stores, 0 bytes spill loads/ {
            print source ": " kernel " spills:" $0
            if (kernel !~ /_(80|96|192|256) for/) failed = 1
        }
        END { exit failed }' "$report" >&2
}

# Two at a time.
running=
for source in "$here"/*.cu; do
    compile "$source" &
    if [ -n "$running" ]; then wait "$running"; fi
    running=$!
done
wait "$running"
