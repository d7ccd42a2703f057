//! The arithmetic of sampling, the same on every device: from a row of logits to a token and its log-probabilities.
//!
//! Every step is either exact (comparisons, integers) or a fixed sequence of correctly rounded f32 operations
//! without fused multiply-add, so that another device (in CUDA C++: `__fmul_rn` and its kin) repeats it bit for bit.
//!
//! - Noise: Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (token / 4, output index, 0, 0), word
//!   `token % 4`. It depends on nothing else, so a sample is the same in every batch and on every device.
//! - Sample: the largest of `(logit - max) / temperature + Gumbel noise` over the kept tokens, ties to the lowest id.
//! - Kept tokens: min-p and top-k first, then top-p of what is left, all in the order of falling logits, ties by lowest id.
//!   The mass of top-p is summed in fixed point (2^-40): integers have one sum, whatever the order. Min-p keeps the tokens
//!   with `(logit - max) / temperature >= ln(min_p)`: rounding keeps the order, so it too is a cut in that of the logits.
//! - Edits ([`LogitsEdit`](crate::step::LogitsEdit)) come before all of it, on a copy of the row.
//! - Log-probabilities: log-softmax of the raw logits, its sum in the same fixed point.
//!
//! It knows one row at a time; NaN logits are never sampled.

mod edit;
mod math;
mod philox;

use crate::step::{LogitsRequest, LogitsRow, Sampled, SamplingParams};

pub use math::{exp, ln};
pub use philox::philox4x32_10;

/// Units of fixed-point mass in 1.
const MASS_ONE: f32 = (1u64 << 40) as f32;

/// Room for the candidates of one row, kept from row to row.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    keys: Vec<Key>,
    edited: Vec<f32>,
}

impl Scratch {
    /// Room for rows of `vocabulary` logits.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            keys: Vec::with_capacity(vocabulary),
            edited: Vec::with_capacity(vocabulary),
        }
    }
}

/// Samples from or scores one row of logits. The row is not empty.
pub fn sample_row(logits: &[f32], row: &LogitsRow, scratch: &mut Scratch) -> Sampled {
    let token = match &row.request {
        LogitsRequest::Sample {
            params,
            output_index,
            edit,
        } if edit.is_empty() => sample(logits, params, *output_index, scratch),
        LogitsRequest::Sample {
            params,
            output_index,
            edit,
        } => {
            let mut edited = std::mem::take(&mut scratch.edited);
            edit::edit_logits(logits, edit, &mut edited);
            let fallback = edit.first_allowed().unwrap_or(0);
            let token = sample_or(&edited, params, *output_index, fallback, scratch);
            scratch.edited = edited;
            token
        }
        LogitsRequest::Score { token } => *token,
    };
    let Some(n_top) = row.n_logprobs else {
        return Sampled {
            token,
            logprob: None,
            top: Vec::new(),
        };
    };
    let softmax = LogSoftmax::of(logits);
    let top = most_likely(logits, usize::from(n_top), scratch);
    Sampled {
        token,
        logprob: Some(softmax.at(logits[token as usize])),
        top: top
            .map(|id| (id, softmax.at(logits[id as usize])))
            .collect(),
    }
}

/// Samples a token from a row of logits; `output_index` is the generator's counter.
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    output_index: u32,
    scratch: &mut Scratch,
) -> u32 {
    sample_or(logits, params, output_index, 0, scratch)
}

/// The same, with the token where no logit is above negative infinity.
fn sample_or(
    logits: &[f32],
    params: &SamplingParams,
    output_index: u32,
    fallback: u32,
    scratch: &mut Scratch,
) -> u32 {
    let best = argmax(logits, fallback);
    let max = logits[best as usize];
    if params.temperature == 0.0 || !max.is_finite() {
        return best;
    }
    let noise = Noise {
        max,
        temperature: params.temperature,
        seed: params.seed,
        index: output_index,
    };
    let n_kept = params
        .top_k
        .map_or(logits.len(), |k| logits.len().min(k.get() as usize));
    let ln_min_p = ln_min_p(params.min_p);
    if n_kept == logits.len() && params.top_p == 1.0 && ln_min_p == f32::NEG_INFINITY {
        return noise.sample_from_all(logits);
    }
    scratch.keys.clear();
    // All of them where the least is negative infinity, even those that are no number: they are the last in order.
    let is_likely = |logit: f32| ln_min_p == f32::NEG_INFINITY || noise.scaled(logit) >= ln_min_p;
    scratch.keys.extend(
        logits
            .iter()
            .zip(0..)
            .filter(|(logit, _)| is_likely(**logit))
            .map(|(&logit, id)| Key::new(logit, id)),
    );
    let mut kept = &mut scratch.keys[..];
    if n_kept < kept.len() {
        kept.select_nth_unstable_by(n_kept - 1, |a, b| b.cmp(a));
        kept = &mut kept[..n_kept];
    }
    if params.top_p < 1.0 {
        kept = keep_top_p(kept, params.top_p, |id| noise.mass(logits[id as usize]));
    }
    noise.sample_from(logits, kept.iter().map(|key| key.id()))
}

/// The least `(logit - max) / temperature` that min-p keeps; negative infinity where it keeps all.
pub fn ln_min_p(min_p: f32) -> f32 {
    match min_p < f32::MIN_POSITIVE {
        true => f32::NEG_INFINITY,
        false => ln(min_p),
    }
}

/// The token of the largest logit, the lowest id among equals; `fallback` where none is above negative infinity.
fn argmax(logits: &[f32], fallback: u32) -> u32 {
    let mut best = (f32::NEG_INFINITY, fallback);
    for (&logit, id) in logits.iter().zip(0u32..) {
        if logit > best.0 {
            best = (logit, id);
        }
    }
    best.1
}

/// A token's place in the order of falling logits as one integer: larger is earlier, and among equals the lower id is
/// larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    fn new(logit: f32, id: u32) -> Self {
        if logit.is_nan() {
            return Self(u64::from(!id));
        }
        // Adding zero turns -0 into +0; then the sign decides how the bits order.
        let bits = (logit + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 {
            !bits
        } else {
            bits | 1 << 31
        };
        Self((u64::from(ordered) << 32) | u64::from(!id))
    }

    fn id(self) -> u32 {
        !(self.0 as u32)
    }
}

/// The smallest prefix, in falling order, whose mass reaches `top_p` of all the mass.
fn keep_top_p(keys: &mut [Key], top_p: f32, mass: impl Fn(u32) -> u64) -> &mut [Key] {
    let total: u64 = keys.iter().map(|&key| mass(key.id())).sum();
    // f32 to f64 is exact, and so is the product with a power of two: `top_p` to 32 binary places.
    let share = (f64::from(top_p) * 4_294_967_296.0) as u128;
    let wanted = u128::from(total) * share;
    let (mut sorted, mut sum) = (0, 0u64);
    while sorted < keys.len() {
        // Few tokens hold most of the mass: sort a front that grows, not the whole vocabulary.
        let front = (sorted.max(64) * 4).min(keys.len());
        if front < keys.len() {
            keys[sorted..].select_nth_unstable_by(front - sorted - 1, |a, b| b.cmp(a));
        }
        keys[sorted..front].sort_unstable_by(|a, b| b.cmp(a));
        for at in sorted..front {
            sum += mass(keys[at].id());
            if u128::from(sum) << 32 >= wanted {
                return &mut keys[..=at];
            }
        }
        sorted = front;
    }
    keys
}

/// The `n` most likely tokens, most likely first.
fn most_likely<'a>(
    logits: &[f32],
    n: usize,
    scratch: &'a mut Scratch,
) -> impl Iterator<Item = u32> + use<'a> {
    scratch.keys.clear();
    let n = n.min(logits.len());
    if n > 0 {
        scratch.keys.extend(
            logits
                .iter()
                .zip(0..)
                .map(|(&logit, id)| Key::new(logit, id)),
        );
        scratch.keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        scratch.keys[..n].sort_unstable_by(|a, b| b.cmp(a));
    }
    scratch.keys[..n].iter().map(|&key| key.id())
}

/// What turns the logits of one row into scores.
struct Noise {
    max: f32,
    temperature: f32,
    seed: u64,
    index: u32,
}

impl Noise {
    fn scaled(&self, logit: f32) -> f32 {
        (logit - self.max) / self.temperature
    }

    fn mass(&self, logit: f32) -> u64 {
        (exp(self.scaled(logit)) * MASS_ONE) as u64
    }

    fn words(&self, group: u32) -> [u32; 4] {
        philox4x32_10(
            [group, self.index, 0, 0],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    fn sample_from_all(&self, logits: &[f32]) -> u32 {
        let mut best = (f32::NEG_INFINITY, 0);
        for (group, four) in (0u32..).zip(logits.chunks(4)) {
            let words = self.words(group);
            for ((&logit, word), id) in four.iter().zip(words).zip(group * 4..) {
                let score = self.scaled(logit) + gumbel(word);
                if score > best.0 {
                    best = (score, id);
                }
            }
        }
        best.1
    }

    fn sample_from(&self, logits: &[f32], ids: impl Iterator<Item = u32>) -> u32 {
        let mut best = (f32::NEG_INFINITY, u32::MAX);
        for id in ids {
            let score =
                self.scaled(logits[id as usize]) + gumbel(self.words(id / 4)[(id % 4) as usize]);
            if score > best.0 || (score == best.0 && id < best.1) {
                best = (score, id);
            }
        }
        best.1
    }
}

/// A standard Gumbel variate from 23 random bits: `-ln(-ln(u))` with `u` in the middle of one of 2^23 equal parts of
/// (0, 1), so that neither logarithm sees 0 or 1.
pub fn gumbel(word: u32) -> f32 {
    let uniform = ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0);
    -ln(-ln(uniform))
}

struct LogSoftmax {
    max: f32,
    ln_sum: f32,
}

impl LogSoftmax {
    fn of(logits: &[f32]) -> Self {
        let max = logits[argmax(logits, 0) as usize];
        let sum: u64 = logits
            .iter()
            .map(|&logit| (exp(logit - max) * MASS_ONE) as u64)
            .sum();
        Self {
            max,
            ln_sum: ln(sum as f32 * (1.0 / MASS_ONE)),
        }
    }

    fn at(&self, logit: f32) -> f32 {
        (logit - self.max) - self.ln_sum
    }
}

#[cfg(test)]
mod tests;
