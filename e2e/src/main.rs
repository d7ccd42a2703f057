//! The command line of the cluster: up, down, image. It owns the flags and nothing behind them.

use anyhow::Result;
use clap::{Parser, Subcommand};
use kvasir_e2e::cluster::{Cluster, Name, remains};
use kvasir_e2e::toolchain::Toolchain;
use std::io::Read as _;

/// A real Kubernetes cluster on this machine, with Kvasir on it.
#[derive(Parser)]
#[command(name = "kvasir-e2e", version)]
struct Cli {
    #[command(subcommand)]
    job: Job,
}

#[derive(Subcommand)]
enum Job {
    /// Brings a cluster up.
    Up {
        /// The cluster's name, where one is not enough.
        #[arg(long, default_value = "kvasir")]
        name: Name,
        /// How many nodes.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
    },
    /// Takes a cluster away and leaves the machine as it was.
    Down {
        /// The cluster's name.
        #[arg(long, default_value = "kvasir")]
        name: Name,
        /// First wait until standard input closes: how a test has its cluster removed however it ends.
        #[arg(long, hide = true)]
        when_stdin_closes: bool,
    },
}

fn main() -> Result<()> {
    match Cli::parse().job {
        Job::Up { name, nodes } => {
            let cluster = Cluster::start(&name, nodes, Toolchain::ensure()?)?;
            println!("{}", cluster.kubeconfig().display());
        }
        Job::Down {
            name,
            when_stdin_closes,
        } => {
            if when_stdin_closes {
                std::io::stdin().read_to_end(&mut Vec::new())?;
            }
            remains::remove(&name)?;
        }
    }
    Ok(())
}
