//! The command line: a cluster up, down, the image, and simulations. It owns the flags and the order in which `up` does its
//! steps, and nothing behind them.

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};
use kvasir_e2e::access::Access;
use kvasir_e2e::cluster::{AS_ROOT, Cluster, Name, cleanup, is_root};
use kvasir_e2e::image::Image;
use kvasir_e2e::image::recipes::{self, Devices};
use kvasir_e2e::simulator::{plot, report};
use kvasir_e2e::toolchain::{self, Monitoring, Toolchain};
use kvasir_e2e::{chat, progress, quickstart, simulator};
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// A real Kubernetes cluster on this machine, with Kvasir on it.
#[derive(Parser)]
#[command(name = "kvasir-e2e", version)]
struct Cli {
    #[command(subcommand)]
    job: Job,
}

#[derive(Subcommand)]
enum Job {
    /// Brings a cluster up, installs the operator, applies the demo and asks it a question.
    Up(Up),
    /// Takes the cluster away and leaves the machine as it was.
    Down {
        /// The cluster's name.
        #[arg(long, default_value = "kvasir")]
        name: Name,
        /// First wait until standard input closes: how a test has its cluster removed however it ends.
        #[arg(long, hide = true)]
        when_stdin_closes: bool,
    },
    /// Downloads or builds every program that a cluster and the tests need, ahead of time.
    Tools,
    /// Writes the image of the server and the operator as an OCI archive that can be pushed.
    Image {
        /// The file to write.
        #[arg(short, long)]
        output: PathBuf,
        /// The reference that the image goes by.
        #[arg(long, default_value_t = recipes::kvasir_reference())]
        reference: String,
        /// Serve on NVIDIA GPUs too: about 540 MB more, for cuBLAS.
        #[arg(long)]
        cuda: bool,
    },
    /// Simulates what takes too long to try.
    Simulate {
        #[command(subcommand)]
        what: Simulate,
    },
    /// Asks a server one question and streams the answer.
    Ask {
        /// The server, such as http://127.0.0.1:8000.
        url: String,
        /// What to ask.
        question: String,
        /// The model's name.
        #[arg(long, default_value = "kvasir-demo")]
        model: String,
    },
}

#[derive(Subcommand)]
enum Simulate {
    /// Compares the operator's autoscaler with its peers', with the clairvoyant and with the best constant headroom.
    Autoscaling(simulator::Settings),
}

#[derive(Args)]
struct Up {
    /// The cluster's name, where one is not enough.
    #[arg(long, default_value = "kvasir", conflicts_with = "existing_cluster")]
    name: Name,
    /// How many nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
    /// Use a cluster that exists, in place of one on this machine; needs --context and --image.
    #[arg(long, requires = "context", requires = "image")]
    existing_cluster: bool,
    /// The context of the existing cluster in your kubeconfig.
    #[arg(long, requires = "existing_cluster")]
    context: Option<String>,
    /// The image that the existing cluster can pull.
    #[arg(long, requires = "existing_cluster")]
    image: Option<String>,
}

fn main() -> Result<()> {
    match Cli::parse().job {
        Job::Up(up) => self::up(&up),
        Job::Down {
            name,
            when_stdin_closes,
        } => {
            if when_stdin_closes {
                std::io::stdin().read_to_end(&mut Vec::new())?;
            }
            down(&name)
        }
        Job::Tools => tools(),
        Job::Simulate {
            what: Simulate::Autoscaling(settings),
        } => simulate_autoscaling(&settings),
        Job::Ask {
            url,
            question,
            model,
        } => Ok(chat::stream_answer(&url, &model, &question)?),
        Job::Image {
            output,
            reference,
            cuda,
        } => {
            let devices = if cuda {
                Devices::CpuAndCuda
            } else {
                Devices::Cpu
            };
            image(&output, reference, devices)
        }
    }
}

fn simulate_autoscaling(settings: &simulator::Settings) -> Result<()> {
    let cells = simulator::compare(settings)?;
    println!("{}\n{}", report::table(&cells), report::summary(&cells));
    let Some(folder) = &settings.output else {
        return Ok(());
    };
    std::fs::create_dir_all(folder)?;
    let json = serde_json::to_string_pretty(&report::json(&cells))?;
    std::fs::write(folder.join("results.json"), json)?;
    std::fs::write(folder.join("summary.md"), report::summary(&cells))?;
    for cell in &cells {
        let name = format!("{}-{}s-{}", cell.load, cell.start_s, cell.replicas);
        std::fs::write(
            folder.join(format!("{name}-replicas.svg")),
            plot::series(cell),
        )?;
        std::fs::write(folder.join(format!("{name}-cost.svg")), plot::scatter(cell))?;
    }
    Ok(())
}

fn image(output: &Path, reference: String, devices: Devices) -> Result<()> {
    let image = Image {
        reference,
        ..recipes::kvasir(devices)?
    };
    image.write(output)?;
    let n_bytes = std::fs::metadata(output)?.len();
    progress::say(format_args!(
        "{} is in {} ({} MB); the debug information of its programs is beside them, in NAME.debug",
        image.reference,
        output.display(),
        n_bytes / 1_000_000
    ));
    Ok(())
}

fn tools() -> Result<()> {
    Toolchain::ensure()?;
    Monitoring::ensure()?;
    toolchain::python()?;
    progress::say(format_args!(
        "Every program is in {}",
        toolchain::cache().display()
    ));
    Ok(())
}

fn down(name: &Name) -> Result<()> {
    if !is_root() {
        bail!("this is not root; run {AS_ROOT} cargo run --release -p kvasir-e2e -- down");
    }
    let step = progress::begin(format_args!("Removing the cluster {name}"));
    cleanup::remove(name)?;
    step.done(format_args!(
        "nothing of it is left; programs stay in {} for the next time",
        toolchain::cache().display()
    ));
    Ok(())
}

fn up(up: &Up) -> Result<()> {
    if let (Some(context), Some(image)) = (&up.context, &up.image) {
        progress::say(format_args!(
            "Using the existing cluster of the context {context:?}, image {image}."
        ));
        let access = Access::existing(context)?;
        first_answer(&access, image)?;
        progress::say(format_args!(
            "To take it away again: kubectl --context {context} delete llmdeployment {}; \
             helm --kube-context {context} uninstall kvasir --namespace {}",
            quickstart::DEMO,
            quickstart::SYSTEM
        ));
        return Ok(());
    }
    progress::say("This brings a Kubernetes cluster up on this machine. Its kubelets need root.");
    if !is_root() {
        bail!(
            "this is not root; run {AS_ROOT} cargo run --release -p kvasir-e2e -- up\n\
             or serve without a cluster: cargo run --release --bin kvasir-server"
        );
    }
    let tools = Toolchain::ensure()?;
    let image = recipes::kvasir(Devices::Cpu)?;
    let cluster = match Cluster::attach(&up.name, tools.clone()) {
        Some(cluster) => {
            progress::say(format_args!(
                "The cluster {} runs already; using it.",
                up.name
            ));
            cluster
        }
        None => Cluster::start(&up.name, up.nodes, tools)?,
    };
    cluster.import(&image)?;
    let access = cluster.access();
    first_answer(&access, &image.reference)?;
    print_what_next(&up.name, &cluster);
    Ok(())
}

fn first_answer(access: &Access, image: &str) -> Result<()> {
    quickstart::install(access, image)?;
    quickstart::apply_demo(access)?;
    Ok(quickstart::ask_demo(access)?)
}

fn print_what_next(name: &Name, cluster: &Cluster) {
    let port = 8000;
    // Only root reads the kubeconfig. A machine where root needed no sudo may have none.
    let by_sudo = std::env::var_os("SUDO_USER").is_some();
    let (shell, sudo) = match by_sudo {
        true => ("a root shell (sudo -s)", "sudo "),
        false => ("this shell", ""),
    };
    progress::say(format_args!(
        r#"To play with it, in {shell}:
  export KUBECONFIG={kubeconfig} PATH={kubectl}:{helm}:$PATH
  kubectl get llmdeployments
  kubectl describe llmdeployment {demo}
  kubectl scale llmdeployment {demo} --replicas=2
  kubectl port-forward service/{demo} {port}:{port} &
  curl -N http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{{"model": "kvasir-demo", "stream": true, "messages": [{{"role": "user", "content": "How do I scale an LLMDeployment?"}}]}}'
To take everything away again:
  {sudo}{program} down --name {name}"#,
        kubeconfig = cluster.kubeconfig().display(),
        kubectl = cluster.tools().kubernetes.display(),
        helm = cluster.tools().helm.display(),
        demo = quickstart::DEMO,
        program = std::env::current_exe()
            .map_or_else(|_| "kvasir-e2e".into(), |path| path.display().to_string()),
    ));
}
