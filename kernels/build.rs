//! Builds what the features need: `cuda` the cubins (nvcc, installed from PyPI where it is missing), `cuda-shim` the
//! same sources as a library for the CPU, once plain and once under the address sanitizer. Both include `interface.h`, which
//! is written here from `src/cuda/interface.rs`.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "src/cuda/interface.rs"]
#[allow(dead_code, unreachable_pub, reason = "the crate uses the rest")]
mod interface;

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-changed=src/cuda/interface.rs");
    println!("cargo:rerun-if-env-changed=NVCC");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let cubins = env::var_os("CARGO_FEATURE_CUDA").is_some();
    let shim = env::var_os("CARGO_FEATURE_CUDA_SHIM").is_some();
    if !cubins && !shim {
        return;
    }
    std::fs::write(out.join("interface.h"), interface::header()).expect("OUT_DIR can be written");
    let entry_points = entry_points(&source);
    let (mut defined, mut declared) = (Vec::from_iter(entry_points.keys()), interface::names());
    declared.sort_unstable();
    defined.sort_unstable();
    assert!(
        defined.iter().copied().eq(declared.iter()),
        "the kernels of kernels/cuda, and those of interface.rs: {defined:?}, {declared:?}"
    );
    if cubins {
        build_cubins(&source, &out, &entry_points);
    }
    if shim {
        build_shim(&source, &out, "cuda-shim-plain.so", &[]);
        let sanitized = ["-fsanitize=address", "-fno-omit-frame-pointer"];
        build_shim(&source, &out, "cuda-shim-sanitized.so", &sanitized);
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

/// Every kernel that is defined, and the place of its source in [`kernels`].
fn entry_points(source: &Path) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for (module, kernel) in kernels(source).iter().enumerate() {
        let text = std::fs::read_to_string(kernel).expect("a source can be read");
        for line in text.lines().filter_map(|line| line.strip_prefix("KERNEL(")) {
            let name = line.split(')').next().unwrap_or_default();
            found.insert(name.to_owned(), module);
        }
    }
    found
}

/// One fatbin a source, and `cubins.rs`, which embeds them and names their entry points and where each is.
fn build_cubins(source: &Path, out: &Path, entry_points: &BTreeMap<String, usize>) {
    run(Command::new(source.join("cubins.sh")).arg(out));
    let (mut cubins, mut names) = (String::new(), String::new());
    for kernel in kernels(source) {
        let stem = kernel
            .file_stem()
            .expect("a file has a name")
            .to_string_lossy();
        writeln!(
            cubins,
            "    include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\")),"
        )
        .expect("a String takes everything");
    }
    for (name, module) in entry_points {
        writeln!(names, "    ({name:?}, {module}),").expect("a String takes everything");
    }
    let text = format!(
        "const CUBINS: &[&[u8]] = &[\n{cubins}];\nconst KERNELS: &[(&str, usize)] = &[\n{names}];\n"
    );
    std::fs::write(out.join("cubins.rs"), text).expect("OUT_DIR can be written");
}

/// About 5 s of g++.
fn build_shim(source: &Path, out: &Path, library: &str, flags: &[&str]) {
    // No fused multiply-add: sampling is exact to the bit.
    let always = "-x c++ -std=c++20 -O2 -g1 -ffp-contract=off -fPIC -shared -Wall -Werror -Wno-unknown-pragmas";
    run(Command::new("g++")
        .args(always.split(' '))
        .args(flags)
        .arg("-DKVASIR_SHIM")
        .arg("-I")
        .arg(source)
        .arg("-I")
        .arg(out)
        .args(kernels(source))
        .arg(source.join("shim/shim.cpp"))
        .arg("-o")
        .arg(out.join(library)));
}
