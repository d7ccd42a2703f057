//! The operator of `LLMDeployment`s: flags, the log, the metrics port, and the controller until SIGTERM.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use clap::Parser;
use futures::FutureExt;
use kvasir_operator::api_server;
use kvasir_operator::controller::{self, Settings};
use kvasir_operator::health::Health;
use kvasir_operator::lease::{self, Candidate};
use kvasir_operator::metrics::Metrics;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Reconciles LLMDeployments into pods that serve, and scales them on their load.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Image of the model servers where an LLMDeployment names none.
    #[arg(long, env = "KVASIR_OPERATOR_DEFAULT_IMAGE")]
    default_image: String,
    /// The only namespace to watch; all of them where absent.
    #[arg(long, env = "KVASIR_OPERATOR_WATCH_NAMESPACE")]
    watch_namespace: Option<String>,
    /// Port of /metrics and /healthz.
    #[arg(long, env = "KVASIR_OPERATOR_METRICS_PORT", default_value_t = 8080)]
    metrics_port: u16,
    /// Name of the Lease whose holder acts, where several operators run; without it this one always acts.
    #[arg(long, env = "KVASIR_OPERATOR_LEASE")]
    lease: Option<String>,
    /// Namespace of the Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "")]
    lease_namespace: String,
    /// This operator's name among the candidates for the Lease: its pod's.
    #[arg(long, env = "POD_NAME", default_value = "")]
    identity: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .json()
        .init();

    let health = Arc::new(Health::default());
    let client = api_server::client(&health)
        .await
        .context("no cluster: run in a pod, or set KUBECONFIG")?;
    let metrics = Arc::new(Metrics::new().context("registering the metrics")?);
    let listener = listen(args.metrics_port)
        .await
        .with_context(|| format!("--metrics-port {}", args.metrics_port))?;
    let mut terminated = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("SIGINT")?;
    let stop = async move {
        tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
        tracing::info!("stopping");
    }
    .shared();

    let routes = routes(Arc::clone(&metrics), Arc::clone(&health));
    let settings = Settings {
        default_image: args.default_image,
        namespace: args.watch_namespace.filter(|n| !n.is_empty()),
    };
    let act = || {
        tracing::info!(
            default_image = settings.default_image,
            namespace = settings.namespace,
            "watching LLMDeployments"
        );
        let (metrics, health) = (Arc::clone(&metrics), Arc::clone(&health));
        let controller = controller::run(
            client.clone(),
            settings.clone(),
            Arc::clone(&metrics),
            Arc::clone(&health),
            stop.clone(),
        );
        async move {
            metrics.leads(true);
            // However it ends: another one tells of the deployments from here on.
            let _ends = AtEnd(move || {
                metrics.leads(false);
                health.ends();
            });
            controller.await;
        }
    };
    let acting = async {
        match args.lease {
            Some(lease) => {
                let candidate = Candidate {
                    lease,
                    namespace: args.lease_namespace,
                    identity: args.identity,
                };
                lease::hold(client.clone(), &candidate, stop.clone(), act).await;
            }
            None => act().await,
        }
    };
    tokio::select! {
        () = acting => Ok(()),
        served = async { axum::serve(listener, routes).await } => served.context("serving /metrics"),
    }
}

/// Every address of both families, or of IPv4 where the kernel has no IPv6.
async fn listen(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        bound => bound,
    }
}

fn routes(metrics: Arc<Metrics>, health: Arc<Health>) -> Router {
    let failed = |said: String| (StatusCode::INTERNAL_SERVER_ERROR, said);
    Router::new()
        .route(
            "/healthz",
            get(move || async move { health.check(health.now()).map(|()| "ok").map_err(failed) }),
        )
        .route(
            "/metrics",
            get(move || async move { metrics.text().map_err(|e| failed(e.to_string())) }),
        )
}

/// Calls `end` when it is dropped.
struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
