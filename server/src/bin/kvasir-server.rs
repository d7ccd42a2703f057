//! The model server of each pod, and what tells what a model needs: reads its flags, listens, loads the model, serves, drains.
//!
//! Exit codes: 0 after a drain, 1 where the server failed, 2 where the user can mend it; one sentence says what.

use std::io::{IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kvasir_crds::load_report::{StartPhase, StartReport};
use kvasir_server::args::{
    Args, ArgsError, CommandLine, LogFormat, ModelSource, PlanArgs, PortArgs,
};
use kvasir_server::http::access::{self, Access};
use kvasir_server::http::serve::{self, Listener, Phase, PortLimits, Tls};
use kvasir_server::http::{self, App, Limits, Routes};
use kvasir_server::hub::HubError;
use kvasir_server::lifecycle::{self, ServeError};
use kvasir_server::metrics::Metrics;
use kvasir_server::startup::{self, StartError, Started, Summary};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The user can mend it.
const MISTAKE: u8 = 2;
const FAILED: u8 = 1;

/// Listeners, event queues, the model's files, and connections that are refused.
const FILES_BESIDE_CONNECTIONS: u64 = 512;

/// The kubelet, the operator and scrapes need a few.
const MAX_MANAGEMENT_CONNECTIONS: usize = 64;

fn main() -> std::process::ExitCode {
    let args = match CommandLine::parse_from(std::env::args_os()) {
        Ok(CommandLine::Serve(args)) => args,
        Ok(CommandLine::Plan(args)) => return tell_plan(&args),
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

/// Says what a model needs, and fails where it doesn't fit.
fn tell_plan(args: &PlanArgs) -> std::process::ExitCode {
    start_log(args.server.log_format);
    let plan = match startup::plan(args) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("kvasir-server: {error}");
            return exit_code(&error).into();
        }
    };
    let told = match args.json {
        true => format!("{:#}", plan.to_json()),
        false => plan.describe(&args.server.model.served_name()),
    };
    // Whoever asked may not care to read on.
    let _ = writeln!(std::io::stdout(), "{told}");
    match plan.fit {
        Ok(_) => 0.into(),
        Err(_) => MISTAKE.into(),
    }
}

/// What the user can mend is told from what failed.
fn exit_code(error: &StartError) -> u8 {
    match error {
        StartError::Engine(_)
        | StartError::Thread(_)
        | StartError::Hub(HubError::Unreachable { .. }) => FAILED,
        _ => MISTAKE,
    }
}

type Failure = (u8, String);

async fn run(args: Args) -> Result<(), Failure> {
    let metrics = Metrics::new(&args.model.served_name())
        .map(Arc::new)
        .map_err(|error| (MISTAKE, format!("--served-model-name: {error}")))?;
    let limits = Limits {
        max_body_bytes: args.limits.max_body_bytes,
        read_timeout: args.limits.read_timeout,
        heartbeat_timeout: args.limits.heartbeat_timeout,
    };
    let mistake = |message| (MISTAKE, message);
    let access = Access::open(&args.access).map_err(mistake)?;
    let tls = access::open_tls(&args.tls).map_err(mistake)?;
    let app = App::new(Arc::clone(&metrics), limits, access);
    follow_signals(Arc::clone(&app), args.drain.accept)?;
    allow_open_files(args.limits.max_connections);
    let Ports {
        server,
        address,
        management_address,
    } = open_ports(&args, &app, tls)?;

    let Some(Started {
        serving,
        engine,
        summary,
        start,
    }) = load(&app, &args, metrics).await?
    else {
        return Ok(());
    };
    let async_engine = serving.engine.clone();
    app.starts(start);
    app.ready(serving);
    if *app.phase().borrow() >= Phase::Draining {
        return lifecycle::stop(engine).await.map_err(failed);
    }
    // Whoever started the server may not care to read on.
    let _ = writeln!(
        std::io::stdout(),
        "{}",
        announcement(&args, address, management_address, &summary)
    );
    lifecycle::until_stopped(&app, server, engine, async_engine)
        .await
        .map_err(failed)?;
    tracing::info!("drained");
    Ok(())
}

/// What listens.
struct Ports {
    /// The API's; it ends with the drain.
    server: JoinHandle<usize>,
    address: SocketAddr,
    management_address: Option<SocketAddr>,
}

/// Listens on all ports, or on none, and serves probes from now on.
fn open_ports(args: &Args, app: &Arc<App>, tls: Option<Tls>) -> Result<Ports, Failure> {
    let PortArgs {
        host,
        port,
        management_port,
    } = args.ports;
    let (listener, address) = listen("port", SocketAddr::new(host, port))?;
    let management = management_port
        .map(|port| listen("management-port", SocketAddr::new(host, port)))
        .transpose()?;
    let limits = PortLimits {
        max_connections: args.limits.max_connections,
        read_timeout: args.limits.read_timeout,
    };
    let failed = |error: std::io::Error| (FAILED, format!("the ports can't be served: {error}"));
    let tcp = TcpListener::from_std(listener).map_err(failed)?;
    let listener = Listener { tcp, tls };
    let routes = match management {
        Some(_) => Routes::Api,
        None => Routes::All,
    };
    let router = http::router(Arc::clone(app), routes);
    let server = serve::serve(listener, router, limits, app.phase(), args.drain.finish);
    let server = tokio::spawn(server);
    let management_address = management.as_ref().map(|(_, address)| *address);
    if let Some((listener, _)) = management {
        serve_management(listener, Arc::clone(app), limits).map_err(failed)?;
    }
    Ok(Ports {
        server,
        address,
        management_address,
    })
}

/// An error with its causes, in one sentence.
fn failed(error: ServeError) -> Failure {
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    let message = causes.fold(error.to_string(), |all, cause| format!("{all}: {cause}"));
    (FAILED, message)
}

/// Each connection is an open file: allows as many as the system lets this process have, and says where that is less
/// than the flag promises, because then nobody is answered, probes neither.
fn allow_open_files(max_connections: usize) {
    let needed = max_connections as u64 + FILES_BESIDE_CONNECTIONS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return;
    }
    let allowed = maximum.map_or(needed, |maximum| maximum.min(needed));
    let limit = Rlimit {
        current: Some(allowed),
        maximum,
    };
    if setrlimit(Resource::Nofile, limit).is_err() || allowed < needed {
        tracing::warn!(
            max_connections,
            open_files = allowed,
            "--max-connections is more than the limit of open files has room for; lower it or raise the limit"
        );
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
    let listener = bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// `::` is every address of both families; where the kernel has no IPv6, every one of IPv4.
fn bind(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    std::net::TcpListener::bind(address).or_else(|error| match address.ip() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            if Errno::from_io_error(&error) == Some(Errno::AFNOSUPPORT) =>
        {
            std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
        }
        _ => Err(error),
    })
}

/// Serves the management port until the process ends, on a thread of its own: however busy the API's threads are,
/// probes are answered, through the whole drain.
fn serve_management(
    listener: std::net::TcpListener,
    app: Arc<App>,
    api: PortLimits,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let serve = async move {
        let listener = TcpListener::from_std(listener)?;
        let limits = PortLimits {
            max_connections: MAX_MANAGEMENT_CONNECTIONS,
            ..api
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

/// Loads with a progress bar where somebody watches. `None`: the server was told to stop meanwhile.
async fn load(
    app: &Arc<App>,
    args: &Args,
    metrics: Arc<Metrics>,
) -> Result<Option<Started>, Failure> {
    let args = args.clone();
    let told = Arc::clone(app);
    let loaded = lifecycle::load_unless_stopped(app, move |check| {
        let bar = progress_bar(&args.model.source);
        let result = startup::start(&args, &metrics, |starting| {
            check();
            told.starts(StartReport {
                phase: Some(starting.phase),
                done_bytes: Some(starting.done_bytes),
                total_bytes: Some(starting.total_bytes),
                ..StartReport::default()
            });
            bar.set_message(match starting.phase {
                StartPhase::Fetch => "fetching",
                _ => "loading",
            });
            bar.set_length(starting.total_bytes);
            bar.set_position(starting.done_bytes);
        });
        bar.finish_and_clear();
        result
    });
    match loaded.await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(started))) => Ok(Some(started)),
        Ok(Some(Err(error))) => Err((exit_code(&error), error.to_string())),
        Err(error) => Err((FAILED, format!("the thread that loads failed: {error}"))),
    }
}

fn progress_bar(model: &ModelSource) -> ProgressBar {
    let name = match model {
        ModelSource::Demo => "the demo model".to_owned(),
        ModelSource::Directory(path) => path.display().to_string(),
        ModelSource::HuggingFace(repository) => repository.to_string(),
    };
    if !std::io::stderr().is_terminal() {
        tracing::info!(model = name, "loading");
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_prefix(name);
    let style = ProgressStyle::with_template(
        "{msg} {prefix} {wide_bar} {bytes} of {total_bytes}, {eta} left",
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
    let name = args.model.served_name();
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
    let scheme = match args.tls.ssl_certfile {
        Some(_) => "https",
        None => "http",
    };
    let key = match args.access.has_keys() {
        true => " -H \"authorization: Bearer $API_KEY\"",
        false => "",
    };
    format!(
        "Serving {name} at {scheme}://{address} ({device}; {dtype})\n{management}\
         KV cache: {n_blocks} blocks of {block_size} tokens = {slots} tokens in {mib} MiB; the longest context is {max_model_len} tokens{warning}\n\
         Ask it:\n  curl {scheme}://{address}/v1/{path}{key} -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{name}\", {body}}}'"
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
        tracing::info!(accept_s = accept.as_secs_f64(), "draining");
        // A load that is under way ends by itself: nothing was promised to anybody.
        app.advance(Phase::Draining);
        let closing = async {
            tokio::time::sleep(accept).await;
            app.advance(Phase::Closing);
            std::future::pending::<i32>().await
        };
        let code = tokio::select! {
            never = closing => never,
            _ = terminate.recv() => 128 + 15,
            _ = interrupt.recv() => 128 + 2,
        };
        // A second signal ends the process at once.
        std::process::exit(code);
    });
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("KVASIR_LOG").unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would panic where standard error is closed, and the task that logs, such as that of the drain, with it.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}
