//! The model server of each pod: reads its flags, listens, loads the model, serves, drains.
//!
//! Exit codes: 0 after a drain, 1 where the server failed, 2 where the user can mend it; one sentence says what.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kvasir_server::args::{Args, ArgsError, LogFormat, ModelSource};
use kvasir_server::engine::EngineError;
use kvasir_server::http::serve::{self, PortLimits};
use kvasir_server::http::{self, App, Phase, Routes};
use kvasir_server::metrics::Metrics;
use kvasir_server::startup::{self, StartError, Started, Summary};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

/// The user can mend it.
const MISTAKE: u8 = 2;
const FAILED: u8 = 1;

/// The kubelet, the operator and scrapes need a few.
const MAX_MANAGEMENT_CONNECTIONS: usize = 64;

fn main() -> std::process::ExitCode {
    let args = match Args::parse_from(std::env::args_os()) {
        Ok(args) => args,
        Err(ArgsError::Usage(error)) => error.exit(),
        Err(ArgsError::Mistakes(mistakes)) => {
            for mistake in mistakes {
                eprintln!("kvasir-server: {mistake}");
            }
            return MISTAKE.into();
        }
    };
    start_log(args.log_format);
    // Little happens on the async threads; the cores are the engine's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(error) => Err((
            FAILED,
            format!("the async runtime could not be started: {error}"),
        )),
    };
    match result {
        Ok(()) => 0.into(),
        Err((code, message)) => {
            eprintln!("kvasir-server: {message}");
            code.into()
        }
    }
}

type Failure = (u8, String);

async fn run(args: Args) -> Result<(), Failure> {
    let address = SocketAddr::new(args.host, args.port);
    let (listener, address) = listen("port", address)?;
    let management = args
        .management_port
        .map(|port| listen("management-port", SocketAddr::new(args.host, port)))
        .transpose()?;
    let listener =
        TcpListener::from_std(listener).map_err(|error| (FAILED, format!("--port: {error}")))?;
    let metrics = Metrics::new(&args.served_model_name)
        .map(Arc::new)
        .map_err(|error| (MISTAKE, format!("--served-model-name: {error}")))?;
    let app = App::new(Arc::clone(&metrics), args.limits);
    follow_signals(Arc::clone(&app), args.drain_accept)?;
    let routes = match management {
        Some(_) => Routes::Api,
        None => Routes::All,
    };
    let limits = PortLimits {
        max_connections: args.limits.max_connections,
        read_timeout: args.limits.read_timeout,
    };
    let router = http::router(Arc::clone(&app), routes);
    let server = serve::serve(listener, router, limits, app.phase(), args.drain);
    let server = tokio::spawn(server);
    let management_address = management.as_ref().map(|(_, address)| *address);
    if let Some((listener, _)) = management {
        serve_management(listener, Arc::clone(&app)).map_err(|error| {
            (
                FAILED,
                format!("the management port can't be served: {error}"),
            )
        })?;
    }

    let (loaded, engine_ended) = (load(args.clone(), metrics), oneshot::channel());
    let Started {
        serving,
        engine,
        summary,
    } = loaded.await?;
    let handle = engine.handle();
    app.ready(serving);
    // Whoever started the server may not care to read on.
    let _ = writeln!(
        std::io::stdout(),
        "{}",
        announcement(&args, address, management_address, &summary)
    );
    let (ended, engine_ended) = engine_ended;
    std::thread::spawn(move || {
        let _ = ended.send(engine.join());
    });

    tokio::select! {
        cut = server => {
            let cut = cut.unwrap_or(0);
            if cut > 0 {
                tracing::warn!(connections = cut, "the drain's time is over, connections were cut");
            }
            handle.stop();
            tracing::info!("drained");
            Ok(())
        }
        result = engine_ended => {
            let why = match result {
                Ok(Err(error)) => describe(&error),
                Ok(Ok(())) | Err(_) => "the engine ended".to_owned(),
            };
            Err((FAILED, why))
        }
    }
}

/// Listens at `address`, for the flag of that name; says where, because port 0 is the system's choice.
fn listen(flag: &str, address: SocketAddr) -> Result<(std::net::TcpListener, SocketAddr), Failure> {
    let failed = |error| {
        (
            MISTAKE,
            format!(
                "--{flag}: {address} can't be listened on ({error}); stop what listens there or choose another --{flag}"
            ),
        )
    };
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Serves the management port until the process ends, on a thread of its own: however busy the API's threads are,
/// probes are answered, through the whole drain.
fn serve_management(listener: std::net::TcpListener, app: Arc<App>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let serve = async move {
        let listener = TcpListener::from_std(listener)?;
        let limits = PortLimits {
            max_connections: MAX_MANAGEMENT_CONNECTIONS,
            read_timeout: app.limits().read_timeout,
        };
        let (_never_closing, phase) = watch::channel(Phase::Loading);
        let router = http::router(app, Routes::Management);
        serve::serve(listener, router, limits, phase, Duration::ZERO).await;
        Ok::<_, std::io::Error>(())
    };
    std::thread::Builder::new()
        .name("management".to_owned())
        .spawn(move || runtime.block_on(serve))?;
    Ok(())
}

/// An error with its causes, in one sentence.
fn describe(error: &EngineError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |all, cause| format!("{all}: {cause}"))
}

/// Loads on a thread of its own, with a progress bar where somebody watches.
async fn load(args: Args, metrics: Arc<Metrics>) -> Result<Started, Failure> {
    let (done, loaded) = oneshot::channel();
    let spawned = std::thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || {
            let bar = progress_bar(&args);
            let result = startup::start(&args, &metrics, |progress| {
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.done_bytes);
            });
            bar.finish_and_clear();
            let _ = done.send(result);
        });
    spawned.map_err(|error| (FAILED, format!("a thread could not be started: {error}")))?;
    match loaded.await {
        Ok(Ok(started)) => Ok(started),
        Ok(Err(error @ (StartError::Engine(_) | StartError::Thread(_)))) => {
            Err((FAILED, error.to_string()))
        }
        Ok(Err(error)) => Err((MISTAKE, error.to_string())),
        Err(_) => Err((FAILED, "loading the model ended in a panic".to_owned())),
    }
}

fn progress_bar(args: &Args) -> ProgressBar {
    let name = match &args.model {
        ModelSource::Demo => "the demo model".to_owned(),
        ModelSource::Directory(path) => path.display().to_string(),
    };
    if !std::io::stderr().is_terminal() {
        tracing::info!(model = name, "loading");
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_prefix(name);
    let style = ProgressStyle::with_template(
        "loading {prefix} {wide_bar} {bytes} of {total_bytes}, {eta} left",
    );
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// What is served, how much fits, and how to ask.
fn announcement(
    args: &Args,
    address: SocketAddr,
    management: Option<SocketAddr>,
    summary: &Summary,
) -> String {
    let Summary {
        device,
        dtype,
        n_blocks,
        block_size,
        kv_cache_bytes,
        max_model_len,
        can_chat,
        ignored,
    } = summary;
    let name = &args.served_model_name;
    let slots = u64::from(*n_blocks) * u64::from(*block_size);
    let mib = kv_cache_bytes.div_ceil(1 << 20);
    let (path, body) = match can_chat {
        true => (
            "chat/completions",
            r#""messages": [{"role": "user", "content": "What is a block table?"}]"#,
        ),
        false => ("completions", r#""prompt": "Once upon a time""#),
    };
    let warning = match ignored.as_slice() {
        [] => String::new(),
        names => format!(
            "\ngeneration_config.json asks for {}, which this server doesn't have: it is ignored.",
            names.join(" and ")
        ),
    };
    let management = management.map_or(String::new(), |address| {
        format!("Health, load and metrics at http://{address}\n")
    });
    format!(
        "Serving {name} at http://{address} ({device}; {dtype})\n{management}\
         KV cache: {n_blocks} blocks of {block_size} tokens = {slots} tokens in {mib} MiB; the longest context is {max_model_len} tokens{warning}\n\
         Ask it:\n  curl http://{address}/v1/{path} -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{name}\", {body}}}'"
    )
}

/// SIGTERM: a drain that first lets the endpoints follow. SIGINT: a drain at once. A second of either: out.
fn follow_signals(app: Arc<App>, accept: Duration) -> Result<(), Failure> {
    let failed = |error| (FAILED, format!("signals can't be received: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn(async move {
        let accept = tokio::select! {
            _ = terminate.recv() => accept,
            _ = interrupt.recv() => Duration::ZERO,
        };
        if *app.phase().borrow() == Phase::Loading {
            // Nothing was promised to anybody.
            std::process::exit(0);
        }
        tracing::info!(accept_s = accept.as_secs_f64(), "draining");
        app.advance(Phase::Draining);
        let closing = async {
            tokio::time::sleep(accept).await;
            app.advance(Phase::Closing);
            std::future::pending::<()>().await;
        };
        let code = tokio::select! {
            () = closing => 0,
            _ = terminate.recv() => 128 + 15,
            _ = interrupt.recv() => 128 + 2,
        };
        std::process::exit(code);
    });
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("KVASIR_LOG").unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}
