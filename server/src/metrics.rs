//! All metrics of the server, under the names that dashboards and gateways written for vLLM expect, and our own.
//!
//! Counters and histograms are kept as things happen; gauges are read from the engine's report at each scrape, so
//! that nothing runs between scrapes. Base units; labels from closed sets.

use std::time::Duration;

use kvasir_crds::LoadReport;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::blocks::SlotUse;
use crate::engine::{Counters, FinishReason};

/// Why requests end, as labels.
const FINISH_LABELS: [&str; 4] = ["stop", "length", "abort", "error"];

const fn finish_label(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop(_) | FinishReason::StopString(_) => FINISH_LABELS[0],
        FinishReason::Length => FINISH_LABELS[1],
        FinishReason::Abort => FINISH_LABELS[2],
        FinishReason::Error(_) => FINISH_LABELS[3],
    }
}

/// What is measured of a request's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LatencyKind {
    /// Accepted, and not running yet.
    Queue,
    /// From the first time that it ran to its first token.
    Prefill,
    /// From its arrival to its first token.
    FirstToken,
    /// Between two tokens.
    InterToken,
    /// From its first token to its last.
    Decode,
    /// From its arrival to its end.
    EndToEnd,
}

impl LatencyKind {
    /// In the order of their values.
    const ALL: [Self; 6] = [
        Self::Queue,
        Self::Prefill,
        Self::FirstToken,
        Self::InterToken,
        Self::Decode,
        Self::EndToEnd,
    ];

    /// Name, help and buckets of its histogram.
    const fn definition(self) -> (&'static str, &'static str, &'static [f64]) {
        match self {
            Self::Queue => (
                "vllm:request_queue_time_seconds",
                "From a request's acceptance to the first time that it runs; a preempted one counts once.",
                REQUEST_BUCKETS,
            ),
            Self::Prefill => (
                "vllm:request_prefill_time_seconds",
                "From the first time that a request runs to its first token.",
                REQUEST_BUCKETS,
            ),
            Self::FirstToken => (
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token; one sample a request.",
                TTFT_BUCKETS,
            ),
            Self::InterToken => (
                "vllm:inter_token_latency_seconds",
                "Between two tokens.",
                ITL_BUCKETS,
            ),
            Self::Decode => (
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last.",
                REQUEST_BUCKETS,
            ),
            Self::EndToEnd => (
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its last token.",
                REQUEST_BUCKETS,
            ),
        }
    }
}

/// The states of a KV block, as labels.
const BLOCK_STATES: [&str; 3] = ["active", "cached", "free"];

/// What a slot counts as, as labels; one may be several.
const SLOT_KINDS: [&str; 3] = ["active", "unwritten", "unshared"];

/// Seconds; vLLM's buckets, so that dashboards of either read the other.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
];
const ITL_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0,
];

/// Tokens.
const LENGTH_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
];

/// Every metric there is.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    load: LoadMetrics,
    requests: RequestMetrics,
    http: IntCounterVec,
    request_memory: Gauge,
}

impl Metrics {
    /// Registers all of them, for one served model.
    pub fn new(model_name: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let define = Definitions {
            registry: &registry,
            model_name,
        };
        Ok(Self {
            load: LoadMetrics::new(&define)?,
            requests: RequestMetrics::new(&define)?,
            http: define.counters(
                "kvasir_http_requests_total",
                "HTTP requests answered.",
                &["route", "code"],
            )?,
            request_memory: define.gauge(
                "kvasir_request_memory_bytes",
                "Bytes of request bodies and answers under way.",
            )?,
            registry,
        })
    }

    /// A latency of a request is complete.
    pub fn observe(&self, kind: LatencyKind, length: Duration) {
        self.requests.latencies[kind as usize].observe(length.as_secs_f64());
    }

    /// The prompt of a request that got its first token.
    pub fn prompt(&self, n_tokens: u64) {
        self.requests.prompt_tokens.inc_by(n_tokens);
    }

    /// A request was looked up in the prefix cache, which held `n_hit` of its `n_queried` prompt tokens. Once a request.
    pub fn prefix_cache(&self, n_queried: u64, n_hit: u64) {
        self.requests.prefix_queries.inc_by(n_queried);
        self.requests.prefix_hits.inc_by(n_hit);
    }

    /// So many tokens were generated.
    pub fn generated(&self, n_tokens: u64) {
        self.requests.generation_tokens.inc_by(n_tokens);
    }

    /// A request ended.
    pub fn request_finished(&self, reason: &FinishReason) {
        let label = finish_label(reason);
        self.requests.finished.with_label_values(&[label]).inc();
    }

    /// The lengths of a request that ended and that its client waited for.
    pub fn request_lengths(&self, n_prompt_tokens: u64, n_generated: u64) {
        let requests = &self.requests;
        requests.prompt_lengths.observe(n_prompt_tokens as f64);
        requests.generation_lengths.observe(n_generated as f64);
    }

    /// An HTTP request was answered. `route` is the pattern that matched, never the path itself.
    pub fn answered(&self, route: &str, status: u16) {
        self.http
            .with_label_values(&[route, &status.to_string()])
            .inc();
    }

    /// So many bytes are kept for request bodies and answers under way.
    pub fn request_memory(&self, n_bytes: usize) {
        self.request_memory.set(n_bytes as f64);
    }

    /// Everything in Prometheus' text format; `load` and `counters` are the engine's, once there is one.
    pub fn render(
        &self,
        load: Option<&LoadReport>,
        counters: Option<&Counters>,
    ) -> Result<String, prometheus::Error> {
        if let Some(load) = load {
            self.load.take(load);
        }
        if let Some(counters) = counters {
            self.load.take_slots(counters.slots);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// What the engine's report says, as gauges.
#[derive(Debug)]
struct LoadMetrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    cache_config: GaugeVec,
    blocks: GaugeVec,
    oldest_waiting: Gauge,
    prefill_backlog: Gauge,
    preemptions: IntCounter,
    slots: IntCounterVec,
}

impl LoadMetrics {
    fn new(define: &Definitions<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            running: define.gauge(
                "vllm:num_requests_running",
                "Requests in the running batch.",
            )?,
            waiting: define.gauge(
                "vllm:num_requests_waiting",
                "Requests accepted and not running.",
            )?,
            kv_usage: define.gauge(
                "vllm:kv_cache_usage_perc",
                "KV blocks held by sequences; 1 is all of them.",
            )?,
            cache_config: define.gauges(
                "vllm:cache_config_info",
                "The KV cache's shape.",
                &["block_size", "num_gpu_blocks"],
            )?,
            blocks: define.gauges("kvasir_kv_blocks", "KV blocks by state.", &["state"])?,
            oldest_waiting: define.gauge(
                "kvasir_queue_oldest_seconds",
                "Age of the oldest waiting request, from its arrival.",
            )?,
            prefill_backlog: define.gauge(
                "kvasir_prefill_backlog_tokens",
                "Prompt tokens accepted and not computed yet.",
            )?,
            preemptions: define.counter("vllm:num_preemptions_total", "Sequences preempted.")?,
            slots: define.counters(
                "kvasir_kv_slots_total",
                "Token slots of active KV blocks, summed over steps; those that hold no token; and those that would be active if no block were shared.",
                &["kind"],
            )?,
        })
    }

    fn take(&self, load: &LoadReport) {
        if let Some(queue) = load.queue {
            self.running.set(queue.running as f64);
            self.waiting.set(queue.waiting as f64);
            self.oldest_waiting
                .set(queue.oldest_waiting_ms as f64 / 1e3);
        }
        if let Some(blocks) = load.blocks {
            self.kv_usage
                .set(blocks.active as f64 / blocks.total.max(1) as f64);
            let counts = [blocks.active, blocks.cached, blocks.free];
            for (state, count) in BLOCK_STATES.iter().zip(counts) {
                self.blocks.with_label_values(&[state]).set(count as f64);
            }
            let labels = [blocks.block_size.to_string(), blocks.total.to_string()];
            self.cache_config.with_label_values(&labels).set(1.0);
        }
        self.prefill_backlog
            .set(load.prefill_backlog_tokens.unwrap_or(0) as f64);
        raise_to(&self.preemptions, load.preemptions.unwrap_or(0));
    }

    fn take_slots(&self, slots: SlotUse) {
        let counts = [slots.active, slots.unwritten, slots.unshared];
        for (kind, count) in SLOT_KINDS.iter().zip(counts) {
            raise_to(&self.slots.with_label_values(&[kind]), count);
        }
    }
}

/// Scrapes may overlap: only what is new is added.
fn raise_to(counter: &IntCounter, count: u64) {
    counter.inc_by(count.saturating_sub(counter.get()));
}

/// What happened to requests.
#[derive(Debug)]
struct RequestMetrics {
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    finished: IntCounterVec,
    prompt_lengths: Histogram,
    generation_lengths: Histogram,
    /// In the order of [`LatencyKind::ALL`].
    latencies: Vec<Histogram>,
}

impl RequestMetrics {
    fn new(define: &Definitions<'_>) -> Result<Self, prometheus::Error> {
        let latency = |kind: LatencyKind| {
            let (name, help, buckets) = kind.definition();
            define.histogram(name, help, buckets)
        };
        let metrics = Self {
            prompt_tokens: define.counter(
                "vllm:prompt_tokens_total",
                "Prompt tokens of requests that got a token.",
            )?,
            generation_tokens: define
                .counter("vllm:generation_tokens_total", "Tokens generated.")?,
            prefix_queries: define.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache; a request counts once, however often it is preempted.",
            )?,
            prefix_hits: define.counter(
                "vllm:prefix_cache_hits_total",
                "Those among them that the prefix cache held.",
            )?,
            finished: define.counters(
                "vllm:request_success_total",
                "Requests that ended.",
                &["finished_reason"],
            )?,
            prompt_lengths: define.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of each request that ended.",
                LENGTH_BUCKETS,
            )?,
            generation_lengths: define.histogram(
                "vllm:request_generation_tokens",
                "Tokens generated for each request that ended.",
                LENGTH_BUCKETS,
            )?,
            latencies: LatencyKind::ALL
                .into_iter()
                .map(latency)
                .collect::<Result<_, _>>()?,
        };
        for label in FINISH_LABELS {
            metrics.finished.with_label_values(&[label]);
        }
        Ok(metrics)
    }
}

/// Makes metrics with the label that all of them carry, and registers them.
struct Definitions<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Definitions<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_label("model_name", self.model_name)
    }

    fn register<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M, prometheus::Error> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.register(Gauge::with_opts(self.opts(name, help))?)
    }

    fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        self.register(GaugeVec::new(self.opts(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.register(IntCounter::with_opts(self.opts(name, help))?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(self.opts(name, help), labels)?)
    }

    fn histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, prometheus::Error> {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_crds::load_report::{BlockCounts, QueueCounts};

    #[test]
    fn a_scrape_has_the_names_and_values_that_others_read() {
        let metrics = Metrics::new("m").unwrap();
        metrics.prompt(7);
        metrics.prefix_cache(7, 4);
        for (n, kind) in (1..).zip(LatencyKind::ALL) {
            (0..n).for_each(|_| metrics.observe(kind, Duration::from_millis(30)));
        }
        metrics.request_lengths(7, 3);
        metrics.request_finished(&FinishReason::Length);
        let load = LoadReport {
            blocks: Some(BlockCounts {
                block_size: 16,
                total: 8,
                active: 2,
                cached: 1,
                free: 5,
                waiting_need: 0,
            }),
            queue: Some(QueueCounts {
                running: 3,
                waiting: 4,
                waiting_limit: 9,
                oldest_waiting_ms: 1500,
            }),
            preemptions: Some(6),
            ..LoadReport::default()
        };
        let counters = Counters {
            slots: SlotUse {
                active: 64,
                unwritten: 3,
                unshared: 96,
            },
            ..Counters::default()
        };
        metrics.render(Some(&load), Some(&counters)).unwrap();
        let text = metrics.render(Some(&load), Some(&counters)).unwrap();
        for line in [
            "vllm:num_requests_running{model_name=\"m\"} 3",
            "vllm:num_requests_waiting{model_name=\"m\"} 4",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25",
            "vllm:cache_config_info{block_size=\"16\",model_name=\"m\",num_gpu_blocks=\"8\"} 1",
            "kvasir_kv_blocks{model_name=\"m\",state=\"cached\"} 1",
            "kvasir_queue_oldest_seconds{model_name=\"m\"} 1.5",
            "vllm:num_preemptions_total{model_name=\"m\"} 6",
            "kvasir_kv_slots_total{kind=\"active\",model_name=\"m\"} 64",
            "kvasir_kv_slots_total{kind=\"unwritten\",model_name=\"m\"} 3",
            "kvasir_kv_slots_total{kind=\"unshared\",model_name=\"m\"} 96",
            "vllm:prompt_tokens_total{model_name=\"m\"} 7",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 7",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 4",
            "vllm:request_success_total{finished_reason=\"length\",model_name=\"m\"} 1",
            "vllm:request_success_total{finished_reason=\"abort\",model_name=\"m\"} 0",
            "vllm:request_queue_time_seconds_count{model_name=\"m\"} 1",
            "vllm:request_prefill_time_seconds_count{model_name=\"m\"} 2",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 3",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 4",
            "vllm:request_decode_time_seconds_count{model_name=\"m\"} 5",
            "vllm:e2e_request_latency_seconds_count{model_name=\"m\"} 6",
            "vllm:request_prompt_tokens_sum{model_name=\"m\"} 7",
            "vllm:request_generation_tokens_sum{model_name=\"m\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
    }
}
