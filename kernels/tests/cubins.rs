//! The machine code that nvcc made: the instructions that the kernels are written for are in it.
//!
//! Spills fail the build itself (cuda/cubins.sh). Needs no GPU; the disassembler comes with nvcc.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// The disassembly of each function for one architecture.
fn functions(source: &str, architecture: &str) -> BTreeMap<String, String> {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let home = Command::new(cuda.join("toolchain.sh")).output().unwrap();
    let tools = Path::new(String::from_utf8(home.stdout).unwrap().trim()).join("bin");
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let output = Command::new(tools.join("cuobjdump"))
        .args(["-sass", "-arch", architecture])
        .arg(Path::new(env!("OUT_DIR")).join(format!("{source}.fatbin")))
        .env("PATH", path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let parts = text.split("Function : ").skip(1);
    parts
        .map(|part| {
            let (name, code) = part.split_once('\n').unwrap();
            (name.trim().to_owned(), code.to_owned())
        })
        .collect()
}

#[test]
fn the_instructions_meant_are_there() {
    let tensor = "HMMA.16816.F32.BF16";
    let copy = "LDGSTS.E.BYPASS.128";
    let matrices = "LDSM.16.M88.4";
    for (source, wanted) in [
        ("paged_decode", vec![tensor, copy, matrices]),
        ("paged_prefill", vec![tensor, copy, matrices]),
        ("rope_append", vec!["LDG.E.128", "STG.E.128"]),
        ("rms_norm", vec!["LDG.E.128", "STG.E.128"]),
        ("grouped_gemm", vec![tensor, copy, matrices]),
        ("gated_activation", vec!["LDG.E.128", "STG.E.128"]),
        ("combine_experts", vec!["LDG.E.128", "STG.E.128"]),
        ("embed", vec!["LDG.E.128", "STG.E.128"]),
        ("gather_rows", vec!["LDG.E.128", "STG.E.128"]),
        ("copy_blocks", vec!["LDG.E.128", "STG.E.128"]),
    ] {
        for architecture in ["sm_90a", "sm_80"] {
            let functions = functions(source, architecture);
            assert!(!functions.is_empty(), "{source} for {architecture}");
            for (name, code) in functions {
                if name == "combine_split_kv" {
                    continue; // It sums floats in order, a thread each.
                }
                for instruction in &wanted {
                    let why = format!("{name} for {architecture} has no {instruction}");
                    assert!(code.contains(instruction), "{why}");
                }
                // Local memory would be spills, or arrays that are indexed at run time.
                let exact = name.ends_with("_64") || name.ends_with("_128");
                let local = code.contains("LDL") || code.contains("STL");
                assert!(
                    !(exact && local),
                    "{name} for {architecture} uses local memory"
                );
            }
        }
    }
}

#[test]
fn kernels_wait_for_those_before_them() {
    for source in [
        "embed",
        "rms_norm",
        "paged_decode",
        "paged_prefill",
        "route_experts",
        "group_by_expert",
        "grouped_gemm",
        "combine_experts",
        "edit_logits",
        "sample",
    ] {
        for (name, code) in functions(source, "sm_90a") {
            assert!(code.contains("ACQBULK"), "{name} does not wait");
        }
    }
}
