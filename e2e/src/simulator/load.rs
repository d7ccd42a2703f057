//! Requests over time: replayed from a trace, or generated.
//!
//! The formats are those of the Azure LLM inference trace of 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and of
//! Mooncake (JSON lines: timestamp in ms, input_length, output_length, hash_ids, one for each block of 512 tokens).

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::random::Random;

/// Tokens of one of Mooncake's blocks, whose ids say which prompts begin alike.
pub const CHUNK_TOKENS: u32 = 512;
/// Mooncake's times are whole multiples of this: its requests are spread over it evenly.
const MOONCAKE_TICK_S: f64 = 3.0;
/// Copies of a request come within this time of it: the bursts stay, and no step has them all at once.
const COPIES_WITHIN_S: f64 = 2.0;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Seconds from the beginning.
    pub arrival_s: f64,
    /// Tokens of its prompt; at least 1.
    pub prompt: u32,
    /// Tokens that it generates; at least 1.
    pub outputs: u32,
    /// What its prompt's full chunks of [`CHUNK_TOKENS`] hold: equal ids at the beginning are equal prefixes.
    pub chunks: Vec<u64>,
}

/// Requests in the order of their arrival.
#[derive(Clone, Debug)]
pub struct Load {
    /// Its name in tables.
    pub name: String,
    /// The requests.
    pub requests: Vec<Request>,
    /// When it ends, in seconds.
    pub duration_s: f64,
    /// It is generated, and can be at any rate.
    pub is_generated: bool,
}

impl Load {
    fn new(name: &str, mut requests: Vec<Request>, duration_s: f64) -> Self {
        requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
        Self {
            name: name.to_owned(),
            requests,
            duration_s,
            is_generated: false,
        }
    }

    /// Reads a trace: JSON lines where the name ends so, CSV otherwise.
    ///
    /// # Errors
    /// Where the file can't be read, or a line is not of its format.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let is_json = path.extension().is_some_and(|e| e == "jsonl");
        let requests = match is_json {
            true => mooncake(&text),
            false => azure(&text),
        };
        let requests = requests.with_context(|| format!("{shown} is no trace that can be read"))?;
        let last = requests.iter().map(|r| r.arrival_s).fold(0.0, f64::max);
        Ok(Self::new(stem.unwrap_or("trace"), requests, last.max(1.0)))
    }

    /// The part of it before `seconds`.
    #[must_use]
    pub fn first(mut self, seconds: f64) -> Self {
        self.requests.retain(|request| request.arrival_s < seconds);
        self.duration_s = self.duration_s.min(seconds);
        self
    }

    /// `times` as many requests. Those of a trace come again within two seconds, so that bursts are as much of the mean as
    /// before, and copies have prompts of their own; others are generated anew.
    #[must_use]
    pub fn multiplied(&self, times: f64) -> Self {
        if self.is_generated
            && let Some(more) = Self::by_name(&self.name, self.duration_s, times)
        {
            return more;
        }
        let mut random = Random::new(7);
        let mut requests = Vec::new();
        for request in &self.requests {
            let copies = times.floor() as u64 + u64::from(random.uniform() < times.fract());
            for copy in 0..copies {
                let later = if copy == 0 { 0.0 } else { random.uniform() };
                requests.push(Request {
                    arrival_s: request.arrival_s + later * COPIES_WITHIN_S,
                    chunks: request.chunks.iter().map(|id| id + (copy << 40)).collect(),
                    ..request.clone()
                });
            }
        }
        Self::new(&self.name, requests, self.duration_s)
    }

    /// Requests of the Poisson process whose rate is `rate` at each second, at most `most`.
    fn generated(
        name: &str,
        duration_s: f64,
        (prompt, outputs): (f64, f64),
        most: f64,
        rate: impl Fn(f64) -> f64,
    ) -> Self {
        let mut random = Random::new(name.bytes().map(u64::from).sum());
        let (mut requests, mut now) = (Vec::new(), 0.0);
        loop {
            now += random.exponential(most);
            if now >= duration_s {
                return Self {
                    is_generated: true,
                    ..Self::new(name, requests, duration_s)
                };
            }
            if random.uniform() * most < rate(now) {
                requests.push(Request {
                    arrival_s: now,
                    prompt: random.length(prompt),
                    outputs: random.length(outputs),
                    chunks: Vec::new(),
                });
            }
        }
    }

    /// A generated load by its name, at `times` its rate; `None` where there is none of it.
    #[must_use]
    pub fn by_name(name: &str, duration_s: f64, times: f64) -> Option<Self> {
        let chat = (800.0, 200.0);
        let generated = |name: &str, duration_s, lengths, most: f64, rate: &dyn Fn(f64) -> f64| {
            Self::generated(name, duration_s, lengths, most * times, |at| {
                rate(at) * times
            })
        };
        Some(match name {
            // A minute of four times the rate, each five minutes.
            "bursts" => generated(name, duration_s, chat, 12.0, &|at| {
                if at % 300.0 >= 240.0 { 12.0 } else { 3.0 }
            }),
            "ramp" => generated(name, duration_s, chat, 10.0, &|at| {
                let half = (at / duration_s * 2.0).min(2.0 - at / duration_s * 2.0);
                1.5 + 8.5 * half
            }),
            // A day in the time of the load: three times as much at noon as at night.
            "day" => generated(name, duration_s, chat, 9.0, &|at| {
                6.0 - 3.0 * (at / duration_s * std::f64::consts::TAU).cos()
            }),
            // Documents, with short answers; twice as many for five minutes of each fifteen.
            "prompts" => generated(name, duration_s, (6_000.0, 60.0), 4.0, &|at| {
                if at % 900.0 >= 600.0 { 4.0 } else { 2.0 }
            }),
            // The shape of llm-d-autoscaling PR 1230: nothing, and then 4,000 tokens in and 1,000 out all the time.
            "step" => generated(name, duration_s, (4_000.0, 1_000.0), 2.0, &|at| {
                if at < 60.0 { 0.05 } else { 2.0 }
            }),
            _ => return None,
        })
    }

    /// The names that [`Load::by_name`] knows.
    pub const GENERATED: [&str; 5] = ["bursts", "ramp", "day", "prompts", "step"];
}

fn azure(text: &str) -> Result<Vec<Request>> {
    let mut first: Option<f64> = None;
    let mut requests = Vec::new();
    for (n, line) in text.lines().enumerate().skip(1) {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [time, prompt, outputs] = fields[..] else {
            bail!("line {}: not three fields", n + 1);
        };
        let at = seconds(time).with_context(|| format!("line {}: no time", n + 1))?;
        let count = |field: &str| field.parse::<u32>().map(|n| n.max(1));
        requests.push(Request {
            arrival_s: at - *first.get_or_insert(at),
            prompt: count(prompt).with_context(|| format!("line {}", n + 1))?,
            outputs: count(outputs).with_context(|| format!("line {}", n + 1))?,
            chunks: Vec::new(),
        });
    }
    Ok(requests)
}

/// Seconds of `2023-11-16 18:15:46.6805900`, from the beginning of its month.
fn seconds(time: &str) -> Option<f64> {
    let (date, time) = time.split_once(' ')?;
    let day: f64 = date.rsplit('-').next()?.parse().ok()?;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    Some(((day * 24.0 + hours) * 60.0 + minutes) * 60.0 + seconds)
}

fn mooncake(text: &str) -> Result<Vec<Request>> {
    let mut random = Random::new(3);
    let mut requests = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let fields: Value =
            serde_json::from_str(line).with_context(|| format!("line {}", n + 1))?;
        let number = |name: &str| {
            let field = fields[name].as_u64();
            field.with_context(|| format!("line {}: no {name}", n + 1))
        };
        let prompt = u32::try_from(number("input_length")?)?.max(1);
        let ids = fields["hash_ids"].as_array();
        let chunks = ids.into_iter().flatten().filter_map(Value::as_u64);
        requests.push(Request {
            arrival_s: number("timestamp")? as f64 / 1e3 + random.uniform() * MOONCAKE_TICK_S,
            prompt,
            outputs: u32::try_from(number("output_length")?)?.max(1),
            chunks: chunks.take((prompt / CHUNK_TOKENS) as usize).collect(),
        });
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read() {
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
            2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.0000000,396,0\n";
        let requests = azure(csv).unwrap();
        assert_eq!((requests[0].arrival_s, requests[0].prompt), (0.0, 374));
        assert!((requests[1].arrival_s - 1.5).abs() < 1e-6, "over midnight");
        assert_eq!(requests[1].outputs, 1);
        assert!(azure("TIMESTAMP\nnow,1,2\n").is_err());

        let lines = r#"{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}"#;
        let requests = mooncake(lines).unwrap();
        assert_eq!(requests[0].chunks, [7, 8], "the last is not full");
        assert!((3.0..6.0).contains(&requests[0].arrival_s));
        assert!(mooncake("{}").is_err());
    }

    #[test]
    fn generated_loads_are_the_same_each_time_and_keep_their_bursts_when_multiplied() {
        for name in Load::GENERATED {
            let load = Load::by_name(name, 600.0, 1.0).unwrap();
            let again = Load::by_name(name, 600.0, 1.0).unwrap();
            assert_eq!(load.requests, again.requests, "{name}");
            assert!(!load.requests.is_empty(), "{name}");
        }
        assert!(Load::by_name("none", 600.0, 1.0).is_none());
        let load = Load::by_name("bursts", 600.0, 1.0).unwrap();
        let replayed = Load {
            is_generated: false,
            ..load.clone()
        };
        let share = |load: &Load| {
            let burst = load
                .requests
                .iter()
                .filter(|r| r.arrival_s % 300.0 >= 240.0);
            burst.count() as f64 / load.requests.len() as f64
        };
        for load in [&load, &replayed] {
            let more = load.multiplied(2.5);
            let times = more.requests.len() as f64 / load.requests.len() as f64;
            assert!((2.4..2.6).contains(&times), "{times}");
            assert!((share(load) - share(&more)).abs() < 0.05);
        }
    }
}
