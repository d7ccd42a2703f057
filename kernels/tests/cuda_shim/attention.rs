//! RoPE with the append, decode and prefill over a paged cache whose blocks are shuffled and whose unused slots are NaN.

use crate::shim::{Noise, address, assert_near, launch, value};
use kvasir_kernels::cuda::kernel::{
    self, HEAD_DIMS, HeadDim, INERT, In, KvCache, NO_WINDOW, PARTITION, PagedDecodeArgs,
    PagedPrefillArgs, PrefillKind, PrefillTile, RopeAppendArgs, SplitKvSequence, SplitKvTile,
};

/// What a query sees, and how scores are capped.
#[derive(Clone, Copy, Debug)]
struct Local {
    window: u32,
    soft_cap: Option<f32>,
}

const GLOBAL: Local = Local {
    window: NO_WINDOW,
    soft_cap: None,
};

impl Local {
    fn first_visible(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window as usize)
    }

    /// `scale_log2` and `tanh_scale`.
    fn scales(&self) -> (f32, f32) {
        let log2_e = std::f32::consts::LOG2_E;
        match self.soft_cap {
            Some(cap) => (cap * log2_e, SCALE / cap),
            None => (SCALE * log2_e, 0.0),
        }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
}

/// Rows of heads before the layer's first page.
const FIRST_ROW: usize = 1;

impl Shape {
    /// Rows from page to page, what belongs to other layers among them.
    fn page_rows(&self) -> usize {
        2 * self.n_kv_heads * self.block_size + 3
    }
}

/// Sequences of some lengths, paged: the tables, and the cache with only their tokens written. Between pages, and before
/// the first, lies what belongs to other layers.
struct PagedSequences {
    shape: Shape,
    table_width: usize,
    tables: Vec<u32>,
    cache: Vec<u16>,
}

impl PagedSequences {
    fn new(shape: Shape, lengths: &[usize], noise: &mut Noise) -> Self {
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let table_width = longest.div_ceil(shape.block_size).max(1);
        let n_blocks = lengths.len() * table_width;
        let mut world = Self {
            shape,
            table_width,
            tables: noise.permutation(n_blocks),
            cache: vec![0xffff; n_blocks * shape.page_rows() * shape.head_dim],
        };
        for (row, &length) in lengths.iter().enumerate() {
            for (position, head) in
                (0..length).flat_map(|p| (0..shape.n_kv_heads).map(move |h| (p, h)))
            {
                for part in 0..2 {
                    let at = world.at(row, position, head, part);
                    world.cache[at..][..shape.head_dim]
                        .copy_from_slice(&noise.bf16s(shape.head_dim));
                }
            }
        }
        world
    }

    /// Index of a key (`part` 0) or value (1): `[block][K|V][kv head][slot][dim]`.
    fn at(&self, row: usize, position: usize, head: usize, part: usize) -> usize {
        let Shape {
            n_kv_heads,
            head_dim,
            block_size,
            ..
        } = self.shape;
        let block = self.tables[row * self.table_width + position / block_size] as usize;
        let in_page = (part * n_kv_heads + head) * block_size + position % block_size;
        (FIRST_ROW + block * self.shape.page_rows() + in_page) * head_dim
    }

    /// Makes NaN of what a query at `position` does not see.
    fn forget_before(&mut self, row: usize, position: usize, local: Local) {
        for p in 0..local.first_visible(position) {
            for (head, part) in (0..self.shape.n_kv_heads).flat_map(|h| [(h, 0), (h, 1)]) {
                let at = self.at(row, p, head, part);
                self.cache[at..][..self.shape.head_dim].fill(0xffff);
            }
        }
    }

    fn argument(&mut self) -> KvCache {
        KvCache {
            layer: address(self.cache[FIRST_ROW * self.shape.head_dim..].as_mut_ptr()),
            tables: address(self.tables.as_ptr()),
            table_width: self.table_width as u32,
            block_size: self.shape.block_size as u32,
            block_size_magic: KvCache::magic(self.shape.block_size as u32),
            n_kv_heads: self.shape.n_kv_heads as u32,
            head_dim: self.shape.head_dim as u32,
            page_rows: self.shape.page_rows() as u32,
        }
    }

    /// Attention of one token's query heads, in f64.
    fn attend(&self, row: usize, position: usize, queries: &[u16], local: Local) -> Vec<f64> {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.shape;
        let mut out = Vec::new();
        for (h, query) in queries.chunks(head_dim).take(n_heads).enumerate() {
            let vector = |p, part| {
                let at = self.at(row, p, h / (n_heads / n_kv_heads), part);
                self.cache[at..][..head_dim].iter().map(|&x| value(x))
            };
            let seen = local.first_visible(position)..=position;
            let scores: Vec<f64> = seen
                .clone()
                .map(|p| {
                    let products = query.iter().zip(vector(p, 0)).map(|(&q, k)| value(q) * k);
                    let score = products.sum::<f64>() * f64::from(SCALE);
                    local.soft_cap.map_or(score, |cap| {
                        f64::from(cap) * (score / f64::from(cap)).tanh()
                    })
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut mean = vec![0.0; head_dim];
            for (p, score) in seen.zip(&scores) {
                let share = (score - max).exp() / sum;
                mean.iter_mut()
                    .zip(vector(p, 1))
                    .for_each(|(m, v)| *m += share * v);
            }
            out.extend(mean);
        }
        out
    }

    /// Attends for (row, token, length), each cut into its partitions.
    fn decode(
        &mut self,
        sequences: &[[usize; 3]],
        qkv: &[u16],
        local: Local,
        n_multiprocessors: u32,
        seed: u64,
    ) -> Vec<u16> {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.shape;
        let qkv_stride = (n_heads + 2 * n_kv_heads) * head_dim;
        let n_tokens = qkv.len() / qkv_stride;
        let mut out = vec![0xffff_u16; n_tokens * n_heads * head_dim];
        let (mut tiles, mut combined) = (Vec::new(), Vec::new());
        for &[row, token, length] in sequences {
            let first = local.first_visible(length.max(1) - 1) as u32 / PARTITION;
            let partitions = first..(length as u32).div_ceil(PARTITION);
            combined.push(SplitKvSequence {
                token: token as u32,
                first_tile: tiles.len() as u32,
                n_tiles: partitions.len() as u32,
                unused: 0,
            });
            // An inert one has a tile too, as padding has.
            let listed = first..partitions.end.max(first + 1);
            tiles.extend(listed.map(|p| SplitKvTile {
                row: row as u32,
                token: token as u32,
                length: length as u32,
                start: p * PARTITION,
            }));
        }
        let n_partials = tiles.len() * n_heads;
        let (scale_log2, tanh_scale) = local.scales();
        let mut partial_out = vec![f32::NAN; n_partials * head_dim];
        let mut partial_softmax = vec![f32::NAN; n_partials * 2];
        let args = PagedDecodeArgs {
            cache: self.argument(),
            out: address(out.as_mut_ptr()),
            qkv: address(qkv.as_ptr()),
            tiles: address(tiles.as_ptr()),
            sequences: address(combined.as_ptr()),
            partial_out: address(partial_out.as_mut_ptr()),
            partial_softmax: address(partial_softmax.as_mut_ptr()),
            out_stride: (n_heads * head_dim) as u32,
            qkv_stride: qkv_stride as u32,
            n_heads: n_heads as u32,
            window: local.window,
            scale_log2,
            tanh_scale,
        };
        let size = HeadDim::new(head_dim).unwrap();
        let (heads, kv_heads) = (n_heads as u32, n_kv_heads as u32);
        let split = kernel::paged_decode(tiles.len(), heads, kv_heads, size, n_multiprocessors);
        let most = combined.iter().map(|s| s.n_tiles as usize).max();
        let combine = kernel::combine_split_kv(combined.len(), most.unwrap_or(0), heads, size);
        // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
        unsafe {
            launch(split, seed, &args);
            launch(combine, seed, &args);
        }
        out
    }

    /// Spans of (row, first token, tokens, first position).
    fn prefill(
        &mut self,
        spans: &[[usize; 4]],
        qkv: &[u16],
        local: Option<Local>,
        seed: u64,
    ) -> Vec<u16> {
        self.prefill_in_parts(spans, &[], qkv, local, seed)
    }

    /// The same, the keys of each span cut at some positions before it.
    fn prefill_in_parts(
        &mut self,
        spans: &[[usize; 4]],
        cuts: &[u32],
        qkv: &[u16],
        local: Option<Local>,
        seed: u64,
    ) -> Vec<u16> {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.shape;
        let size = HeadDim::new(head_dim).unwrap();
        let group = n_heads / n_kv_heads;
        let qkv_stride = (n_heads + 2 * n_kv_heads) * head_dim;
        let mut out = vec![0xffff_u16; qkv.len() / qkv_stride * n_heads * head_dim];
        let (scale_log2, tanh_scale) = local.unwrap_or(GLOBAL).scales();
        let kind = local.map_or(PrefillKind::Causal, |_| PrefillKind::Local);
        let n_parts = cuts.len() + 1;
        let (mut tiles, mut combined) = (Vec::new(), Vec::new());
        for &[row, first_token, n_tokens, first_position] in spans {
            let first_partial = (combined.len() * n_parts) as u32;
            combined.extend((0..n_tokens as u32).map(|i| SplitKvSequence {
                token: first_token as u32 + i,
                first_tile: first_partial + i * n_parts as u32,
                n_tiles: n_parts as u32,
                unused: 0,
            }));
            let rows = (0..n_tokens * group).step_by(size.prefill_rows() as usize);
            tiles.extend(rows.flat_map(|first_row| {
                (0..n_parts).map(move |part| PrefillTile {
                    row: row as u32,
                    first_token: first_token as u32,
                    n_tokens: n_tokens as u32,
                    first_position: first_position as u32,
                    first_row: first_row as u32,
                    first_key: part.checked_sub(1).map_or(0, |before| cuts[before]),
                    end_key: match cuts.get(part) {
                        Some(&cut) => cut,
                        None => (first_position + n_tokens) as u32,
                    },
                    n_parts: n_parts as u32,
                    first_partial: first_partial + part as u32,
                })
            }));
        }
        let n_partials = combined.len() * n_parts * n_heads;
        let mut partial_out = vec![f32::NAN; n_partials * head_dim];
        let mut partial_softmax = vec![f32::NAN; n_partials * 2];
        let args = PagedPrefillArgs {
            cache: self.argument(),
            out: address(out.as_mut_ptr()),
            qkv: address(qkv.as_ptr()),
            tiles: address(tiles.as_ptr()),
            partial_out: address(partial_out.as_mut_ptr()),
            partial_softmax: address(partial_softmax.as_mut_ptr()),
            out_stride: (n_heads * head_dim) as u32,
            qkv_stride: qkv_stride as u32,
            n_heads: n_heads as u32,
            window: local.unwrap_or(GLOBAL).window,
            scale_log2,
            tanh_scale,
        };
        let grid = kernel::paged_prefill(tiles.len(), n_kv_heads as u32, size, kind);
        let merged = PagedDecodeArgs {
            sequences: address(combined.as_ptr()),
            ..PagedDecodeArgs::like(&args)
        };
        let combine = kernel::combine_split_kv(combined.len(), n_parts, args.n_heads, size);
        // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
        unsafe {
            launch(grid, seed, &args);
            launch(combine, seed, &merged);
        }
        out
    }
}

const SCALE: f32 = 0.25;

/// Values are within [-1, 1]: weights rounded to bfloat16 move a mean of them by at most 2^-8, the rounding of the result
/// moves it by at most 2^-9, and the rest is for f32 sums.
const TOLERANCE: f64 = 1.5 / 256.0 + 1e-4;

fn shapes() -> impl Iterator<Item = Shape> {
    // (query heads, kv heads, block size): grouped; one head; as many kv heads; a group over two tiles.
    let heads = [
        (8, 2, 16),
        (1, 1, 8),
        (3, 3, 128),
        (33, 1, 24),
        (4, 1, 64),
        (6, 2, 8),
    ];
    HEAD_DIMS
        .into_iter()
        .zip(heads)
        .map(|(head_dim, (n_heads, n_kv_heads, block_size))| Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            block_size,
        })
}

#[test]
fn decode_is_close_and_the_same_alone_and_in_a_crowd() {
    let mut noise = Noise(10);
    for shape in shapes() {
        // The last has so many partitions that groups of threads share them.
        let lengths = [1, 2, 16, 17, 255, 256, 257, 700, 17 * 256 + 3];
        let mut world = PagedSequences::new(shape, &lengths, &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(lengths.len() * stride);
        let mut sequences: Vec<[usize; 3]> = lengths
            .iter()
            .enumerate()
            .map(|(i, &length)| [i, i, length])
            .collect();
        sequences.push([0, 0, 0]);
        let out = world.decode(&sequences, &qkv, GLOBAL, 1, 1);
        for (i, &length) in lengths.iter().enumerate() {
            let want = world.attend(i, length - 1, &qkv[i * stride..], GLOBAL);
            let got = &out[i * want.len()..][..want.len()];
            let why = format!("decode, head size {}, length {length}", shape.head_dim);
            assert_near(&why, got, &want, |_| TOLERANCE);
            let alone = world.decode(&sequences[i..=i], &qkv, GLOBAL, 1000, 2);
            assert_eq!(&alone[i * want.len()..][..want.len()], got, "{why}: alone");
        }
    }
}

#[test]
fn prefill_is_close_and_the_same_in_chunks() {
    let mut noise = Noise(11);
    for shape in shapes() {
        let lengths = [1, 70, 150];
        let mut world = PagedSequences::new(shape, &lengths, &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(lengths.iter().sum::<usize>() * stride);
        let width = shape.n_heads * shape.head_dim;
        let spans = [[0, 0, 1, 0], [1, 1, 70, 0], [2, 71, 150, 0]];
        let out = world.prefill(&spans, &qkv, None, 1);
        let unmasked = world.prefill(&spans, &qkv, Some(GLOBAL), 3);
        assert_eq!(unmasked, out, "head size {}: no window", shape.head_dim);
        let mut token = 0;
        for (row, &length) in lengths.iter().enumerate() {
            for position in 0..length {
                // Every position near the tiles' edges, few of the others: the oracle is slow.
                if [0, 1, 31, 32, 63, 64, 65, 127, 128, 149].contains(&position)
                    || position == length - 1
                {
                    let want = world.attend(row, position, &qkv[token * stride..], GLOBAL);
                    let why = format!(
                        "prefill, head size {}, position {position} of {length}",
                        shape.head_dim
                    );
                    assert_near(&why, &out[token * width..][..width], &want, |_| TOLERANCE);
                }
                token += 1;
            }
        }
        let chunked = world.prefill(
            &[
                [2, 71, 5, 0],
                [2, 76, 60, 5],
                [1, 1, 70, 0],
                [2, 136, 85, 65],
            ],
            &qkv,
            None,
            2,
        );
        assert_eq!(
            chunked[width..],
            out[width..],
            "head size {}: chunks",
            shape.head_dim
        );
    }
}

#[test]
fn keys_in_parts_are_close_to_f64() {
    let mut noise = Noise(15);
    for shape in shapes() {
        // Two spans: the parts of the one lie behind those of the other.
        let mut world = PagedSequences::new(shape, &[300, 275], &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(60 * stride);
        let width = shape.n_heads * shape.head_dim;
        let spans = [[0, 0, 40, 260], [1, 40, 20, 255]];
        let whole = world.prefill(&spans, &qkv, None, 1);
        let out = world.prefill_in_parts(&spans, &[64, 192], &qkv, None, 2);
        assert_ne!(out, whole, "the sums are of another order");
        for [row, first_token, n_tokens, first_position] in spans {
            for i in [0, 1, 5, n_tokens - 1] {
                let token = first_token + i;
                let want = world.attend(row, first_position + i, &qkv[token * stride..], GLOBAL);
                let why = format!("head size {}, token {token}", shape.head_dim);
                assert_near(&why, &out[token * width..][..width], &want, |_| TOLERANCE);
            }
        }
        // What decodes give too: the same keys, cut elsewhere.
        let sequences: Vec<[usize; 3]> = (0..40).map(|i| [0, i, 261 + i]).collect();
        let decoded = world.decode(&sequences, &qkv, GLOBAL, 1, 3);
        for (got, want) in out[..40 * width].iter().zip(&decoded) {
            assert!((value(*got) - value(*want)).abs() < 2.0 * TOLERANCE);
        }
    }
}

/// A window that begins inside a tile, at a tile's edge, at a partition's edge, one that holds itself alone, and caps.
fn locals() -> [Local; 5] {
    let local = |window, soft_cap| Local { window, soft_cap };
    [
        local(1, None),
        local(37, Some(0.5)),
        local(256, None),
        local(300, Some(2.0)),
        local(NO_WINDOW, Some(1.0)),
    ]
}

#[test]
fn windows_and_caps_hold_in_decodes() {
    let mut noise = Noise(13);
    for (i, shape) in shapes().enumerate() {
        // Every head size with two of them, every one of them with two head sizes at least.
        for local in [locals()[i % 5], locals()[(i + 2) % 5]] {
            let lengths = [1, 16, 37, 38, 256, 257, 555, 800];
            let mut world = PagedSequences::new(shape, &lengths, &mut noise);
            let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
            let qkv = noise.bf16s(lengths.len() * stride);
            for (row, &length) in lengths.iter().enumerate() {
                world.forget_before(row, length - 1, local);
            }
            let list = |(i, &length): (usize, &usize)| [i, i, length];
            let sequences: Vec<[usize; 3]> = lengths.iter().enumerate().map(list).collect();
            let out = world.decode(&sequences, &qkv, local, 1, 1);
            for (i, &length) in lengths.iter().enumerate() {
                let want = world.attend(i, length - 1, &qkv[i * stride..], local);
                let got = &out[i * want.len()..][..want.len()];
                let why = format!("{local:?}, head size {}, length {length}", shape.head_dim);
                assert_near(&why, got, &want, |_| TOLERANCE);
                let alone = world.decode(&sequences[i..=i], &qkv, local, 1000, 2);
                assert_eq!(&alone[i * want.len()..][..want.len()], got, "{why}: alone");
            }
        }
    }
}

#[test]
fn windows_and_caps_hold_in_chunks() {
    let mut noise = Noise(14);
    for (shape, local) in shapes().zip(locals().into_iter().cycle()) {
        let length = 420;
        let mut world = PagedSequences::new(shape, &[length], &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(length * stride);
        let width = shape.n_heads * shape.head_dim;
        let out = world.prefill(&[[0, 0, length, 0]], &qkv, Some(local), 1);
        let why = |position| format!("{local:?}, head size {}, {position}", shape.head_dim);
        for position in [
            0, 1, 36, 37, 38, 63, 64, 100, 255, 256, 299, 300, 301, 418, 419,
        ] {
            let want = world.attend(0, position, &qkv[position * stride..], local);
            let got = &out[position * width..][..width];
            assert_near(&why(position), got, &want, |_| TOLERANCE);
        }
        // A chunk reads nothing that its first token does not see.
        let from = 333;
        world.forget_before(0, from, local);
        let chunk = [[0, 0, length - from, from]];
        let later = world.prefill(&chunk, &qkv[from * stride..], Some(local), 2);
        assert_eq!(later[..], out[from * width..], "{}", why(from));
    }
}

/// What `rope_append` is given besides queries, keys and values.
struct Turn {
    /// Pairs.
    n_frequencies: usize,
    /// Weights of the norms of query and key heads.
    norms: Option<[Vec<f32>; 2]>,
}

/// A head as the kernel is to leave it, in f64.
fn turned(head: &[u16], position: u32, frequencies: &[f32], norm: Option<&[f32]>) -> Vec<f64> {
    let mut x: Vec<f64> = head.iter().map(|&x| value(x)).collect();
    if let Some(weight) = norm {
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let inverse = 1.0 / (squares / x.len() as f64 + 1e-6).sqrt();
        let normed = x
            .iter()
            .zip(weight)
            .map(|(x, &w)| x * inverse * f64::from(w));
        x = normed.collect();
    }
    let n = frequencies.len();
    for i in 0..n {
        let (sin, cos) = f64::from(position as f32 * frequencies[i]).sin_cos();
        let (a, b) = (x[i], x[i + n]);
        x[i] = (a * cos - b * sin) * 1.5;
        x[i + n] = (b * cos + a * sin) * 1.5;
    }
    x
}

#[test]
fn rope_turns_pairs_and_appends() {
    let mut noise = Noise(12);
    for shape in shapes() {
        let whole = shape.head_dim / 2;
        for (n_frequencies, normed) in [
            (whole, false),
            (whole, true),
            (13, false),
            (16, true),
            (0, false),
        ] {
            let mut weights = || (0..shape.head_dim).map(|_| noise.unit()).collect();
            let norms = normed.then(|| [weights(), weights()]);
            let turn = Turn {
                n_frequencies,
                norms,
            };
            check_rope(shape, &turn, &mut noise);
        }
    }
}

fn check_rope(shape: Shape, turn: &Turn, noise: &mut Noise) {
    let Shape {
        n_heads,
        n_kv_heads,
        head_dim,
        ..
    } = shape;
    let mut world = PagedSequences::new(shape, &[0, 0, 300], noise);
    world.cache.fill(0xffff);
    let stride = (n_heads + 2 * n_kv_heads) * head_dim;
    let (positions, rows) = (vec![5_u32, INERT, 299, 0], vec![1_u32, 0, 2, 0]);
    let frequencies: Vec<f32> = (0..turn.n_frequencies)
        .map(|i| 10_000_f32.powf(-(i as f32) / turn.n_frequencies as f32))
        .collect();
    let before = noise.bf16s(positions.len() * stride);
    let mut qkv = before.clone();
    let norm = |which: usize| {
        turn.norms
            .as_ref()
            .map_or(In::NULL, |norms| address(norms[which].as_ptr()))
    };
    let args = RopeAppendArgs {
        cache: world.argument(),
        qkv: address(qkv.as_mut_ptr()),
        positions: address(positions.as_ptr()),
        rows: address(rows.as_ptr()),
        inverse_frequencies: address(frequencies.as_ptr()),
        query_norm: norm(0),
        key_norm: norm(1),
        n_heads: n_heads as u32,
        stride: stride as u32,
        n_frequencies: turn.n_frequencies as u32,
        scale: 1.5,
        epsilon: 1e-6,
        unused: 0,
    };
    let grid = kernel::rope_append(positions.len(), head_dim as u32);
    // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
    unsafe { launch(grid, 3, &args) };
    let mut n_written = 0;
    for (t, (&position, &row)) in positions.iter().zip(&rows).enumerate() {
        let (old, new) = (
            &before[t * stride..][..stride],
            &qkv[t * stride..][..stride],
        );
        if position == INERT {
            assert_eq!(old, new, "an inert row");
            continue;
        }
        for (h, (old, new)) in old.chunks(head_dim).zip(new.chunks(head_dim)).enumerate() {
            if h >= n_heads + n_kv_heads {
                assert_eq!(old, new, "a value");
                continue;
            }
            let which = usize::from(h >= n_heads);
            let norm = turn.norms.as_ref().map(|norms| &norms[which][..]);
            let want = turned(old, position, &frequencies, norm);
            // One rounding to bfloat16 is at most 2^-8 of the value; cancellation leaves noise of f32.
            assert_near("rope", new, &want, |want| want.abs() / 256.0 + 1e-5);
        }
        for head in 0..n_kv_heads {
            for (part, first) in [(0, n_heads), (1, n_heads + n_kv_heads)] {
                let at = world.at(row as usize, position as usize, head, part);
                let from = (first + head) * head_dim;
                assert_eq!(
                    world.cache[at..][..head_dim],
                    new[from..][..head_dim],
                    "keys and values"
                );
                n_written += head_dim;
            }
        }
    }
    let written = world.cache.iter().filter(|&&x| x != 0xffff).count();
    assert_eq!(written, n_written, "nothing else is written");
}
