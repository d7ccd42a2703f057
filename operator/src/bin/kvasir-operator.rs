//! The operator of `LLMDeployment`s: flags, the log, the metrics port, and the controller until SIGTERM.

use std::net::Ipv6Addr;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use clap::Parser;
use kube::Client;
use kvasir_operator::controller::{self, Settings};
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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .json()
        .init();

    let client = Client::try_default()
        .await
        .context("no cluster: run in a pod, or set KUBECONFIG")?;
    let metrics = Arc::new(Metrics::new().context("registering the metrics")?);
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, args.metrics_port))
        .await
        .with_context(|| format!("--metrics-port {}", args.metrics_port))?;
    let mut terminated = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("SIGINT")?;
    let stop = async move {
        tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
        tracing::info!("stopping");
    };

    let exposed = Arc::clone(&metrics);
    let routes = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route(
            "/metrics",
            get(move || async move {
                exposed
                    .text()
                    .map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
            }),
        );
    let settings = Settings {
        default_image: args.default_image,
        namespace: args.watch_namespace.filter(|n| !n.is_empty()),
    };
    tracing::info!(
        default_image = settings.default_image,
        namespace = settings.namespace,
        "watching LLMDeployments"
    );
    tokio::select! {
        () = controller::run(client, settings, metrics, stop) => Ok(()),
        served = async { axum::serve(listener, routes).await } => served.context("serving /metrics"),
    }
}
