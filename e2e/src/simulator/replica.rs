//! One replica, step by step, as the server's scheduler makes steps: decodes first, short prompts, the prompts under way,
//! then new requests in the order of service while their known tokens fit; the newest is preempted when the pool is empty.
//!
//! A model of it, because a year of steps has to run in a minute: sequences that decode are counted, not visited, so that
//! a step costs the same however many there are. `e2e/tests/simulator.rs` holds it against the real scheduler and block pool.
//! What it leaves out: several sequences for a request, windowed layers, and cached answers (prompts alone are found again).

mod pool;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{
    BlockCounts, PageDemand, QueueCounts, SCHEMA, SlotCounts, TotalCounts,
};

use super::hardware::{Hardware, StepSize};
use super::load::Request;
use pool::Pool;

/// A step with prompts may take this many times as long as one that only decodes, as the server's pacer has it.
const MOST_STRETCH: f64 = 2.9;
/// One in so many steps only decodes.
const CADENCE: u32 = 32;
/// A prompt with at most so many tokens left is short.
const SHORT_TOKENS: u32 = 256;

/// Where a request stands in the order of service: its number in the load.
type Key = usize;

/// A request that waits or whose prompt is being computed.
#[derive(Clone, Debug)]
struct Prompt {
    /// The prompt, and after a preemption what was generated.
    known: u32,
    /// Tokens in the cache.
    done: u32,
    /// Tokens generated before.
    generated: u32,
    /// Chunks that it shares or has registered, from its first on.
    chunks_held: u32,
    arrived_s: f64,
}

/// A sequence that decodes.
#[derive(Clone, Copy, Debug)]
struct Decode {
    /// Tokens in the cache when it began, and the number of steps with decodes by then.
    length: u32,
    since: u64,
    /// The number of steps with decodes after which it ends.
    until: u64,
    generated: u32,
    chunks_held: u32,
    arrived_s: f64,
}

/// The sequences that decode.
#[derive(Debug)]
struct Decodes {
    sequences: BTreeMap<Key, Decode>,
    ends: BinaryHeap<Reverse<(u64, Key)>>,
    /// Steps with decodes so far.
    n_steps: u64,
    /// By the remainder of the number of steps: sequences that take a block in it.
    takes_block: Vec<u64>,
    /// Tokens in the cache of all of them.
    cached_tokens: u64,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    prompt_tokens: u64,
    generated: u64,
    ended: u64,
    preemptions: u64,
}

#[derive(Clone, Debug)]
struct Step {
    ends_s: f64,
    n_decodes: u64,
    prompts: Vec<(Key, u32)>,
}

/// A replica. Times are seconds of the simulation.
#[derive(Debug)]
pub struct Replica {
    hardware: Hardware,
    boot: u64,
    waiting: BTreeMap<Key, Prompt>,
    prefilling: BTreeMap<Key, Prompt>,
    decodes: Decodes,
    pool: Pool,
    step: Option<Step>,
    n_mixed: u32,
    /// Prompt tokens of the waiting and the prompts under way that are to be computed.
    backlog: u64,
    counts: Counts,
    /// First tokens: whose and when.
    pub first_tokens: Vec<(usize, f64)>,
    /// When the last request ended.
    pub idle_since_s: f64,
}

impl Replica {
    /// An idle one, ready at `now_s`; `boot` tells it from all others.
    #[must_use]
    pub fn new(hardware: Hardware, boot: u64, now_s: f64) -> Self {
        Self {
            hardware,
            boot,
            waiting: BTreeMap::new(),
            prefilling: BTreeMap::new(),
            decodes: Decodes {
                sequences: BTreeMap::new(),
                ends: BinaryHeap::new(),
                n_steps: 0,
                takes_block: vec![0; hardware.block_size as usize],
                cached_tokens: 0,
            },
            pool: Pool::new(&hardware),
            step: None,
            n_mixed: 0,
            backlog: 0,
            counts: Counts::default(),
            first_tokens: Vec::new(),
            idle_since_s: now_s,
        }
    }

    /// Sequences that run.
    #[must_use]
    pub fn n_running(&self) -> usize {
        self.prefilling.len() + self.decodes.sequences.len()
    }

    /// Requests that wait.
    #[must_use]
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing runs or waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.n_running() + self.n_waiting() == 0
    }

    /// Prompt tokens that are to be computed.
    #[must_use]
    pub fn backlog_tokens(&self) -> u64 {
        self.backlog
    }

    /// Takes a request, unless too many wait.
    pub fn add(&mut self, requests: &[Request], key: usize, now_s: f64) -> bool {
        if self.waiting.len() >= self.hardware.max_waiting as usize {
            return false;
        }
        let request = &requests[key];
        let prompt = Prompt {
            known: request.prompt,
            done: 0,
            generated: 0,
            chunks_held: 0,
            arrived_s: now_s,
        };
        self.queue(requests, key, prompt);
        if self.step.is_none() {
            self.begin_step(requests, now_s);
        }
        true
    }

    /// Runs until `now_s`.
    pub fn advance(&mut self, requests: &[Request], now_s: f64) {
        while let Some(ends_s) = self.step.as_ref().map(|step| step.ends_s)
            && ends_s <= now_s
        {
            self.end_step(requests);
            self.begin_step(requests, ends_s);
        }
    }

    fn blocks_for(&self, tokens: u32) -> u64 {
        u64::from(tokens.div_ceil(self.hardware.block_size))
    }

    fn chunk_blocks(&self, chunks: u32) -> u64 {
        u64::from(chunks) * u64::from(self.hardware.blocks_of_a_chunk())
    }

    fn chunk_tokens(&self, chunks: u32) -> u32 {
        chunks * self.hardware.blocks_of_a_chunk() * self.hardware.block_size
    }

    /// Chunks at the beginning of a prompt that the cache holds; one token at least is computed.
    fn hit(&self, request: &Request, known: u32) -> u32 {
        let most = (known - 1) / self.chunk_tokens(1);
        let chunks = request.chunks.iter().take(most as usize);
        let held = chunks.take_while(|id| self.pool.has(**id));
        held.count() as u32
    }

    fn queue(&mut self, requests: &[Request], key: Key, mut prompt: Prompt) {
        // What it was counted for in the backlog: the cache may hold more or less of it when it runs.
        let hit = self.hit(&requests[key], prompt.known);
        prompt.done = self.chunk_tokens(hit);
        self.backlog += u64::from(prompt.known - prompt.done);
        self.waiting.insert(key, prompt);
    }

    /// Gives back the blocks of a sequence of so many tokens in the cache.
    fn let_go(&mut self, request: &Request, length: u32, chunks_held: u32) {
        let own = self.blocks_for(length) - self.chunk_blocks(chunks_held);
        self.pool.give(own);
        self.pool.release(&request.chunks[..chunks_held as usize]);
    }

    fn begin_step(&mut self, requests: &[Request], now_s: f64) {
        let mut preempted = false;
        let bucket = (self.decodes.n_steps % u64::from(self.hardware.block_size)) as usize;
        while self.decodes.takes_block[bucket] > self.pool.available() {
            self.preempt_newest(requests);
            preempted = true;
        }
        self.pool.take(self.decodes.takes_block[bucket]);
        let decodes = StepSize {
            n_decodes: self.decodes.sequences.len() as u64,
            n_cached: self.decodes.cached_tokens,
            ..StepSize::default()
        };
        let room = match decodes.n_decodes {
            0 => self.hardware.max_tokens,
            n => {
                let budget = self.prompt_budget(decodes);
                budget.min(self.hardware.max_tokens.saturating_sub(n as u32))
            }
        };
        let mut batch = Batch {
            size: decodes,
            room,
            prompts: Vec::new(),
        };
        self.fill(requests, &mut batch, preempted);
        self.pool.evict();
        let Batch { size, prompts, .. } = batch;
        if size.n_decodes == 0 && prompts.is_empty() {
            return;
        }
        self.n_mixed = match size.n_decodes > 0 && size.n_prompt > 0 {
            true => self.n_mixed + 1,
            false => 0,
        };
        self.step = Some(Step {
            ends_s: now_s + self.hardware.cost.of(size),
            n_decodes: size.n_decodes,
            prompts,
        });
    }

    /// Prompt tokens beside decodes, so that the step takes [`MOST_STRETCH`] times as long as the decodes alone. The server
    /// measures what prompts cost; here it is known.
    fn prompt_budget(&self, decodes: StepSize) -> u32 {
        if self.n_mixed >= CADENCE - 1 {
            return 0;
        }
        let cost = &self.hardware.cost;
        let room_s = cost.of(decodes) * (MOST_STRETCH - 1.0);
        let position = self.prefilling.values().next().map_or(0, |p| p.done);
        // n * token + n * (position + n / 2) * pair = room
        let linear = cost.prompt_token_s + f64::from(position) * cost.pair_s;
        let root = (linear * linear + 2.0 * cost.pair_s * room_s).sqrt();
        let tokens = 2.0 * room_s / (linear + root);
        let least = self.hardware.max_tokens / 32;
        (tokens as u32).clamp(least, self.hardware.max_tokens)
    }

    fn fill(&mut self, requests: &[Request], batch: &mut Batch, preempted: bool) {
        let short = SHORT_TOKENS.min(self.hardware.max_tokens / 4);
        let rest = batch.room - batch.room / 4;
        batch.room /= 4;
        let under_way = self.prefilling.iter();
        let mut shorts: Vec<(u32, Key)> = under_way
            .map(|(&key, prompt)| (prompt.known - prompt.done, key))
            .filter(|(left, _)| *left <= short)
            .collect();
        shorts.sort_unstable();
        for (_, key) in shorts {
            self.compute(key, batch);
        }
        let head_fits = (self.waiting.iter().next())
            .is_some_and(|(&key, prompt)| self.fits(&requests[key], prompt).is_some());
        if head_fits && !preempted {
            let short: Vec<Key> = (self.waiting.iter().take(256))
                .filter(|(_, prompt)| prompt.known - prompt.done <= short)
                .map(|(&key, _)| key)
                .collect();
            for key in short {
                if batch.room == 0 || !self.admit(requests, key) {
                    break;
                }
                self.compute(key, batch);
            }
        }
        batch.room += rest;
        let under_way: Vec<Key> = self.prefilling.keys().copied().collect();
        for key in under_way {
            if batch.room == 0 {
                break;
            }
            if batch.prompts.iter().all(|(other, _)| *other != key) {
                self.compute(key, batch);
            }
        }
        while !preempted
            && batch.room > 0
            && let Some((&key, _)) = self.waiting.first_key_value()
            && self.admit(requests, key)
        {
            self.compute(key, batch);
        }
    }

    /// Chunks that the cache holds for a prompt for which there are a slot and blocks.
    fn fits(&self, request: &Request, prompt: &Prompt) -> Option<u32> {
        let n_running = self.n_running() as u64;
        if n_running >= u64::from(self.hardware.slots) {
            return None;
        }
        let headroom = if n_running == 0 { 0 } else { n_running + 1 };
        let hit = self.hit(request, prompt.known);
        let found = request.chunks[..hit as usize].iter();
        let cached = found.filter(|id| self.pool.is_cached(**id)).count() as u32;
        let own = self.blocks_for(prompt.known) - self.chunk_blocks(hit);
        let needed = own + self.chunk_blocks(cached);
        (needed + headroom <= self.pool.available()).then_some(hit)
    }

    fn admit(&mut self, requests: &[Request], key: Key) -> bool {
        let request = &requests[key];
        let Some(hit) = self.fits(request, &self.waiting[&key]) else {
            return false;
        };
        let Some(mut prompt) = self.waiting.remove(&key) else {
            return false;
        };
        for &id in &request.chunks[..hit as usize] {
            self.pool.hold(id);
        }
        let own = self.blocks_for(prompt.known) - self.chunk_blocks(hit);
        self.pool.take(own);
        self.backlog -= u64::from(prompt.known - prompt.done);
        prompt.chunks_held = hit;
        prompt.done = self.chunk_tokens(hit);
        self.backlog += u64::from(prompt.known - prompt.done);
        self.prefilling.insert(key, prompt);
        true
    }

    /// The next tokens of a prompt.
    fn compute(&mut self, key: Key, batch: &mut Batch) {
        let Some(prompt) = self.prefilling.get_mut(&key) else {
            return;
        };
        let n = (prompt.known - prompt.done).min(batch.room);
        if n == 0 {
            return;
        }
        batch.room -= n;
        batch.size.n_prompt += u64::from(n);
        let (n64, first) = (u64::from(n), u64::from(prompt.done));
        batch.size.n_pairs += n64 * first + n64 * n64 / 2;
        batch.prompts.push((key, n));
        prompt.done += n;
        self.backlog -= n64;
    }

    fn preempt_newest(&mut self, requests: &[Request]) {
        let decoding = self.decodes.sequences.last_key_value().map(|(&key, _)| key);
        let prefilling = self.prefilling.last_key_value().map(|(&key, _)| key);
        let Some(key) = decoding.max(prefilling) else {
            return;
        };
        self.counts.preemptions += 1;
        let known = match self.prefilling.remove(&key) {
            Some(prompt) => {
                self.backlog -= u64::from(prompt.known - prompt.done);
                self.let_go(&requests[key], prompt.known, prompt.chunks_held);
                Some(prompt)
            }
            None => self.stop_decoding(requests, key).map(|decode| {
                let steps = (self.decodes.n_steps - decode.since) as u32;
                Prompt {
                    known: decode.length + steps + 1,
                    done: 0,
                    generated: decode.generated + steps,
                    chunks_held: 0,
                    arrived_s: decode.arrived_s,
                }
            }),
        };
        if let Some(prompt) = known {
            let chunks_held = 0;
            self.queue(
                requests,
                key,
                Prompt {
                    chunks_held,
                    ..prompt
                },
            );
        }
    }

    fn bucket(&self, decode: &Decode) -> usize {
        let size = u64::from(self.hardware.block_size);
        // The step whose number is congruent to this writes the first token of a block.
        let remainder = (decode.since + size - u64::from(decode.length) % size) % size;
        remainder as usize
    }

    /// Takes a sequence out, with its blocks.
    fn stop_decoding(&mut self, requests: &[Request], key: Key) -> Option<Decode> {
        let decode = self.decodes.sequences.remove(&key)?;
        let steps = (self.decodes.n_steps - decode.since) as u32;
        let length = decode.length + steps;
        self.decodes.cached_tokens -= u64::from(length);
        let bucket = self.bucket(&decode);
        self.decodes.takes_block[bucket] -= 1;
        self.let_go(&requests[key], length, decode.chunks_held);
        Some(decode)
    }

    fn end_step(&mut self, requests: &[Request]) {
        let Some(step) = self.step.take() else { return };
        let computed = step.prompts.iter().map(|(_, n)| u64::from(*n));
        self.counts.prompt_tokens += computed.sum::<u64>();
        self.counts.generated += step.n_decodes;
        if step.n_decodes > 0 {
            self.decodes.cached_tokens += step.n_decodes;
            self.decodes.n_steps += 1;
        }
        while let Some(&Reverse((until, key))) = self.decodes.ends.peek()
            && until <= self.decodes.n_steps
        {
            self.decodes.ends.pop();
            // One that was preempted meanwhile ends later.
            if self
                .decodes
                .sequences
                .get(&key)
                .is_some_and(|d| d.until == until)
            {
                self.stop_decoding(requests, key);
                self.counts.ended += 1;
            }
        }
        for (key, _) in step.prompts {
            let is_complete = |prompt: &Prompt| prompt.done == prompt.known;
            if self.prefilling.get(&key).is_some_and(is_complete) {
                self.complete(requests, key, step.ends_s);
            }
        }
        if self.is_idle() {
            self.idle_since_s = step.ends_s;
        }
    }

    /// A prompt is in the cache, and its next token sampled.
    fn complete(&mut self, requests: &[Request], key: Key, now_s: f64) {
        let Some(prompt) = self.prefilling.remove(&key) else {
            return;
        };
        let request = &requests[key];
        let chunks_held = self.register(request, &prompt);
        if prompt.generated == 0 {
            self.first_tokens.push((key, now_s));
        }
        let generated = prompt.generated + 1;
        self.counts.generated += 1;
        let decode = Decode {
            length: prompt.known,
            since: self.decodes.n_steps,
            until: self.decodes.n_steps + u64::from(request.outputs.saturating_sub(generated)),
            generated,
            chunks_held,
            arrived_s: prompt.arrived_s,
        };
        if decode.until == decode.since {
            self.let_go(request, prompt.known, chunks_held);
            self.counts.ended += 1;
            return;
        }
        let bucket = self.bucket(&decode);
        self.decodes.takes_block[bucket] += 1;
        self.decodes.cached_tokens += u64::from(prompt.known);
        self.decodes.ends.push(Reverse((decode.until, key)));
        self.decodes.sequences.insert(key, decode);
    }

    /// Offers the chunks that were computed to the cache: those that it holds by now are kept once.
    fn register(&mut self, request: &Request, prompt: &Prompt) -> u32 {
        let n = (request.chunks.len() as u32).min(prompt.known / self.chunk_tokens(1));
        for &id in &request.chunks[prompt.chunks_held.min(n) as usize..n as usize] {
            self.pool.give(self.chunk_blocks(1));
            self.pool.hold(id);
        }
        n.max(prompt.chunks_held)
    }

    /// What it reports at `now_s`.
    #[must_use]
    pub fn report(&self, requests: &[Request], now_s: f64) -> LoadReport {
        let cached = self.pool.cached();
        let need = |(key, prompt): (&Key, &Prompt)| {
            let hit = self.hit(&requests[*key], prompt.known);
            self.blocks_for(prompt.known) - self.chunk_blocks(hit)
        };
        let oldest = self
            .waiting
            .values()
            .map(|p| p.arrived_s)
            .fold(now_s, f64::min);
        let decoding = self.decodes.sequences.values();
        let generated = decoding
            .map(|d| u64::from(d.generated) + self.decodes.n_steps - d.since)
            .sum();
        let counts = self.counts;
        LoadReport {
            schema: Some(SCHEMA),
            boot_id: Some(format!("boot-{}", self.boot)),
            heartbeat_age_ms: Some(0),
            draining: Some(false),
            blocks: Some(BlockCounts {
                block_size: self.hardware.block_size,
                total: self.hardware.blocks.into(),
                active: self.pool.active(),
                cached,
                free: self.pool.available().saturating_sub(cached),
                waiting_need: self.waiting.iter().map(need).sum(),
            }),
            page_demand: Some(PageDemand {
                per_sequence: Some(0),
                per_token_block: Some(1),
            }),
            slots: Some(SlotCounts {
                running: Some(self.n_running() as u64),
                limit: Some(self.hardware.slots.into()),
                generated_tokens: Some(generated),
            }),
            queue: Some(QueueCounts {
                running: self.n_running() as u64,
                waiting: self.n_waiting() as u64,
                waiting_limit: self.hardware.max_waiting.into(),
                oldest_waiting_ms: ((now_s - oldest) * 1e3) as u64,
            }),
            prefill_backlog_tokens: Some(self.backlog),
            preemptions: Some(counts.preemptions),
            totals: Some(TotalCounts {
                prompt_tokens: Some(counts.prompt_tokens),
                generated_tokens: Some(counts.generated),
                ended_sequences: Some(counts.ended),
            }),
            ..LoadReport::default()
        }
    }
}

/// A step being put together.
struct Batch {
    size: StepSize,
    room: u32,
    prompts: Vec<(Key, u32)>,
}

#[cfg(test)]
mod tests;
