//! The CUDA kernels' own source, compiled for the CPU through `cuda/shim` and held against f64 loops at edge shapes, in
//! random thread orders, then the whole device on the same shim against the f64 oracle, and all of it again under the
//! address sanitizer.
//!
//! Proves indexing, barriers, waits and arithmetic. It does not prove speed, memory ordering between threads, or nvcc.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]
#![allow(
    clippy::useless_vec,
    reason = "on a GPU, what a kernel reads must be on the heap: gpu.rs"
)]

mod attention;
mod device;
mod experts;
mod gpu;
#[path = "../layer/model.rs"]
mod layer;
mod rows;
mod sampling;
mod shim;
mod stored;

use std::process::{Command, Output};

/// Runs tests of this binary again, on the library built with the address sanitizer.
fn rerun_sanitized(arguments: &[&str], plant: bool) -> Output {
    let runtime = Command::new("g++")
        .arg("-print-file-name=libasan.so")
        .output()
        .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(arguments)
        .env(
            "LD_PRELOAD",
            String::from_utf8(runtime.stdout).unwrap().trim(),
        )
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("KVASIR_SHIM_SANITIZE", "1");
    if plant {
        command.env("KVASIR_SHIM_PLANT", "1");
    }
    command.output().unwrap()
}

#[test]
fn everything_holds_under_the_address_sanitizer() {
    if shim::sanitized() || gpu::wanted() {
        return;
    }
    let output = rerun_sanitized(&[], false);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_address_sanitizer_sees_an_overrun() {
    if shim::sanitized() {
        if std::env::var_os("KVASIR_SHIM_PLANT").is_some() {
            rows::overrun();
        }
        return;
    }
    if gpu::wanted() {
        return;
    }
    let output = rerun_sanitized(&["--exact", "the_address_sanitizer_sees_an_overrun"], true);
    assert!(!output.status.success());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("heap-buffer-overflow"), "{words}");
}
