#!/usr/bin/env bash
# kvasir-server beside llama.cpp on this CPU, from the folder that pack.sh wrote. It needs cmake, a C++ compiler,
# Python 3, taskset, 5 GB of disk for its work, and neither network nor Rust.
# Usage: run.sh OUT [FLAGS OF measure.py...]
#   OUT     gets table.md, results.json and the logs
#   WORK    llama.cpp's build and the model, kept for the next run (default: a directory below TMPDIR or /tmp)
#   LAYERS  of the model (default: 22, which is 1.1B; 1 is enough to see that everything runs)
set -euo pipefail
pack=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:?usage: run.sh OUT [FLAGS OF measure.py...]}")
shift
work=$(realpath -m "${WORK:-${TMPDIR:-/tmp}/kvasir-cpu-peers}")
layers=${LAYERS:-22}
model="$work/model-$layers"
bench="$work/build/bin/llama-batched-bench"
mkdir -p "$out" "$work"
trap 'echo "failed; the ends of the logs in $out:" >&2; tail -n 15 "$out"/*.log >&2' ERR

if [ ! -f "$model/complete" ]; then
    echo "writing a random Llama of $layers layers, in the background"
    (python3 "$pack/random_weights.py" "$model" --layers "$layers" && touch "$model/complete") >"$out/model.log" 2>&1 &
fi
if [ ! -x "$bench" ]; then
    echo "building llama.cpp for this CPU on $(nproc) cores"
    cp "$pack/CMakeLists.txt" "$work/"
    tar -C "$work" -xf "$pack/llama.cpp.tar.xz"
    cmake -S "$work" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$work/build/bin" \
        -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_TOOLS_INSTALL=OFF \
        >"$out/cmake.log" 2>&1
    cmake --build "$work/build" --parallel "$(nproc)" --target llama-batched-bench >"$out/build.log" 2>&1
fi
wait
[ -f "$model/complete" ]
python3 "$pack/measure.py" --server "$pack/kvasir-server" --bandwidth "$pack/kernels-bench" --llama "$bench" \
    --model "$model" --revision "$(cat "$pack/revision")" --out "$out" "$@"
