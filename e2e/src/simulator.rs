//! Autoscalers compared: the operator's own function and models of its peers scale simulated replicas under the same load.
//!
//! The clairvoyant knows what will come; the best headroom is the constant one that costs least, of those that serve as many
//! requests in time as ours, chosen when all is over. Nothing here knows a clock: a run is the same each time.
//!
//! - [`load`]: traces and generated loads. [`hardware`]: what a replica is made of, and what a step costs.
//! - [`replica`]: one replica, step by step. [`fleet`]: replicas that come and go, and the requests that they get.
//! - [`policy`]: what a policy sees. [`policies`]: ours, the peers', and two that know what nobody can.
//! - [`report`], [`plot`]: what came of it.

pub mod fleet;
pub mod hardware;
pub mod load;
pub mod plot;
pub mod policies;
pub mod policy;
mod random;
pub mod replica;
pub mod report;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use fleet::{Outcome, Terms, run};
use hardware::Hardware;
use load::Load;
use policies::known::{Clairvoyant, Headroom, Work};
use policies::kvasir::Kvasir;
use policy::Policy;

/// Requests that the clairvoyant serves in time.
const ATTAINMENT: f64 = 0.99;
/// The clairvoyant has about this many replicas for the work of one.
const REPLICAS_PER_WORK: f64 = 1.25;
/// No policy may have more than so many times the clairvoyant's mean.
const MOST_TIMES: f64 = 5.0;
/// The least window of the headroom's way down, ours by default.
const DOWN_WINDOW_S: f64 = 60.0;

/// What is compared.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// A trace to replay: Mooncake's format where the name ends in .jsonl, else the Azure LLM trace's CSV. Repeatable.
    #[arg(long)]
    pub trace: Vec<PathBuf>,
    /// A generated load: bursts, ramp, day, prompts or step. All of them where neither this nor a trace is given.
    #[arg(long)]
    pub load: Vec<String>,
    /// How long a replica takes to start, in seconds.
    #[arg(long, value_delimiter = ',', default_values_t = [2.0, 30.0, 300.0])]
    pub start_seconds: Vec<f64>,
    /// Replicas that the clairvoyant needs, about.
    #[arg(long, value_delimiter = ',', default_values_t = [3.0, 10.0, 30.0])]
    pub replicas: Vec<f64>,
    /// How much of each load is run.
    #[arg(long, default_value_t = 60.0)]
    pub minutes: f64,
    /// Where to write results.json and the plots.
    #[arg(long)]
    pub output: Option<PathBuf>,
}

/// What one policy did.
#[derive(Clone, Debug)]
pub struct Row {
    /// The policy.
    pub policy: String,
    /// How it went.
    pub outcome: Outcome,
}

/// One load, size and start.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The load's name.
    pub load: String,
    /// Replicas that the clairvoyant was to need.
    pub replicas: f64,
    /// How long a start takes.
    pub start_s: f64,
    /// How many times an H200 was slowed, and how often each request came.
    pub scale: (f64, f64),
    /// With perfect knowledge.
    pub clairvoyant: Row,
    /// With the best constant headroom.
    pub headroom: Row,
    /// Ours.
    pub kvasir: Row,
    /// Each change of ours, and why.
    pub reasons: Vec<(f64, String)>,
    /// The peers'.
    pub peers: Vec<Row>,
}

/// Runs all that `settings` name, on all cores.
///
/// # Errors
/// Where a trace can't be read, or a load is unknown.
pub fn compare(settings: &Settings) -> Result<Vec<Cell>> {
    let loads = loads(settings)?;
    let mut jobs = Vec::new();
    for load in &loads {
        for &replicas in &settings.replicas {
            for &start_s in &settings.start_seconds {
                jobs.push((load, replicas, start_s));
            }
        }
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..n_threads.min(jobs.len()) {
            scope.spawn(|| {
                while let Some(&(load, replicas, start_s)) =
                    jobs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let cell = cell(load, replicas, start_s);
                    let place = (load.name.clone(), replicas, start_s);
                    let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
                    done.push((place, cell));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    let place = |load: &Load, replicas: f64, start_s: f64| (load.name.clone(), replicas, start_s);
    let mut cells = Vec::new();
    for (load, replicas, start_s) in jobs {
        let at = (done.iter()).position(|(p, _)| *p == place(load, replicas, start_s));
        let at = at.context("a simulation ended early")?;
        cells.push(done.swap_remove(at).1?);
    }
    Ok(cells)
}

fn loads(settings: &Settings) -> Result<Vec<Load>> {
    let seconds = settings.minutes * 60.0;
    let mut loads = Vec::new();
    for path in &settings.trace {
        loads.push(Load::read(path)?.first(seconds));
    }
    let all = settings.trace.is_empty() && settings.load.is_empty();
    let names: Vec<String> = match all {
        true => Load::GENERATED.map(str::to_owned).to_vec(),
        false => settings.load.clone(),
    };
    for name in names {
        let Some(load) = Load::by_name(&name, seconds, 1.0) else {
            bail!("no load is called {name}: {}", Load::GENERATED.join(", "));
        };
        loads.push(load);
    }
    if loads.iter().any(|load| load.requests.is_empty()) {
        bail!("a load has no requests");
    }
    Ok(loads)
}

/// One load on replicas slowed until the clairvoyant needs about `replicas`: as far as a prompt alone still meets its
/// objective; beyond that each request comes several times.
fn scaled(load: &Load, replicas: f64) -> (Load, Hardware, (f64, f64)) {
    let once = Work::of(load, &Hardware::slowed(1.0)).mean();
    let times = replicas / REPLICAS_PER_WORK / once;
    let slowed = times.min(Hardware::most_slowed(load));
    let copies = (times / slowed).max(1.0);
    let load = match copies > 1.0 {
        true => load.multiplied(copies),
        false => load.clone(),
    };
    (load, Hardware::slowed(slowed), (slowed, copies))
}

fn cell(load: &Load, replicas: f64, start_s: f64) -> Result<Cell> {
    let (load, hardware, scale) = scaled(load, replicas);
    let work = Work::of(&load, &hardware);
    let mut terms = Terms {
        hardware,
        start_s,
        initial: 1,
        most: (replicas * MOST_TIMES) as u32,
    };
    let (clairvoyant, initial) = clairvoyant(&load, &work, &terms);
    terms.initial = initial;
    let mut ours = Kvasir::shipped(terms.most)?;
    let kvasir = row(&load, &terms, &mut ours);
    let headroom = headroom(&load, &work, &terms, kvasir.outcome.attainment);
    let peers = policies::peers(hardware.slots);
    let peers = peers
        .into_iter()
        .map(|mut peer| row(&load, &terms, peer.as_mut()));
    Ok(Cell {
        load: load.name.clone(),
        replicas,
        start_s,
        scale,
        clairvoyant,
        headroom,
        peers: peers.collect(),
        kvasir,
        reasons: ours.reasons,
    })
}

fn row(load: &Load, terms: &Terms, policy: &mut dyn Policy) -> Row {
    let outcome = run(load, terms, policy);
    Row {
        policy: policy.name(),
        outcome,
    }
}

/// The cheapest that serves [`ATTAINMENT`] in time, of several windows around each moment; with the replicas that it has
/// at the beginning.
fn clairvoyant(load: &Load, work: &Work, terms: &Terms) -> (Row, u32) {
    let mut best: Option<(Row, u32)> = None;
    for window_s in [4.0, 12.0, 40.0] {
        let attempt = |scale: f64| {
            let mut policy = Clairvoyant::new(work, scale, window_s, terms.start_s);
            let initial = policy.initial().min(terms.most);
            let terms = Terms { initial, ..*terms };
            (row(load, &terms, &mut policy), initial)
        };
        let (mut low, mut high) = (0.5, 2.5);
        for _ in 0..7 {
            let scale = (low + high) / 2.0;
            let found = attempt(scale);
            if found.0.outcome.attainment < ATTAINMENT {
                low = scale;
                continue;
            }
            high = scale;
            let hours = found.0.outcome.replica_hours;
            if best
                .as_ref()
                .is_none_or(|(row, _)| hours < row.outcome.replica_hours)
            {
                best = Some(found);
            }
        }
    }
    // Where even it can't, it is as good as it can be.
    best.unwrap_or_else(|| {
        let mut policy = Clairvoyant::new(work, 4.0, 12.0, terms.start_s);
        let initial = policy.initial().min(terms.most);
        (
            row(load, &Terms { initial, ..*terms }, &mut policy),
            initial,
        )
    })
}

/// The cheapest constant headroom that serves as many in time as `attainment`, or else the one that serves most.
fn headroom(load: &Load, work: &Work, terms: &Terms, attainment: f64) -> Row {
    let down_s = DOWN_WINDOW_S.max(2.0 * terms.start_s);
    let mut rows = Vec::new();
    for window_s in [10.0, 60.0] {
        for step in 0..12 {
            let scale = 0.8 * 1.12_f64.powi(step);
            let mut policy = Headroom::new(work, scale, window_s, down_s);
            rows.push(row(load, terms, &mut policy));
        }
    }
    let equal = |row: &&Row| row.outcome.attainment >= attainment;
    let hours = |a: &&Row, b: &&Row| a.outcome.replica_hours.total_cmp(&b.outcome.replica_hours);
    let most = |a: &&Row, b: &&Row| a.outcome.attainment.total_cmp(&b.outcome.attainment);
    let cheapest = rows.iter().filter(equal).min_by(hours);
    let best = cheapest.or_else(|| rows.iter().max_by(most));
    best.cloned().unwrap_or_else(|| Row {
        policy: "best headroom".into(),
        outcome: Outcome::default(),
    })
}
