#!/usr/bin/env bash
# Packs everything that run.sh needs into a folder of some 20 MB: built binaries, llama.cpp's source, the scripts.
# Usage: pack.sh DIRECTORY      (see README.md one directory up)
set -euo pipefail
pack=$(realpath -m "${1:?usage: pack.sh DIRECTORY}")
cd "$(dirname "$0")/../../.."
version=0.3.36 # of llama-cpp-python, whose source package carries llama.cpp
cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}/llama.cpp-$version"

if [ ! -f "$cache/llama.cpp.tar.xz" ]; then
    echo "downloading llama.cpp, 77 MB, in the source package of llama-cpp-python $version; kept in $cache"
    mkdir -p "$cache"
    python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet scikit-build-core
    (cd "$cache" && venv/bin/pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
        "llama-cpp-python==$version" && tar -xzf "llama_cpp_python-$version.tar.gz")
    # Of the backends the CPU's only, of the tools the benchmark only.
    vendor="$cache/llama_cpp_python-$version/vendor"
    others=$(cd "$vendor" && find llama.cpp/ggml/src -mindepth 1 -maxdepth 1 -type d -name 'ggml-*' ! -name ggml-cpu)
    # shellcheck disable=SC2086 # each word is one directory
    tar -C "$vendor" $(printf -- '--exclude=%s ' $others) -cJf "$cache/llama.cpp.tar.xz.new" \
        llama.cpp/{CMakeLists.txt,LICENSE,licenses,cmake,common,ggml,include,src,vendor,tools/batched-bench}
    mv "$cache/llama.cpp.tar.xz.new" "$cache/llama.cpp.tar.xz"
    rm -rf "$cache/venv" "$cache/llama_cpp_python-$version" "$cache/llama_cpp_python-$version.tar.gz"
fi

echo "building kvasir-server and the benchmark of the kernels, for release: some 5 minutes on 2 cores the first time"
cargo build --release --locked -p kvasir-server --bin kvasir-server
bandwidth=$(cargo bench --locked -p kvasir-kernels --bench cpu --no-run --message-format=json |
    python3 -c 'import json,sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')

mkdir -p "$pack"
cp "$cache/llama.cpp.tar.xz" "$pack/"
strip -o "$pack/kvasir-server" "${CARGO_TARGET_DIR:-target}/release/kvasir-server"
strip -o "$pack/kernels-bench" "$bandwidth"
cp e2e/benchmarks/random_llama.py e2e/benchmarks/cpu_peers/{run.sh,measure.py,random_weights.py,CMakeLists.txt} "$pack/"
git describe --always --dirty >"$pack/revision"
du -sh "$pack"
