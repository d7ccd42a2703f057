//! The CUDA kernels alone, on a real GPU: `cargo bench -p kvasir-kernels --features cuda --bench cuda`.
//!
//! One line of JSON a measurement: microseconds a launch, the median of several replays of a graph of many launches whose
//! pages, or weights, rotate so that nothing of use stays in the L2 cache. The shape is Llama-3.1-8B's: 32 query and 8 KV
//! heads of 128, hidden 4096, intermediate 14336, vocabulary 128256.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark ends where something fails"
)]

use std::time::Instant;

use kvasir_kernels::cuda::driver::{Driver, Product, ProductShape};
use kvasir_kernels::cuda::gpu::Gpu;
use kvasir_kernels::cuda::kernel::{
    self, DecodeItem, DecodeSequence, HeadDim, KvCache, PARTITION, PagedDecodeArgs,
    PagedPrefillArgs, PrefillTile, RmsNormArgs, SampleArgs, SampleRow, SwigluArgs,
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
        (1, 32768),
        (8, 4096),
        (64, 512),
        (64, 4096),
        (64, 16384),
        (256, 2048),
    ] {
        decode(&mut gpu, cache, noise, batch, context);
    }
    for tokens in [2048, 8192, 16384] {
        prefill(&mut gpu, cache, noise, tokens);
    }
    for rows in [1, 8, 64, 256, 2048] {
        for (what, inner, cols) in [
            ("qkv", 4096, QKV),
            ("output", 4096, 4096),
            ("gate_up", 4096, 28672),
            ("down", 14336, 4096),
            ("logits", 4096, 128_256),
        ] {
            product(&mut gpu, cache, noise, what, rows, inner, cols);
        }
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
    gpu.synchronize().unwrap();
    gpu.begin_capture().unwrap();
    for i in 0..LAUNCHES {
        launch(gpu, i);
    }
    let graph = gpu.end_capture().unwrap();
    let mut times: Vec<f64> = (0..REPLAYS)
        .map(|_| {
            gpu.replay(&graph).unwrap();
            gpu.synchronize().unwrap();
            let begun = Instant::now();
            gpu.replay(&graph).unwrap();
            gpu.replay(&graph).unwrap();
            gpu.replay(&graph).unwrap();
            gpu.synchronize().unwrap();
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
            layer: cache,
            tables,
            table_width: width as u32,
            block_size: BLOCK_SIZE as u32,
            block_size_magic: KvCache::magic(BLOCK_SIZE as u32),
            n_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM as u32,
            unused: 0,
        },
        sets,
    }
}

fn decode(gpu: &mut Gpu, cache: u64, qkv: u64, batch: usize, context: usize) {
    let size = HeadDim::new(HEAD_DIM).unwrap();
    let Pages { cache, sets } = pages(gpu, cache, batch, context);
    let n_items = (context as u32).div_ceil(PARTITION);
    let mut items = Vec::new();
    for set in 0..sets {
        for sequence in 0..batch {
            items.extend((0..n_items).map(|i| DecodeItem {
                row: (set * batch + sequence) as u32,
                token: sequence as u32,
                length: context as u32,
                start: i * PARTITION,
            }));
        }
    }
    let sequences: Vec<DecodeSequence> = (0..batch as u32)
        .map(|s| DecodeSequence {
            token: s,
            first_item: s * n_items,
            n_items,
            unused: 0,
        })
        .collect();
    let items_of_a_set = batch * n_items as usize;
    let (items, sequences) = (send(gpu, &items), send(gpu, &sequences));
    let out = gpu
        .allocate("out", batch * HEADS as usize * HEAD_DIM * 2)
        .unwrap();
    let partials = items_of_a_set * HEADS as usize;
    let partial_out = gpu
        .allocate("partial results", partials * HEAD_DIM * 4)
        .unwrap();
    let partial_softmax = gpu.allocate("partial sums", partials * 8).unwrap();
    let us = time(gpu, |gpu, i| {
        let args = PagedDecodeArgs {
            cache,
            out,
            qkv,
            items: items + (i % sets * items_of_a_set * size_of::<DecodeItem>()) as u64,
            sequences,
            partial_out,
            partial_softmax,
            out_stride: HEADS * HEAD_DIM as u32,
            qkv_stride: QKV as u32,
            n_heads: HEADS,
            scale_log2: 0.1275,
        };
        let (name, split) = kernel::paged_decode(
            items_of_a_set,
            HEADS,
            KV_HEADS,
            size,
            gpu.n_multiprocessors(),
        );
        // SAFETY: everything was allocated and filled above for this batch and context.
        unsafe {
            gpu.launch(name, split, &args).unwrap();
            if n_items > 1 {
                let merge = kernel::merge_partitions(batch, n_items as usize, HEADS, size);
                gpu.launch("merge_partitions", merge, &args).unwrap();
            }
        }
    });
    let bytes = batch * context * 2 * KV_HEADS as usize * HEAD_DIM * 2;
    println!(
        "{{\"what\": \"decode\", \"batch\": {batch}, \"context\": {context}, \"us\": {us:.2}, \"gb_s\": {:.0}}}",
        bytes as f64 / us / 1e3
    );
}

fn prefill(gpu: &mut Gpu, cache: u64, qkv: u64, tokens: usize) {
    let size = HeadDim::new(HEAD_DIM).unwrap();
    let Pages { cache, .. } = pages(gpu, cache, 1, tokens);
    let rows = tokens as u32 * HEADS / KV_HEADS;
    let tiles: Vec<PrefillTile> = (0..rows)
        .step_by(size.prefill_rows() as usize)
        .rev()
        .map(|first_row| PrefillTile {
            row: 0,
            first_token: 0,
            n_tokens: tokens as u32,
            first_position: 0,
            first_row,
            unused: 0,
        })
        .collect();
    let n_tiles = tiles.len();
    let tiles = send(gpu, &tiles);
    let out = gpu
        .allocate("out", tokens * HEADS as usize * HEAD_DIM * 2)
        .unwrap();
    let us = time(gpu, |gpu, _| {
        let args = PagedPrefillArgs {
            cache,
            out,
            qkv,
            tiles,
            out_stride: HEADS * HEAD_DIM as u32,
            qkv_stride: QKV as u32,
            n_heads: HEADS,
            scale_log2: 0.1275,
        };
        // SAFETY: everything was allocated and filled above for these tokens.
        unsafe {
            gpu.launch(
                size.prefill(),
                kernel::paged_prefill(n_tiles, KV_HEADS, size),
                &args,
            )
        }
        .unwrap();
    });
    let flop =
        2.0 * 2.0 * HEADS as f64 * HEAD_DIM as f64 * tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    println!(
        "{{\"what\": \"prefill\", \"tokens\": {tokens}, \"us\": {us:.2}, \"tflop_s\": {:.0}}}",
        flop / us / 1e6
    );
}

fn product(
    gpu: &mut Gpu,
    weights: u64,
    x: u64,
    what: &str,
    rows: usize,
    inner: usize,
    cols: usize,
) {
    let weight_bytes = inner * cols * 2;
    let sets = (CACHE_BYTES / weight_bytes).clamp(1, LAUNCHES);
    let wide = what == "logits";
    let out = gpu
        .allocate("out", rows * cols * if wide { 4 } else { 2 })
        .unwrap();
    let us = time(gpu, |gpu, i| {
        let product = Product {
            out,
            x,
            weight: weights + (i % sets * weight_bytes) as u64,
            bias: None,
            shape: ProductShape {
                rows,
                inner,
                cols,
                x_stride: inner,
                weight_stride: inner,
                out_stride: cols,
                wide,
                biased: false,
            },
        };
        // SAFETY: the factors lie in what main filled, which is larger than any of them.
        unsafe { gpu.product(&product) }.unwrap();
    });
    println!(
        "{{\"what\": \"product {what}\", \"rows\": {rows}, \"us\": {us:.2}, \"gb_s\": {:.0}, \"tflop_s\": {:.0}}}",
        weight_bytes as f64 / us / 1e3,
        2.0 * (rows * inner * cols) as f64 / us / 1e6
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
            out,
            residual,
            x,
            weight: x,
            cols: 4096,
            chunks: 512,
            out_stride: 4096,
            residual_stride: 4096,
            x_stride: 4096,
            epsilon: 1e-5,
        };
        // SAFETY: all areas hold `rows` rows.
        unsafe { gpu.launch("rms_norm", kernel::rms_norm(rows), &args) }.unwrap();
    });
    report("add_rms_norm", rows * 4096 * 2 * 4, us);
    let us = time(gpu, |gpu, _| {
        let args = SwigluArgs {
            out,
            gate_up: x,
            n: 14336,
            out_stride: 14336,
            in_stride: 28672,
            unused: 0,
        };
        // SAFETY: all areas hold `rows` rows.
        unsafe { gpu.launch("swiglu", kernel::swiglu(rows, 14336), &args) }.unwrap();
    });
    report("swiglu", rows * 14336 * 2 * 3, us);
    if rows > 256 {
        return;
    }
    let greedy = SampleRow {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        output_index: 0,
        seed: [0; 2],
        score: kernel::DRAW,
        n_logprobs: -1,
    };
    let random = SampleRow {
        temperature: 1.0,
        top_p: 0.9,
        ..greedy
    };
    for (what, row) in [("sample greedy", greedy), ("sample top-p", random)] {
        let asked = send(gpu, &vec![row; rows]);
        let drawn = gpu.allocate("draws", rows * 4).unwrap();
        let us = time(gpu, |gpu, _| {
            let args = SampleArgs {
                logits,
                rows: asked,
                tokens: drawn,
                logprobs: drawn,
                top_ids: drawn,
                top_logprobs: drawn,
                vocabulary: 128_256,
                stride: 128_256,
            };
            // SAFETY: 256 rows of logits lie there; no log-probabilities are asked for.
            unsafe { gpu.launch("sample", kernel::sample(rows), &args) }.unwrap();
        });
        report(what, rows * 128_256 * 4, us);
    }
}
