//! Builds what the features need: `cuda` the cubins (nvcc, installed from PyPI where it is missing), `cuda-shim` the
//! same sources as a library for the CPU, once plain and once under the address sanitizer.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=NVCC");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        build_cubins(&source, &out);
    }
    if env::var_os("CARGO_FEATURE_CUDA_SHIM").is_some() {
        build_shim(&source, &out.join("cuda-shim-plain.so"), &[]);
        let sanitized = ["-fsanitize=address", "-fno-omit-frame-pointer"];
        build_shim(&source, &out.join("cuda-shim-sanitized.so"), &sanitized);
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "{command:?}: {status:?}"
    );
}

fn kernels(source: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(source).expect("kernels/cuda is there");
    let mut kernels: Vec<PathBuf> = entries
        .map(|entry| entry.expect("kernels/cuda can be read").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    kernels.sort();
    kernels
}

/// One fatbin a source, and `cubins.rs`, which embeds them and names their entry points and where each is.
fn build_cubins(source: &Path, out: &Path) {
    run(Command::new(source.join("cubins.sh")).arg(out));
    let (mut cubins, mut names) = (String::new(), String::new());
    for (module, kernel) in kernels(source).iter().enumerate() {
        let stem = kernel
            .file_stem()
            .expect("a file has a name")
            .to_string_lossy();
        writeln!(
            cubins,
            "    include_bytes!({:?}),",
            out.join(format!("{stem}.fatbin"))
        )
        .expect("a String takes everything");
        let text = std::fs::read_to_string(kernel).expect("a source can be read");
        for line in text.lines().filter_map(|line| line.strip_prefix("KERNEL(")) {
            let name = line.split(',').next().unwrap_or_default();
            writeln!(names, "    ({name:?}, {module}),").expect("a String takes everything");
        }
    }
    let text = format!(
        "const CUBINS: &[&[u8]] = &[\n{cubins}];\nconst KERNELS: &[(&str, usize)] = &[\n{names}];\n"
    );
    std::fs::write(out.join("cubins.rs"), text).expect("OUT_DIR can be written");
}

/// About 5 s of g++.
fn build_shim(source: &Path, library: &Path, flags: &[&str]) {
    // No fused multiply-add: sampling is exact to the bit.
    let always = "-x c++ -std=c++20 -O2 -g1 -ffp-contract=off -fPIC -shared -Wall -Werror -Wno-unknown-pragmas";
    run(Command::new("g++")
        .args(always.split(' '))
        .args(flags)
        .arg("-DKVASIR_SHIM")
        .arg("-I")
        .arg(source)
        .args(kernels(source))
        .arg(source.join("shim/shim.cpp"))
        .arg("-o")
        .arg(library));
}
