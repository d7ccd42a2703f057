//! End-to-end tests on a real cluster, which all of them share and which goes away with this process,
//! however it ends. Without root they are skipped, and say so; with `CI=true` that is a failure.

mod chart;
mod endpoint_drain;
mod existing;
mod foundation;
mod gpu;
mod hub;
mod image;
mod lifecycle;
mod monitoring;
mod operators;
mod reasons;
mod refusals;
mod removal;
mod replacing;
mod scaling;
mod serving;
mod sidecar;
mod test_namespace;
mod volume;

use kvasir_e2e::cluster::{AS_ROOT, Cluster, is_root};
use kvasir_e2e::image::{Image, recipes};
use kvasir_e2e::toolchain::Toolchain;
use kvasir_e2e::{Error, progress, quickstart};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The cluster, started by the first test that asks; `None` where there is no root.
fn cluster() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    CLUSTER
        .get_or_init(|| {
            if is_root() {
                return Some(start().expect("the cluster starts"));
            }
            assert!(
                std::env::var_os("CI").is_none(),
                "CI must run the cluster tests, and they need root"
            );
            progress::say(format_args!(
                "SKIPPED: the cluster tests need root; run the same command with {AS_ROOT} before it"
            ));
            None
        })
        .as_ref()
}

/// The project's image, built by the first test that asks.
fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| recipes::kvasir(recipes::Devices::Cpu).expect("the image is built"))
}

/// The cluster with the project's image on its nodes.
fn with_image() -> Option<&'static Cluster> {
    static IMPORTED: OnceLock<()> = OnceLock::new();
    let cluster = cluster()?;
    IMPORTED.get_or_init(|| {
        let image = image();
        cluster.import(image).expect("the nodes take it");
        let next = Image {
            reference: next_reference(),
            ..image.clone()
        };
        cluster
            .import(&next)
            .expect("the nodes take it by its next name too");
    });
    Some(cluster)
}

/// The cluster with the operator on it.
fn kvasir() -> Option<&'static Cluster> {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    let cluster = with_image()?;
    INSTALLED.get_or_init(|| {
        let _alone = release();
        let reference = recipes::kvasir_reference();
        quickstart::install(&cluster.access(), &reference).expect("the operator is installed");
    });
    Some(cluster)
}

/// The right to change the chart's release, which helm lets only one change at a time.
fn release() -> MutexGuard<'static, ()> {
    static RELEASE: Mutex<()> = Mutex::new(());
    // A test that failed while it held the right has changed nothing that the next one relies on.
    RELEASE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A second reference of the same image, to upgrade to.
fn next_reference() -> String {
    format!("{}-next", recipes::kvasir_reference())
}

fn start() -> Result<Cluster, Error> {
    let name = format!("test-{}", std::process::id()).parse()?;
    let tools = Toolchain::ensure()?;
    let program = Path::new(env!("CARGO_BIN_EXE_kvasir-e2e"));
    Cluster::remove_with_this_process(&name, program)?;
    Cluster::start(&name, 2, tools)
}
