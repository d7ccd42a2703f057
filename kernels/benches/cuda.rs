//! The CUDA kernels alone, on a real GPU: `cargo bench -p kvasir-kernels --features cuda --bench cuda`.
//!
//! One line of JSON a measurement: microseconds a launch, the median of several replays of a graph of many launches whose
//! pages, or weights, rotate so that nothing of use stays in the L2 cache. The shape is Llama-3.1-8B's: 32 query and 8 KV
//! heads of 128, hidden 4096, intermediate 14336, vocabulary 128256; the experts' is Qwen3-30B-A3B's: 128 of which a token
//! takes 8, hidden 2048, intermediate 768.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark ends where something fails"
)]

use std::time::Instant;

use kvasir_kernels::cuda::driver::{Driver, Gemm, GemmOutput, GemmShape};
use kvasir_kernels::cuda::gpu::Gpu;
use kvasir_kernels::cuda::kernel::{
    self, GatedActivationArgs, GroupByExpertArgs, GroupedGemmArgs, HeadDim, KvCache, NO_WINDOW,
    PARTITION, PagedDecodeArgs, PagedPrefillArgs, PrefillKind, PrefillTile, RmsNormArgs, SILU,
    SampleArgs, SampleRow, SplitKvSequence, SplitKvTile,
};

const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: usize = 128;
const BLOCK_SIZE: usize = 16;
const QKV: usize = (HEADS as usize + 2 * KV_HEADS as usize) * HEAD_DIM;
/// Launches in a graph.
const LAUNCHES: usize = 24;
const REPLAYS: usize = 9;
/// Pages are spread over this much.
const CACHE_BYTES: usize = 6 << 30;

fn main() {
    let mut gpu = Gpu::open().unwrap();
    let noise = gpu.allocate("noise", 1 << 30).unwrap();
    fill(&mut gpu, noise, 1 << 30);
    let cache = gpu.allocate("pages", CACHE_BYTES).unwrap();
    fill(&mut gpu, cache, CACHE_BYTES);
    for (batch, context) in [
        (1, 128),
        (1, 4096),
        (1, 4200),
        (1, 32768),
        (8, 4096),
        (64, 512),
        (64, 4096),
        (64, 16384),
        (256, 2048),
    ] {
        decode(&mut gpu, cache, noise, batch, context, NO_WINDOW);
    }
    decode(&mut gpu, cache, noise, 64, 4096, 1024);
    let mut chunk = |tokens, position, n_parts, window| {
        let chunk = Chunk {
            position,
            tokens,
            n_parts,
            window,
        };
        prefill(&mut gpu, cache, noise, chunk);
    };
    for tokens in [2048, 8192, 16384] {
        chunk(tokens, 0, 1, NO_WINDOW);
    }
    chunk(8192, 0, 1, 1024);
    for tokens in [64, 256, 512, 1024] {
        for n_parts in [1, 2, 4, 16] {
            chunk(tokens, 7168, n_parts, NO_WINDOW);
        }
    }
    for rows in [1, 8, 64, 256, 384, 448, 512, 2048] {
        for (what, inner, cols) in [
            ("qkv", 4096, QKV),
            ("output", 4096, 4096),
            ("gate_up", 4096, 28672),
            ("down", 14336, 4096),
            ("logits", 4096, 128_256),
        ] {
            gemm(&mut gpu, cache, noise, what, rows, inner, cols);
        }
    }
    for tokens in [1, 16, 64, 256, 2048, 8192] {
        experts(&mut gpu, cache, noise, tokens);
    }
    let logits = gpu.allocate("logits", 256 * 128_256 * 4).unwrap();
    fill_logits(&mut gpu, logits, 256);
    for rows in [1, 64, 256, 2048] {
        small(&mut gpu, noise, logits, rows);
    }
}

/// Small random bfloat16 numbers.
fn fill(gpu: &mut Gpu, to: u64, bytes: usize) {
    let row = 1 << 20;
    gpu.upload(to, bytes / row, row, &|r, out| {
        let mut state = (r as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for two in out.chunks_exact_mut(2) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let x = (state >> 40) as f32 / 8_388_608.0 - 1.0;
            two.copy_from_slice(&half::bf16::from_f32(x * 0.1).to_le_bytes());
        }
    })
    .unwrap();
}

/// Rows of logits as a model has them: bell-shaped, of standard deviation 2.
fn fill_logits(gpu: &mut Gpu, to: u64, rows: usize) {
    gpu.upload(to, rows, 128_256 * 4, &|r, out| {
        let mut state = (r as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut unit = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / 16_777_216.0
        };
        for four in out.chunks_exact_mut(4) {
            let sum: f32 = (0..12).map(|_| unit()).sum();
            four.copy_from_slice(&(2.0 * (sum - 6.0)).to_le_bytes());
        }
    })
    .unwrap();
}

fn send<T: bytemuck::Pod>(gpu: &mut Gpu, elements: &[T]) -> u64 {
    let bytes: &[u8] = bytemuck::cast_slice(elements);
    let address = gpu.allocate("arguments", bytes.len()).unwrap();
    gpu.upload(address, 1, bytes.len(), &|_, out| {
        out.copy_from_slice(bytes)
    })
    .unwrap();
    address
}

/// Microseconds of one call of `launch(i)`, `i` below [`LAUNCHES`].
fn time(gpu: &mut Gpu, mut launch: impl FnMut(&mut Gpu, usize)) -> f64 {
    for i in 0..LAUNCHES {
        launch(gpu, i);
    }
    gpu.synchronize_all().unwrap();
    gpu.begin_capture().unwrap();
    for i in 0..LAUNCHES {
        launch(gpu, i);
    }
    let graph = gpu.end_capture().unwrap();
    let mut times: Vec<f64> = (0..REPLAYS)
        .map(|_| {
            gpu.replay(&graph).unwrap();
            gpu.synchronize_all().unwrap();
            let begun = Instant::now();
            gpu.replay(&graph).unwrap();
            gpu.replay(&graph).unwrap();
            gpu.replay(&graph).unwrap();
            gpu.synchronize_all().unwrap();
            begun.elapsed().as_secs_f64() * 1e6 / (3 * LAUNCHES) as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[REPLAYS / 2]
}

/// Block tables of `sequences` rows over shuffled pages, a set of rows for each launch, and the sets that there are.
struct Pages {
    cache: KvCache,
    sets: usize,
}

fn pages(gpu: &mut Gpu, cache: u64, sequences: usize, context: usize) -> Pages {
    let block_bytes = 2 * KV_HEADS as usize * BLOCK_SIZE * HEAD_DIM * 2;
    let n_blocks = CACHE_BYTES / block_bytes;
    let width = context.div_ceil(BLOCK_SIZE);
    let sets = (n_blocks / (sequences * width)).clamp(1, LAUNCHES);
    let mut shuffled: Vec<u32> = (0..n_blocks as u32).collect();
    let mut state = 1_u64;
    for i in (1..n_blocks).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        shuffled.swap(i, ((state >> 33) % (i as u64 + 1)) as usize);
    }
    shuffled.truncate(sets * sequences * width);
    let tables = send(gpu, &shuffled);
    Pages {
        cache: KvCache {
            layer: cache.into(),
            tables: tables.into(),
            table_width: width as u32,
            block_size: BLOCK_SIZE as u32,
            block_size_magic: KvCache::magic(BLOCK_SIZE as u32),
            n_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM as u32,
            page_rows: 2 * KV_HEADS * BLOCK_SIZE as u32,
        },
        sets,
    }
}

fn decode(gpu: &mut Gpu, cache: u64, qkv: u64, batch: usize, context: usize, window: u32) {
    let size = HeadDim::new(HEAD_DIM).unwrap();
    let Pages { cache, sets } = pages(gpu, cache, batch, context);
    let first = (context as u32).saturating_sub(window) / PARTITION;
    let n_tiles = (context as u32).div_ceil(PARTITION) - first;
    let mut tiles = Vec::new();
    for set in 0..sets {
        for sequence in 0..batch {
            tiles.extend((first..first + n_tiles).map(|p| SplitKvTile {
                row: (set * batch + sequence) as u32,
                token: sequence as u32,
                length: context as u32,
                start: p * PARTITION,
            }));
        }
    }
    let sequences: Vec<SplitKvSequence> = (0..batch as u32)
        .map(|s| SplitKvSequence {
            token: s,
            first_tile: s * n_tiles,
            n_tiles,
            unused: 0,
        })
        .collect();
    let tiles_of_a_set = batch * n_tiles as usize;
    let (tiles, sequences) = (send(gpu, &tiles), send(gpu, &sequences));
    let out = gpu
        .allocate("out", batch * HEADS as usize * HEAD_DIM * 2)
        .unwrap();
    let partials = tiles_of_a_set * HEADS as usize;
    let partial_out = gpu
        .allocate("partial results", partials * HEAD_DIM * 4)
        .unwrap();
    let partial_softmax = gpu.allocate("partial sums", partials * 8).unwrap();
    let us = time(gpu, |gpu, i| {
        let args = PagedDecodeArgs {
            cache,
            out: out.into(),
            qkv: qkv.into(),
            tiles: (tiles + (i % sets * tiles_of_a_set * size_of::<SplitKvTile>()) as u64).into(),
            sequences: sequences.into(),
            partial_out: partial_out.into(),
            partial_softmax: partial_softmax.into(),
            out_stride: HEADS * HEAD_DIM as u32,
            qkv_stride: QKV as u32,
            n_heads: HEADS,
            window,
            scale_log2: 0.1275,
            tanh_scale: 0.0,
        };
        let split = kernel::paged_decode(
            tiles_of_a_set,
            HEADS,
            KV_HEADS,
            size,
            gpu.n_multiprocessors(),
        );
        // SAFETY: everything was allocated and filled above for this batch and context.
        unsafe {
            gpu.launch(split, &args).unwrap();
            if n_tiles > 1 {
                let combine = kernel::combine_split_kv(batch, n_tiles as usize, HEADS, size);
                gpu.launch(combine, &args).unwrap();
            }
        }
    });
    let what = if window == NO_WINDOW {
        "decode"
    } else {
        "decode in a window"
    };
    let seen = context.min(window as usize);
    let bytes = batch * seen * 2 * KV_HEADS as usize * HEAD_DIM * 2;
    println!(
        "{{\"what\": \"{what}\", \"batch\": {batch}, \"context\": {context}, \"us\": {us:.2}, \"gb_s\": {:.0}}}",
        bytes as f64 / us / 1e3
    );
}

/// A prefill chunk and how it is computed.
#[derive(Clone, Copy)]
struct Chunk {
    /// Tokens before it.
    position: usize,
    tokens: usize,
    /// Into which its keys are cut.
    n_parts: u32,
    window: u32,
}

fn prefill(gpu: &mut Gpu, cache: u64, qkv: u64, chunk: Chunk) {
    let Chunk {
        position,
        tokens,
        n_parts,
        window,
    } = chunk;
    let size = HeadDim::new(HEAD_DIM).unwrap();
    let n_keys = (position + tokens) as u32;
    let Pages { cache, .. } = pages(gpu, cache, 1, position + tokens);
    let rows = tokens as u32 * HEADS / KV_HEADS;
    let length = n_keys / n_parts / size.prefill_keys() * size.prefill_keys();
    let first_rows = (0..rows).step_by(size.prefill_rows() as usize).rev();
    let tiles: Vec<PrefillTile> = first_rows
        .flat_map(|first_row| {
            (0..n_parts).map(move |part| PrefillTile {
                row: 0,
                first_token: 0,
                n_tokens: tokens as u32,
                first_position: position as u32,
                first_row,
                first_key: part * length,
                end_key: match part + 1 {
                    next if next < n_parts => next * length,
                    _ => n_keys,
                },
                n_parts,
                first_partial: part,
            })
        })
        .collect();
    let n_tiles = tiles.len();
    let tiles = send(gpu, &tiles);
    let sequences: Vec<SplitKvSequence> = (0..tokens as u32)
        .map(|token| SplitKvSequence {
            token,
            first_tile: token * n_parts,
            n_tiles: n_parts,
            unused: 0,
        })
        .collect();
    let sequences = send(gpu, &sequences);
    let partials = tokens * n_parts as usize * HEADS as usize;
    let mut allocate = |what, bytes| gpu.allocate(what, bytes).unwrap();
    let partial_out = allocate("partial results", partials * HEAD_DIM * 4);
    let partial_softmax = allocate("partial sums", partials * 8);
    let out = allocate("out", tokens * HEADS as usize * HEAD_DIM * 2);
    let (what, kind) = match window {
        NO_WINDOW => ("prefill", PrefillKind::Causal),
        _ => ("prefill in a window", PrefillKind::Local),
    };
    let args = PagedPrefillArgs {
        cache,
        out: out.into(),
        qkv: qkv.into(),
        tiles: tiles.into(),
        partial_out: partial_out.into(),
        partial_softmax: partial_softmax.into(),
        out_stride: HEADS * HEAD_DIM as u32,
        qkv_stride: QKV as u32,
        n_heads: HEADS,
        window,
        scale_log2: 0.1275,
        tanh_scale: 0.0,
    };
    let merged = PagedDecodeArgs {
        sequences: sequences.into(),
        ..PagedDecodeArgs::like(&args)
    };
    let us = time(gpu, |gpu, _| {
        let launch = kernel::paged_prefill(n_tiles, KV_HEADS, size, kind);
        // SAFETY: everything was allocated and filled above for these tokens.
        unsafe {
            gpu.launch(launch, &args).unwrap();
            if n_parts > 1 {
                let combine = kernel::combine_split_kv(tokens, n_parts as usize, HEADS, size);
                gpu.launch(combine, &merged).unwrap();
            }
        }
    });
    let seen = (position + 1..=position + tokens).map(|n| n.min(window as usize));
    let pairs: usize = seen.sum();
    let flop = 2.0 * 2.0 * HEADS as f64 * HEAD_DIM as f64 * pairs as f64;
    println!(
        "{{\"what\": \"{what}\", \"tokens\": {tokens}, \"after\": {position}, \"parts\": {n_parts}, \"us\": {us:.2}, \"tflop_s\": {:.0}}}",
        flop / us / 1e6
    );
}

fn gemm(gpu: &mut Gpu, weights: u64, x: u64, what: &str, rows: usize, inner: usize, cols: usize) {
    let weight_bytes = inner * cols * 2;
    let sets = (CACHE_BYTES / weight_bytes).clamp(1, LAUNCHES);
    let kind = match what {
        "logits" => GemmOutput::F32,
        _ => GemmOutput::Bf16,
    };
    let out = gpu.allocate("out", rows * cols * kind.bytes()).unwrap();
    let us = time(gpu, |gpu, i| {
        let gemm = Gemm {
            out,
            x,
            weight: weights + (i % sets * weight_bytes) as u64,
            bias: None,
            shape: GemmShape {
                rows,
                inner,
                cols,
                x_stride: inner,
                weight_stride: inner,
                out_stride: cols,
                out: kind,
            },
        };
        gpu.gemm(&gemm).unwrap();
    });
    println!(
        "{{\"what\": \"gemm {what}\", \"rows\": {rows}, \"us\": {us:.2}, \"gb_s\": {:.0}, \"tflop_s\": {:.0}}}",
        weight_bytes as f64 / us / 1e3,
        2.0 * (rows * inner * cols) as f64 / us / 1e6
    );
}

/// The two products of a mixture of experts, with the sort before them; the routing is even.
fn experts(gpu: &mut Gpu, weights: u64, x: u64, tokens: usize) {
    const N_EXPERTS: usize = 128;
    const TOP_K: usize = 8;
    const HIDDEN: usize = 2048;
    const INTERMEDIATE: usize = 768;
    let n_pairs = tokens * TOP_K;
    let chosen: Vec<u32> = (0..n_pairs).map(|p| (p * 37 % N_EXPERTS) as u32).collect();
    let chosen = send(gpu, &chosen);
    let max_tiles = kernel::max_expert_tiles(n_pairs, N_EXPERTS);
    let pairs = gpu.allocate("pairs", n_pairs * 4).unwrap();
    let tiles = gpu.allocate("tiles", max_tiles * 16 + 16).unwrap();
    let n_tiles = gpu.allocate("tiles", 4).unwrap();
    let gate_up = gpu
        .allocate("gates", n_pairs * 2 * INTERMEDIATE * 2)
        .unwrap();
    let results = gpu.allocate("results", n_pairs * HIDDEN * 2).unwrap();
    let layer = N_EXPERTS * 3 * INTERMEDIATE * HIDDEN * 2;
    let sets = (CACHE_BYTES / layer).clamp(1, LAUNCHES);
    let group = GroupByExpertArgs {
        chosen: chosen.into(),
        pairs: pairs.into(),
        tiles: tiles.into(),
        n_tiles: n_tiles.into(),
        n_pairs: n_pairs as u32,
        n_experts: N_EXPERTS as u32,
    };
    let us = time(gpu, |gpu, i| {
        let set = weights + (i % sets * layer) as u64;
        let first = GroupedGemmArgs {
            out: gate_up.into(),
            x: x.into(),
            weight: set.into(),
            pairs: pairs.into(),
            tiles: tiles.into(),
            n_tiles: n_tiles.into(),
            out_stride: 2 * INTERMEDIATE as u32,
            x_stride: HIDDEN as u32,
            weight_stride: HIDDEN as u32,
            inner: HIDDEN as u32,
            cols: 2 * INTERMEDIATE as u32,
            pairs_per_token: TOP_K as u32,
        };
        let second = GroupedGemmArgs {
            out: results.into(),
            x: gate_up.into(),
            weight: (set + (N_EXPERTS * 2 * INTERMEDIATE * HIDDEN * 2) as u64).into(),
            out_stride: HIDDEN as u32,
            x_stride: 2 * INTERMEDIATE as u32,
            weight_stride: INTERMEDIATE as u32,
            inner: INTERMEDIATE as u32,
            cols: HIDDEN as u32,
            pairs_per_token: 0,
            ..first
        };
        // SAFETY: experts are below N_EXPERTS, for which everything was allocated above.
        unsafe {
            gpu.launch(kernel::group_by_expert(N_EXPERTS), &group)
                .unwrap();
            let launch = kernel::grouped_gemm(max_tiles, 2 * INTERMEDIATE);
            gpu.launch(launch, &first).unwrap();
            gpu.launch(kernel::grouped_gemm(max_tiles, HIDDEN), &second)
                .unwrap();
        }
    });
    let bytes = N_EXPERTS.min(n_pairs) * 3 * INTERMEDIATE * HIDDEN * 2;
    let flop = 2.0 * (n_pairs * 3 * INTERMEDIATE * HIDDEN) as f64;
    println!(
        "{{\"what\": \"experts\", \"rows\": {tokens}, \"us\": {us:.2}, \"gb_s\": {:.0}, \"tflop_s\": {:.0}}}",
        bytes as f64 / us / 1e3,
        flop / us / 1e6
    );
}

fn small(gpu: &mut Gpu, x: u64, logits: u64, rows: usize) {
    let report = |what: &str, bytes: usize, us: f64| {
        println!(
            "{{\"what\": \"{what}\", \"rows\": {rows}, \"us\": {us:.2}, \"gb_s\": {:.0}}}",
            bytes as f64 / us / 1e3
        );
    };
    let out = gpu.allocate("out", rows * 14336 * 2).unwrap();
    let residual = gpu.allocate("residual", rows * 4096 * 2).unwrap();
    let us = time(gpu, |gpu, _| {
        let args = RmsNormArgs {
            out: out.into(),
            residual: residual.into(),
            x: x.into(),
            weight: x.into(),
            cols: 4096,
            chunks: 512,
            out_stride: 4096,
            residual_stride: 4096,
            x_stride: 4096,
            epsilon: 1e-5,
        };
        // SAFETY: all areas hold `rows` rows.
        unsafe { gpu.launch(kernel::rms_norm(rows), &args) }.unwrap();
    });
    report("add_rms_norm", rows * 4096 * 2 * 4, us);
    let us = time(gpu, |gpu, _| {
        let args = GatedActivationArgs {
            out: out.into(),
            gate_up: x.into(),
            n: 14336,
            out_stride: 14336,
            in_stride: 28672,
            activation: SILU,
        };
        // SAFETY: all areas hold `rows` rows.
        unsafe { gpu.launch(kernel::gated_activation(rows, 14336), &args) }.unwrap();
    });
    report("gated_activation", rows * 14336 * 2 * 3, us);
    if rows > 256 {
        return;
    }
    let greedy = SampleRow {
        temperature: 0.0,
        top_p: 1.0,
        ln_min_p: f32::NEG_INFINITY,
        top_k: 0,
        seed: 0,
        output_index: 0,
        score: kernel::NO_SCORE,
        n_logprobs: -1,
        edited: kernel::NOT_EDITED,
        fallback: 0,
        unused: 0,
    };
    let random = SampleRow {
        temperature: 1.0,
        top_p: 0.9,
        ..greedy
    };
    for (what, row) in [("sample greedy", greedy), ("sample top-p", random)] {
        let asked = send(gpu, &vec![row; rows]);
        let room = rows * 4 * kernel::MAX_TOP as usize;
        let sampled = gpu.allocate("samples", room).unwrap();
        let us = time(gpu, |gpu, _| {
            let args = SampleArgs {
                logits: logits.into(),
                edited: logits.into(),
                rows: asked.into(),
                tokens: sampled.into(),
                logprobs: sampled.into(),
                top_ids: sampled.into(),
                top_logprobs: sampled.into(),
                vocabulary: 128_256,
                stride: 128_256,
            };
            // SAFETY: 256 rows of logits lie there; no log-probabilities are asked for.
            unsafe { gpu.launch(kernel::sample(rows), &args) }.unwrap();
        });
        report(what, rows * 128_256 * 4, us);
    }
}
