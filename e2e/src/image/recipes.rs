//! What goes into each image: the project's own binaries with the C library they were linked against,
//! CoreDNS, and the pause program that holds a pod's namespaces open.

use super::{Image, ImageFile};
use crate::command::run;
use crate::toolchain::workspace;
use crate::{Error, progress};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The user that the project's processes have: the customary "nonroot", owner of nothing.
const NONROOT: u32 = 65_532;

/// The reference under which the kubelets know the pause image.
pub const PAUSE: &str = "kvasir.dev/pause:1";
/// The reference under which the pods know CoreDNS.
pub const COREDNS: &str = "kvasir.dev/coredns:1";

/// The reference under which the sidecar example knows its client.
pub const ASK: &str = "kvasir.dev/ask:1";

/// The reference of the project's own image.
#[must_use]
pub fn kvasir_reference() -> String {
    format!("kvasir.dev/kvasir:{}", env!("CARGO_PKG_VERSION"))
}

/// The devices that an image's server can serve on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// The CPU.
    Cpu,
    /// The CPU, and NVIDIA GPUs: cuBLASLt is in the image (540 MB), the driver comes from the node.
    CpuAndCuda,
}

/// The server and the operator, built in release, with the shared libraries that they name.
///
/// # Errors
/// When cargo fails, or cuBLAS can't be installed.
pub fn kvasir(devices: Devices) -> Result<Image, Error> {
    let step = progress::begin(
        "Building kvasir-server and kvasir-operator in release (the first time about 6 minutes on 2 cores)",
    );
    let folder = release_binaries(devices)?;
    let programs = [
        stripped(&folder, "kvasir-server")?,
        stripped(&folder, "kvasir-operator")?,
    ];
    let cublas = match devices {
        Devices::Cpu => None,
        Devices::CpuAndCuda => {
            let script = workspace().join("kernels/cuda/cublas.sh");
            Some(PathBuf::from(run(&mut Command::new(script))?.trim()))
        }
    };
    let image = image_of(&programs, cublas.as_deref())?;
    step.done(format_args!("built in {}", folder.display()));
    Ok(image)
}

/// `programs` at the root; where cuBLASLt is there too, also a place for the driver, which the NVIDIA container toolkit
/// mounts from the node as the container starts. The driver names no libraries but those that cuBLASLt does.
///
/// The toolkit takes the folder of the driver's libraries from `debian_version`, and leaves an image without an
/// `ld.so.cache` without one (NVIDIA Container Toolkit, `nvidia-cdi-hook update-ldcache`). Google's device plugin mounts
/// the driver at /usr/local/nvidia instead, and expects the image to look there.
fn image_of(programs: &[PathBuf], cublas: Option<&Path>) -> Result<Image, Error> {
    let mut linked: Vec<_> = programs.iter().map(|path| at_root(path)).collect();
    linked.extend(cublas.map(|from| ImageFile {
        path: "/lib/x86_64-linux-gnu/libcublasLt.so.13".into(),
        from: from.to_owned(),
        mode: 0o755,
    }));
    let mut image = Image {
        reference: kvasir_reference(),
        entrypoint: vec!["/kvasir-server".into()],
        env: Vec::new(),
        user: NONROOT,
        files: with_libraries(linked)?,
    };
    if cublas.is_some() {
        let marks = [
            ("/etc/debian_version", "/etc/debian_version"),
            ("/etc/ld.so.cache", "/dev/null"),
        ];
        image.files.extend(marks.map(|(path, from)| ImageFile {
            path: path.into(),
            from: from.into(),
            mode: 0o644,
        }));
        image.env = vec![
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility".into(),
            "LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/nvidia/lib".into(),
        ];
    }
    Ok(image)
}

/// This crate's own program as a client to put beside a server: `program` is kvasir-e2e.
///
/// # Errors
/// When it cannot be read.
pub fn ask(program: &Path) -> Result<Image, Error> {
    Ok(Image {
        reference: ASK.into(),
        entrypoint: vec!["/kvasir-e2e".into(), "ask".into()],
        env: Vec::new(),
        user: NONROOT,
        files: with_libraries(vec![at_root(program)])?,
    })
}

/// CoreDNS, which must bind port 53 and so has the capability for it from its pod.
#[must_use]
pub fn coredns(folder: &Path) -> Image {
    Image {
        reference: COREDNS.into(),
        entrypoint: vec!["/coredns".into()],
        env: Vec::new(),
        user: 0,
        files: vec![ImageFile {
            path: "/coredns".into(),
            from: folder.join("coredns"),
            mode: 0o755,
        }],
    }
}

/// The pause program, compiled into `scratch`.
///
/// # Errors
/// When the C compiler fails.
pub fn pause(scratch: &Path) -> Result<Image, Error> {
    let source = scratch.join("pause.c");
    let binary = scratch.join("pause");
    fs::write(&source, include_str!("../../cluster/pause.c"))
        .map_err(Error::file("write", &source))?;
    run(Command::new("cc")
        .args(["-Os", "-static", "-o"])
        .arg(&binary)
        .arg(&source))?;
    Ok(Image {
        reference: PAUSE.into(),
        entrypoint: vec!["/pause".into()],
        env: Vec::new(),
        user: NONROOT,
        files: vec![ImageFile {
            path: "/pause".into(),
            from: binary,
            mode: 0o755,
        }],
    })
}

/// A copy of a program in `folder` without its debug information, which goes into `NAME.debug` beside the copy. The copy
/// names that file, and debuggers find it in the folder of the program (GDB's manual, "Debugging Information in Separate
/// Files"). The symbols stay: a backtrace names its functions without that file.
fn stripped(folder: &Path, name: &str) -> Result<PathBuf, Error> {
    let place = folder.join("image");
    // Made beside and moved: another process or thread may read the copy that is there.
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let making = folder.join(format!("image-{}-{n}", std::process::id()));
    fs::create_dir_all(&place).map_err(Error::file("create", &place))?;
    fs::create_dir_all(&making).map_err(Error::file("create", &making))?;
    let debug = format!("{name}.debug");
    let whole = folder.join(name);
    let objcopy = || {
        let mut command = Command::new("objcopy");
        command.current_dir(&making);
        command
    };
    run(objcopy().arg("--only-keep-debug").arg(&whole).arg(&debug))?;
    run(objcopy()
        .arg("--strip-debug")
        .arg(format!("--add-gnu-debuglink={debug}"))
        .arg(&whole)
        .arg(name))?;
    for file in [debug.as_str(), name] {
        let to = place.join(file);
        fs::rename(making.join(file), &to).map_err(Error::file("write", &to))?;
    }
    fs::remove_dir(&making).map_err(Error::file("remove", &making))?;
    Ok(place.join(name))
}

/// Builds kvasir-server and kvasir-operator in release; the folder that they are in.
///
/// # Errors
/// When cargo fails.
pub fn release_binaries(devices: Devices) -> Result<PathBuf, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace()).args([
        "build",
        "--release",
        "--quiet",
        "--bin",
        "kvasir-server",
        "--bin",
        "kvasir-operator",
    ]);
    if devices == Devices::CpuAndCuda {
        command.args(["--features", "kvasir-server/cuda"]);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_of_this_program) {
            command.env_remove(name);
        }
    }
    run(&mut command)?;
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    Ok(target.join("release"))
}

/// Set by cargo for the program or test that this code is in (the Cargo book, "Environment variables"). A build
/// script that looks at one of them, as ring's does, would see it changed by each build that is run from here,
/// and again by the next that is not: both would build what depends on it anew.
fn is_of_this_program(variable: &str) -> bool {
    let prefixes = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"];
    let names = ["CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"];
    names.contains(&variable) || prefixes.iter().any(|p| variable.starts_with(p))
}

/// A program at the root of the image.
fn at_root(program: &Path) -> ImageFile {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    ImageFile {
        path: format!("/{name}"),
        from: program.to_owned(),
        mode: 0o755,
    }
}

/// `files`, and the shared libraries that they name where they name them.
fn with_libraries(mut files: Vec<ImageFile>) -> Result<Vec<ImageFile>, Error> {
    let mut libraries = BTreeSet::new();
    for file in &files {
        libraries.extend(shared_libraries(&run(Command::new("ldd").arg(&file.from))?));
    }
    files.extend(libraries.into_iter().map(|path| {
        let from = PathBuf::from(&path);
        ImageFile {
            path,
            from,
            mode: 0o755,
        }
    }));
    Ok(files)
}

/// The absolute paths in what ldd prints.
fn shared_libraries(ldd: &str) -> Vec<String> {
    ldd.split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_sees_the_users_settings_and_nothing_of_this_program() {
        for (variable, ours) in [
            ("CARGO_PKG_VERSION_MAJOR", true),
            ("CARGO_MANIFEST_DIR", true),
            ("CARGO_BIN_EXE_kvasir-e2e", true),
            ("CARGO_HOME", false),
            ("CARGO_TARGET_DIR", false),
            ("RUSTFLAGS", false),
        ] {
            assert_eq!(is_of_this_program(variable), ours, "{variable}");
        }
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        let printed = "\tlinux-vdso.so.1 (0x7ffd)\n\
            \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x7f1)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f2)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f3)\n";
        assert_eq!(
            shared_libraries(printed),
            [
                "/lib/x86_64-linux-gnu/libgcc_s.so.1",
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
    }

    #[test]
    fn an_image_for_gpus_has_each_library_that_cublas_names_once() {
        // Any program that names the C library stands in for cuBLAS, which is 540 MB.
        let stand_in = std::env::current_exe().expect("this program");
        let program = at_root(&stand_in).path;
        let image = image_of(std::slice::from_ref(&stand_in), Some(&stand_in)).expect("made");
        let named = run(Command::new("ldd").arg(&stand_in)).expect("ldd");
        let mut wanted: BTreeSet<_> = shared_libraries(&named).into_iter().collect();
        assert!(wanted.iter().any(|path| path.ends_with("/libc.so.6")));
        wanted.extend(
            [
                program.as_str(),
                "/lib/x86_64-linux-gnu/libcublasLt.so.13",
                "/etc/debian_version",
                "/etc/ld.so.cache",
            ]
            .map(str::to_owned),
        );
        let mut found: Vec<_> = image.files.into_iter().map(|file| file.path).collect();
        found.sort();
        assert_eq!(found, Vec::from_iter(wanted));
    }

    #[test]
    fn an_image_has_the_same_bytes_each_time() {
        let scratch = std::env::temp_dir().join(format!("kvasir-image-{}", std::process::id()));
        fs::create_dir_all(&scratch).expect("a scratch folder");
        let content = scratch.join("content");
        fs::write(&content, "hello").expect("a file");
        let image = Image {
            reference: "kvasir.dev/test:1".into(),
            entrypoint: vec!["/a/b".into()],
            env: Vec::new(),
            user: NONROOT,
            files: vec![ImageFile {
                path: "/a/b".into(),
                from: content,
                mode: 0o755,
            }],
        };
        let [first, second] = ["first", "second"].map(|name| {
            let archive = scratch.join(name);
            image.write(&archive).expect("an archive");
            fs::read(archive).expect("its bytes")
        });
        fs::remove_dir_all(&scratch).expect("scratch removed");
        assert_eq!(first, second);
        assert!(String::from_utf8_lossy(&first).contains("io.containerd.image.name"));
    }
}
