#!/usr/bin/env bash
# The test command: formatting, lints, every unit, property and golden test, doc tests, licences, the chart, and the
# cluster tests. Installs or builds what is missing, says so as it goes, and keeps it in the cache directory. At its end
# it prints what each step took.
#
# Without root the cluster tests are skipped, loudly; with CI=true that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

cache="${KVASIR_CACHE:-$HOME/.cache/kvasir}"
mkdir -p "$cache"
started=$SECONDS
table=""
current=""

# Ends the step before, and begins the next one.
step() {
    if [ -n "$current" ]; then
        table+=$(printf '%6d s  %s' "$((SECONDS - current_started))" "$current")$'\n'
    fi
    current=$1
    current_started=$SECONDS
    [ -z "$1" ] || printf '\n=== %s (%d s so far)\n' "$1" "$((SECONDS - started))"
}

# What each of cargo's test programs says that it took, from a second on.
each_test_program() {
    awk '/^ +(Running|Doc-tests) / { name = $0; sub(/^ +(Running )?/, "", name); sub(/\([^()]*\/deps\//, "(", name) }
        /^test result: .* finished in / { s = $NF; sub(/s$/, "", s); if (s >= 1) printf "%12d s  %s\n", s, name }' "$tests"
}

programs=""
tests=$(mktemp)
finish() {
    status=$?
    [ "$status" = 0 ] || current="$current: FAILED"
    step ""
    [ -z "$programs" ] || kill "$programs" 2>/dev/null || true
    printf '\n=== what each step took\n%s' "$table"
    each_test_program
    printf '%6d s  in all\n' "$((SECONDS - started))"
    rm -f "$tests"
}
trap finish EXIT

step "formatting"
cargo fmt --all --check

# Through a test, so that its dependencies have the features of all tests and are compiled once.
step "the program that drives the cluster"
cargo test --workspace --all-features --locked --no-run --test cluster

# Go builds beside Rust: each leaves a core idle while it links.
if [ "$(id -u)" = 0 ]; then
    log="$cache/tools.log"
    echo "the cluster's programs are downloaded or built meanwhile; see $log"
    "${CARGO_TARGET_DIR:-target}/debug/kvasir-e2e" tools >"$log" 2>&1 &
    programs=$!
fi

step "lints: clippy with warnings denied"
cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

step "the tests are compiled"
cargo test --workspace --all-features --locked --no-run

step "the image's binaries in release, so that no build disturbs the cluster tests"
cargo build --release --locked --bin kvasir-server --bin kvasir-operator

step "licences, sources and duplicates of the dependencies"
deny_version=0.20.2
deny="$cache/cargo-deny-$deny_version"
if [ ! -x "$deny/bin/cargo-deny" ]; then
    echo "building cargo-deny $deny_version once into $deny, not optimised: it runs for seconds"
    CARGO_PROFILE_DEV_DEBUG=false cargo install cargo-deny --version "$deny_version" --locked --no-default-features \
        --quiet --debug --root "$deny"
fi
"$deny/bin/cargo-deny" --all-features check bans licenses sources

if [ -n "$programs" ]; then
    step "what is left of the cluster's programs"
    wait "$programs" || { cat "$log"; exit 1; }
    programs=""
    grep -E '^(==>|    )' "$log" || true
fi

step "unit, property, golden, cluster and doc tests"
cargo test --workspace --all-features --locked 2>&1 | tee "$tests"
