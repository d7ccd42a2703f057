//! What a policy is told and asked.

use kvasir_crds::LoadReport;

/// What a policy sees at a tick.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Seconds since the beginning.
    pub now_s: f64,
    /// Replicas that it asked for last.
    pub asked: u32,
    /// Of each replica that serves or drains.
    pub reports: &'a [LoadReport],
    /// How long ago those were created that start.
    pub starting_s: &'a [f64],
    /// How long those took that became ready since the last tick.
    pub started_s: &'a [f64],
}

/// What a replica says of its load, as the peers' metrics have it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Requests that run.
    pub running: f64,
    /// Requests that wait.
    pub waiting: f64,
    /// Blocks held by sequences, of all.
    pub kv_usage: f64,
    /// All of its blocks.
    pub blocks: f64,
    /// Blocks held by sequences.
    pub active: f64,
    /// Blocks that the waiting need.
    pub waiting_need: f64,
}

impl View<'_> {
    /// The metrics of those that serve.
    #[must_use]
    pub fn serving(&self) -> Vec<Metrics> {
        let serving = self.reports.iter().filter(|r| r.draining != Some(true));
        serving
            .filter_map(|report| {
                let (blocks, queue) = (report.blocks?, report.queue?);
                Some(Metrics {
                    running: queue.running as f64,
                    waiting: queue.waiting as f64,
                    kv_usage: blocks.active as f64 / blocks.total as f64,
                    blocks: blocks.total as f64,
                    active: blocks.active as f64,
                    waiting_need: blocks.waiting_need as f64,
                })
            })
            .collect()
    }
}

/// Decides how many replicas there should be.
pub trait Policy {
    /// Its name in tables.
    fn name(&self) -> String;

    /// Replicas that should be asked for from now on. It is asked every two seconds, and keeps its own interval.
    fn desired(&mut self, view: &View<'_>) -> u32;
}

/// Always as many.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(pub u32);

impl Policy for Fixed {
    fn name(&self) -> String {
        format!("{} replicas", self.0)
    }

    fn desired(&mut self, _: &View<'_>) -> u32 {
        self.0
    }
}
