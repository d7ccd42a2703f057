#!/usr/bin/env bash
# kvasir-server beside llama.cpp on this CPU; see README.md in this directory. Arguments go to cpu_peers.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=0.3.36
cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}/llama.cpp-$version"
bench="$cache/build/bin/llama-batched-bench"
if [ ! -x "$bench" ]; then
    echo "building llama.cpp from llama-cpp-python $version into $cache (about 8 minutes)"
    mkdir -p "$cache"
    python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet scikit-build-core numpy gguf
    (cd "$cache" && venv/bin/pip download --quiet --no-deps --no-binary :all: --no-build-isolation "llama-cpp-python==$version")
    tar -xzf "$cache/llama_cpp_python-$version.tar.gz" -C "$cache"
    cmake -S "$cache/llama_cpp_python-$version/vendor/llama.cpp" -B "$cache/build" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF >"$cache/cmake.log"
    cmake --build "$cache/build" -j "$(nproc)" --target llama-batched-bench >>"$cache/cmake.log"
fi
[ -f "$cache/model/model.gguf" ] || "$cache/venv/bin/python" e2e/benchmarks/random_llama.py "$cache/model"

cargo build --release --locked -p kvasir-server
bandwidth=$(cargo bench --locked -p kvasir-kernels --bench cpu --no-run --message-format=json |
    python3 -c 'import json,sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')
exec "$cache/venv/bin/python" e2e/benchmarks/cpu_peers.py --server target/release/kvasir-server \
    --bandwidth "$bandwidth" --llama "$bench" --model "$cache/model" "$@"
