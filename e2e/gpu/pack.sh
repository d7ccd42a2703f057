#!/usr/bin/env bash
# Packs what a machine with a GPU needs into the folder $1 (under 60 MB): the server with its CUDA device, the test
# binaries, the golden models, the kernels' benchmark, and the scripts. There: python3 run.py RESULTS STAGE ...
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1
mkdir -p "$out/golden"

cargo build --release --locked -p kvasir-server --bin kvasir-server --features cuda
cargo build --release --locked -p kvasir-kernels --features cuda --bench cuda
target="${CARGO_TARGET_DIR:-target}"
cp "$target/release/kvasir-server" "$out/kvasir-server"

# Where cargo put a test's or a benchmark's binary; the tests' are those of the test command.
binary() { # kind, name, flags
    cargo test --locked --no-run --message-format json "${@:3}" "--$1" "$2" |
        python3 -c 'import json, sys
for line in sys.stdin:
    found = json.loads(line)
    if found.get("executable") and found["target"]["name"] == sys.argv[1]: print(found["executable"])' "$2" | tail -n 1
}
cp "$(binary test cuda_shim --workspace --all-features)" "$out/cuda_shim"
for name in golden golden_engine; do
    cp "$(binary test "$name" --workspace --all-features)" "$out/${name/%golden/golden_tests}"
done
cp "$(binary bench cuda --release -p kvasir-kernels --features cuda)" "$out/cuda_bench"
strip "$out"/{kvasir-server,cuda_shim,golden_tests,golden_engine,cuda_bench}

cp -r server/tests/golden/*/ "$out/golden/"
cp e2e/gpu/*.py e2e/benchmarks/*.py "$out/"
du -sh "$out"
