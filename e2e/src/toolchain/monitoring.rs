//! Prometheus, and the operator that configures it from PodMonitors: what the chart's monitoring is tested with.
//! Nothing of it is installed: Debian's package is unpacked into the cache, the operator built into it.

use super::{Program, build, cache, ensure_go, locked, workspace};
use crate::command::run;
use crate::{Error, progress};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// The release of the Prometheus operator.
const OPERATOR: &str = "v0.85.0";
/// Its Go module, whose sources hold the CRDs beside the program.
const MODULE: &str = "github.com/prometheus-operator/prometheus-operator";

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Monitoring {
    /// A folder with prometheus and promtool.
    pub prometheus: PathBuf,
    /// The Prometheus operator.
    pub operator: PathBuf,
    /// A folder with its CRDs, as YAML.
    pub crds: PathBuf,
}

impl Monitoring {
    /// Finds each program, or downloads or builds it and says so.
    ///
    /// # Errors
    /// When the package cannot be had or the build fails.
    pub fn ensure() -> Result<Self, Error> {
        let operator = build(&Program {
            name: "prometheus-operator",
            version: OPERATOR,
            package: "github.com/prometheus-operator/prometheus-operator/cmd/operator",
            ldflags: &[],
            names: &["operator"],
            takes: "about 3 minutes on 2 cores",
        })?;
        Ok(Self {
            prometheus: prometheus()?.join("usr/bin"),
            operator: operator.join("operator"),
            crds: crds()?,
        })
    }
}

/// Debian's package, unpacked.
fn prometheus() -> Result<PathBuf, Error> {
    let place = cache().join("prometheus-of-debian");
    locked(&place, |unpacking| {
        let step = progress::begin(format_args!(
            "Downloading Debian's package prometheus (once, seconds; unpacked in {})",
            place.display()
        ));
        fs::create_dir_all(unpacking).map_err(Error::file("create", unpacking))?;
        let apt = |args: &[&str]| run(Command::new("apt-get").args(args).current_dir(unpacking));
        apt(&["update", "-qq"])?;
        apt(&["download", "-qq", "prometheus"])?;
        run(Command::new("sh")
            .args(["-c", "dpkg -x prometheus_*.deb . && rm prometheus_*.deb"])
            .current_dir(unpacking))?;
        step.done("unpacked");
        Ok::<(), Error>(())
    })?;
    Ok(place)
}

/// The CRDs in the module's sources, which go downloads where they are not there any more.
fn crds() -> Result<PathBuf, Error> {
    let source = workspace().join("e2e/cluster/go/prometheus-operator");
    let said = run(Command::new(ensure_go()?)
        .current_dir(source)
        .args(["mod", "download", "-json", MODULE]))?;
    let said: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
    let folder = said["Dir"].as_str().ok_or_else(|| {
        Error::Refused(format!(
            "go mod download names no folder of {MODULE}: {said}"
        ))
    })?;
    Ok(PathBuf::from(folder).join("example/prometheus-operator-crd"))
}
