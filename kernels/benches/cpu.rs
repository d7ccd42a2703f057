//! The CPU device at the shape of a 1.1B Llama (random weights), against the limits of the machine, measured in the
//! same run: read bandwidth of 2 GB, and the arithmetic of one product that stays in the cache.
//!
//! `cargo bench -p kvasir-kernels --bench cpu -- [threads] [isa]`, e.g. `-- 2 avx512`.
#![allow(clippy::unwrap_used)]

#[path = "../tests/layer/forward.rs"]
mod forward;

use forward::{Buffers, Decoder, LayerWeights, Mlp, Widths};
use kvasir_kernels::cpu::{CpuDevice, Isa};
use kvasir_kernels::device::*;
use kvasir_kernels::shape::*;
use kvasir_kernels::step::*;
use kvasir_kernels::stored::*;
use std::num::NonZeroUsize;
use std::time::Instant;

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 5632;
const LAYERS: usize = 22;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 32_000;
const BLOCK: usize = 16;
const NUMERICS: Numerics = Numerics::uniform(Precision::BF16);

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"));
    let n_threads: usize = arguments.next().map_or(2, |n| n.parse().unwrap());
    let wanted = arguments.next().map(|name| name.to_lowercase());
    let isa = Isa::available(NUMERICS)
        .into_iter()
        .find(|isa| {
            wanted
                .as_ref()
                .is_none_or(|name| format!("{isa:?}").to_lowercase() == *name)
        })
        .expect("an instruction set of this machine");

    let bandwidth: Vec<f64> = (1..=n_threads).map(read_bandwidth).collect();
    for (n, bandwidth) in (1..).zip(&bandwidth) {
        println!("read bandwidth, {n} thread(s): {bandwidth:.1} GB/s");
    }
    let limit = *bandwidth.last().unwrap();
    let mut bench = Bench::new(n_threads, isa, None);
    println!("{}", bench.device.describe());
    let peak = bench.peak_flops();
    println!("products in the cache: {:.0} GFLOP/s", peak / 1e9);
    println!(
        "{:<30}{:>9}{:>10}{:>8}{:>10}{:>8}{:>11}",
        "step", "ms", "GB/s", "% read", "GFLOP/s", "% peak", "tokens/s"
    );
    let print = |name: &str, step: Measured| {
        let (read, flops) = (step.read_bytes / step.seconds, step.flops / step.seconds);
        println!(
            "{name:<30}{:>9.2}{:>10.1}{:>8.0}{:>10.0}{:>8.0}{:>11.1}",
            step.seconds * 1e3,
            read / 1e9,
            100.0 * read / 1e9 / limit,
            flops / 1e9,
            100.0 * flops / peak,
            step.tokens / step.seconds
        );
    };
    for (name, n_sequences, n_tokens, context) in [
        ("decode, batch 1", 1, 1, 128),
        ("decode, batch 8", 8, 1, 128),
        ("decode, batch 16", 16, 1, 128),
        ("prefill of 128", 1, 128, 0),
        ("prefill of 512", 1, 512, 0),
        ("decode, batch 1, at 2000", 1, 1, 2000),
    ] {
        print(name, bench.measure(n_sequences, n_tokens, context));
    }
    drop(bench);
    // The same weights as eight experts, of which a token takes two: one token reads a few, 512 read all.
    let mut bench = Bench::new(n_threads, isa, Some(8));
    for (name, n_tokens) in [
        ("experts: decode, batch 1", 1),
        ("experts: prefill of 512", 512),
    ] {
        print(name, bench.measure(1, n_tokens, 0));
    }
}

/// A step and what it did at least.
struct Measured {
    seconds: f64,
    tokens: f64,
    read_bytes: f64,
    flops: f64,
}

struct Bench {
    device: CpuDevice,
    table: Weight,
    norm: Vector,
    layers: Vec<LayerWeights>,
    buffers: Buffers,
    logits: Logits,
    /// Of all matrices that a step of many tokens reads.
    weight_bytes: f64,
    /// Of the matrices that a single token reads; also its FLOP, as bf16 has two bytes.
    token_bytes: f64,
}

/// Experts that a token takes, where there are any.
const TOP_K: usize = 2;

fn model_shape() -> ModelShape {
    let cache = CacheShape {
        n_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        window: None,
    };
    let caches = vec![cache; LAYERS];
    let layer = |i| AttentionShape {
        cache: CacheId(i),
        n_heads: HEADS,
        rope: Some(RopeId(0)),
        scale: 0.125,
        soft_cap: None,
    };
    ModelShape {
        vocab_size: VOCABULARY,
        max_positions: 2048,
        block_size: BLOCK,
        limits: Limits {
            max_tokens: 512,
            max_sequences: 16,
            max_logits_rows: 16,
            max_blocks_per_sequence: 2048 / BLOCK,
        },
        ropes: vec![Rope {
            inverse_frequencies: (0..HEAD_DIM / 2)
                .map(|i| 1e4f32.powf(-(i as f32) / 32.0))
                .collect(),
            scale: 1.0,
        }],
        groups: cache_groups(&caches),
        layers: (0..LAYERS as u32).map(layer).collect(),
        caches,
    }
}

impl Bench {
    /// `n_experts` of them share the intermediate size, where there are any.
    fn new(n_threads: usize, isa: Isa, n_experts: Option<usize>) -> Self {
        let options = DeviceOptions {
            numerics: NUMERICS,
            memory_limit: None,
        };
        let n_threads = NonZeroUsize::new(n_threads).unwrap();
        let mut device = CpuDevice::with_isa(options, n_threads, isa).unwrap();
        device.add_model(&model_shape()).unwrap();
        let bytes: Vec<u8> = (0..VOCABULARY * HIDDEN)
            .scan(1u32, |state, _| {
                *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                Some(half::bf16::from_f32(
                    ((*state >> 8) as f32 / 8_388_608.0 - 1.0) * 0.03,
                ))
            })
            .flat_map(half::bf16::to_le_bytes)
            .collect();
        let mut weight_bytes = 0;
        let mut weight = |rows: usize, cols: usize| {
            weight_bytes += rows * cols * 2;
            let view = TensorView {
                dtype: Dtype::BF16,
                shape: [rows, cols],
                bytes: &bytes[..rows * cols * 2],
            };
            device.prepare_weight(&[view.into()]).unwrap()
        };
        let widths = Widths {
            hidden: HIDDEN,
            n_heads: HEADS,
            n_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            intermediate: INTERMEDIATE,
            n_experts: n_experts.unwrap_or(1),
        };
        let table = weight(VOCABULARY, HIDDEN);
        let inner = INTERMEDIATE / widths.n_experts;
        let weights: Vec<[Weight; 5]> = (0..LAYERS)
            .map(|_| {
                [
                    weight(widths.qkv(), HIDDEN),
                    weight(HIDDEN, widths.heads()),
                    weight(2 * INTERMEDIATE, HIDDEN),
                    weight(widths.n_experts * HIDDEN, inner),
                    weight(widths.n_experts, HIDDEN),
                ]
            })
            .collect();
        let mlp_bytes = LAYERS * 3 * INTERMEDIATE * HIDDEN * 2;
        let read_by_token = n_experts.map_or(mlp_bytes, |n| mlp_bytes * TOP_K / n);
        let token_bytes = (weight_bytes - mlp_bytes + read_by_token) as f64;
        let weight_bytes = weight_bytes as f64;
        let layers = weights.into_iter().map(|[qkv, o, gate_up, down, router]| {
            let mlp = match n_experts {
                None => Mlp::Dense { gate_up, down },
                Some(n_experts) => {
                    let shape = ExpertsShape {
                        gate_up,
                        down,
                        n_experts,
                        top_k: TOP_K,
                        renormalize: true,
                        activation: Activation::Silu,
                    };
                    let experts = device.plan_experts(&shape).unwrap();
                    Mlp::Experts { router, experts }
                }
            };
            LayerWeights {
                qkv,
                bias: None,
                o,
                mlp,
            }
        });
        let layers = layers.collect();
        let ones: Vec<u8> = (0..HIDDEN).flat_map(|_| 1f32.to_le_bytes()).collect();
        let norm = TensorView {
            dtype: Dtype::F32,
            shape: [1, HIDDEN],
            bytes: &ones,
        };
        let norm = device.prepare_vector(&[norm], 0.0).unwrap();
        let buffers = Buffers::plan(&mut device, widths).unwrap();
        let logits = device.plan_logits().unwrap();
        device.allocate_kv(2048).unwrap();
        Self {
            device,
            table,
            norm,
            layers,
            buffers,
            logits,
            weight_bytes,
            token_bytes,
        }
    }

    /// The median of steps of `n_sequences` with `n_tokens` each, from position `context` on.
    fn measure(&mut self, n_sequences: usize, n_tokens: usize, context: usize) -> Measured {
        let mut input = StepInput::default();
        for sequence in 0..n_sequences as u32 {
            let n_blocks = (context + n_tokens).div_ceil(BLOCK) as u32;
            let blocks = (0..n_blocks)
                .map(|i| BlockId((sequence * 128 + i * 37 % 128) % 2048))
                .collect();
            input.table_updates.push(TableUpdate {
                group: 0,
                row: TableRow(sequence),
                first: 0,
                blocks,
            });
            input.spans.push(Span {
                row: TableRow(sequence),
                first_token: input.tokens.len() as u32,
                n_tokens: n_tokens as u32,
                first_position: context as u32,
            });
            input
                .tokens
                .extend((0..n_tokens as u32).map(|t| TokenInput::Id(t * 7 + sequence)));
            input.logits.push(input.tokens.len() as u32 - 1);
        }
        let tokens = (n_sequences * n_tokens) as f64;
        Measured {
            seconds: median(9, || self.step(&input)),
            tokens,
            read_bytes: if tokens > 1.0 {
                self.weight_bytes
            } else {
                self.token_bytes
            },
            flops: tokens * self.token_bytes,
        }
    }

    fn step(&mut self, input: &StepInput) {
        let decoder = Decoder {
            table: self.table,
            embedding_scale: 1.0,
            norm: self.norm,
            head_norms: None,
            activation: Activation::Silu,
            layers: &self.layers,
            buffers: self.buffers,
            logits: self.logits,
        };
        let greedy = LogitsRow {
            request: LogitsRequest::Sample {
                params: SamplingParams::GREEDY,
                output_index: 0,
                edit: LogitsEdit::default(),
            },
            n_logprobs: None,
        };
        let device = &mut self.device;
        let ticket = device.submit(input, &|ops| decoder.forward(ops)).unwrap();
        let requests = vec![greedy; input.logits.len()];
        device.sample(&ticket, self.logits, &requests).unwrap();
        device.collect(ticket).unwrap();
    }

    /// One 2048 x 2048 product, again and again: what the kernels reach when no weight comes from memory.
    fn peak_flops(&mut self) -> f64 {
        const REPEATS: usize = 20;
        let Buffers { normed, delta, .. } = self.buffers;
        let weight = self.layers[0].o;
        let input = StepInput {
            tokens: vec![TokenInput::Id(1); 480],
            table_updates: vec![TableUpdate {
                group: 0,
                row: TableRow(0),
                first: 0,
                blocks: (0..30).map(BlockId).collect(),
            }],
            spans: vec![Span {
                row: TableRow(0),
                first_token: 0,
                n_tokens: 480,
                first_position: 0,
            }],
            ..StepInput::default()
        };
        let device = &mut self.device;
        let seconds = median(9, || {
            let ticket = device
                .submit(&input, &|ops| {
                    (0..REPEATS).for_each(|_| ops.matmul(delta, normed, weight, None))
                })
                .unwrap();
            device.collect(ticket).unwrap();
        });
        (2 * 480 * HIDDEN * HIDDEN * REPEATS) as f64 / seconds
    }
}

fn median(n: usize, mut run: impl FnMut()) -> f64 {
    run();
    let mut seconds: Vec<f64> = (0..n)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[n / 2]
}

/// The best of several reads of 2 GB, in GB/s.
fn read_bandwidth(n_threads: usize) -> f64 {
    let words = vec![1u64; 1 << 28];
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let parts = words
                .chunks(words.len() / n_threads)
                .map(|part| scope.spawn(move || sum_of(part)));
            parts
                .collect::<Vec<_>>()
                .into_iter()
                .map(|part| part.join().unwrap())
                .sum()
        });
        assert_eq!(sum, words.len() as u64);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (words.len() * 8) as f64 / best / 1e9
}

fn sum_of(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has AVX-512.
        return unsafe { sum_avx512(words) };
    }
    words.iter().sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 8];
    let (chunks, rest) = words.as_chunks::<64>();
    for chunk in chunks {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: eight vectors of eight words are the chunk's 64; prefetching reads nothing.
            unsafe {
                let at = chunk.as_ptr().add(8 * i);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(512).cast());
                *sum = _mm512_add_epi64(*sum, _mm512_loadu_si512(at.cast()));
            }
        }
    }
    let all = sums
        .into_iter()
        .map(|sum| _mm512_reduce_add_epi64(sum) as u64)
        .sum::<u64>();
    all + rest.iter().sum::<u64>()
}
