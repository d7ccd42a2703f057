//! Builds the shim's library with g++ once a process, and launches kernels in it by name.

use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Whether this process runs under the address sanitizer.
pub(crate) fn sanitized() -> bool {
    std::env::var_os("KVASIR_SHIM_SANITIZE").is_some()
}

/// The shape of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    /// Orders the threads.
    pub(crate) seed: u64,
}

/// Runs the kernel `name` to its end.
///
/// # Safety
/// `Args` mirrors the kernel's struct of arguments; its pointers are valid for what the kernel does with them.
pub(crate) unsafe fn launch<Args>(name: &str, launch: Launch, args: &Args) {
    if crate::gpu::wanted() {
        // SAFETY: the caller's promise.
        return unsafe { crate::gpu::launch(name, launch, std::ptr::from_ref(args).cast()) };
    }
    type Run = unsafe extern "C" fn(*mut c_void, *const u32, u32, u32, *const c_void, u64);
    // SAFETY: `kvasir_shim_launch` has this signature (shim.cpp), and `<name>_args_bytes` is a u32 (shim.h).
    unsafe {
        let run: Run = std::mem::transmute::<*mut c_void, Run>(symbol("kvasir_shim_launch"));
        let bytes = *symbol(&format!("{name}_args_bytes")).cast::<u32>();
        assert_eq!(bytes as usize, size_of::<Args>(), "the arguments of {name}");
        let args = std::ptr::from_ref(args).cast();
        run(
            symbol(name),
            launch.grid.as_ptr(),
            launch.threads,
            launch.shared_bytes,
            args,
            launch.seed,
        );
    }
}

fn symbol(name: &str) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        let path = CString::new(build().into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a path to a library that has no constructors with side effects.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{}", last_error());
        handle as usize
    });
    let name = CString::new(name).unwrap();
    // SAFETY: the handle came from dlopen and is never closed.
    let found = unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) };
    assert!(!found.is_null(), "{}", last_error());
    found
}

fn last_error() -> String {
    // SAFETY: called right after a failure, so dlerror returns a string that lives until the next call.
    unsafe { CStr::from_ptr(libc::dlerror()) }
        .to_string_lossy()
        .into_owned()
}

/// The library of all kernels: about 5 s of g++.
fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let kind = if sanitized() { "sanitized" } else { "plain" };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("cuda-shim-{kind}.so"));
    let unfinished = folder.join(format!("cuda-shim-{kind}-{}.so", std::process::id()));
    let mut kernels: Vec<PathBuf> = std::fs::read_dir(&source)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    kernels.sort();
    let mut command = Command::new("g++");
    // No fused multiply-add: sampling is exact to the bit.
    command.args("-x c++ -std=c++20 -O2 -g1 -ffp-contract=off -fPIC -shared -Wall -Werror -Wno-unknown-pragmas".split(' '));
    if sanitized() {
        command.args(["-fsanitize=address", "-fno-omit-frame-pointer"]);
    }
    command
        .arg("-DKVASIR_SHIM")
        .arg("-I")
        .arg(&source)
        .args(&kernels)
        .arg(source.join("shim/shim.cpp"));
    // Without the sanitizer's library among the parent's preloads: it would check g++ itself.
    let output = command
        .arg("-o")
        .arg(&unfinished)
        .env_remove("LD_PRELOAD")
        .output()
        .expect("g++ is installed");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&unfinished, &library).unwrap();
    library
}

/// Repeatable noise: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Bits of `n` bfloat16 in [-1, 1].
    pub(crate) fn bf16s(&mut self, n: usize) -> Vec<u16> {
        (0..n).map(|_| bf16(self.unit())).collect()
    }

    /// A permutation of `0..n`.
    pub(crate) fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut out: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            out.swap(i, (self.word() % (i as u64 + 1)) as usize);
        }
        out
    }
}

/// The nearest bfloat16's bits.
pub(crate) fn bf16(x: f32) -> u16 {
    half::bf16::from_f32(x).to_bits()
}

/// A bfloat16's value.
pub(crate) fn value(bits: u16) -> f64 {
    half::bf16::from_bits(bits).to_f64()
}

/// Asserts that each result is as near as `tolerance(i, want)` says; NaN never is.
pub(crate) fn assert_near(why: &str, got: &[u16], want: &[f64], tolerance: impl Fn(f64) -> f64) {
    assert_eq!(got.len(), want.len(), "{why}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (value(got) - want).abs();
        assert!(
            error <= tolerance(want),
            "{why}: element {i} is {}, want {want}",
            value(got)
        );
    }
}
