#!/usr/bin/env bash
# The test command: formatting, lints, every unit, property and golden test, doc tests, licences, the chart, and the
# cluster tests. Installs or builds what is missing, says so as it goes, and keeps it in the cache directory.
#
# Without root the cluster tests are skipped, loudly; with CI=true that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}"
started=$SECONDS
step() { printf '\n=== %s (%d s so far)\n' "$1" "$((SECONDS - started))"; }

step "formatting"
cargo fmt --all --check

step "lints: clippy with warnings denied (the first build of the dependencies takes about 4 minutes)"
cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

step "the image's binaries in release (about 6 minutes the first time), so that no build disturbs the cluster tests"
cargo build --release --locked --bin kvasir-server --bin kvasir-operator

step "unit, property, golden, cluster and doc tests"
cargo test --workspace --all-features --locked

step "licences, sources and duplicates of the dependencies"
deny_version=0.20.2
deny="$cache/cargo-deny-$deny_version"
if [ ! -x "$deny/bin/cargo-deny" ]; then
    echo "building cargo-deny $deny_version once, about 4 minutes, into $deny"
    cargo install cargo-deny --version "$deny_version" --locked --no-default-features --quiet --root "$deny"
fi
"$deny/bin/cargo-deny" --all-features check bans licenses sources
