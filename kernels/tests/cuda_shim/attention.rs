//! RoPE with the append, decode and prefill over a paged cache whose blocks are shuffled and whose unused slots are NaN.

use crate::shim::{Noise, address, assert_near, launch, value};
use kvasir_kernels::cuda::kernel::{
    self, DecodeItem, DecodeSequence, HeadDim, INERT, KvCache, PARTITION, PagedDecodeArgs,
    PagedPrefillArgs, PrefillTile, RopeAppendArgs,
};

const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];

#[derive(Clone, Copy)]
struct Shape {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
}

/// Sequences of some lengths, paged: the tables, and the cache with only their tokens written.
struct World {
    shape: Shape,
    table_width: usize,
    tables: Vec<u32>,
    cache: Vec<u16>,
}

impl World {
    fn new(shape: Shape, lengths: &[usize], noise: &mut Noise) -> Self {
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let table_width = longest.div_ceil(shape.block_size).max(1);
        let n_blocks = lengths.len() * table_width;
        let block = 2 * shape.n_kv_heads * shape.block_size * shape.head_dim;
        let mut world = Self {
            shape,
            table_width,
            tables: noise.permutation(n_blocks),
            cache: vec![0xffff; n_blocks * block],
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
        (((block * 2 + part) * n_kv_heads + head) * block_size + position % block_size) * head_dim
    }

    fn argument(&mut self) -> KvCache {
        KvCache {
            layer: address(self.cache.as_mut_ptr()),
            tables: address(self.tables.as_ptr()),
            table_width: self.table_width as u32,
            block_size: self.shape.block_size as u32,
            block_size_magic: KvCache::magic(self.shape.block_size as u32),
            n_kv_heads: self.shape.n_kv_heads as u32,
            head_dim: self.shape.head_dim as u32,
            unused: 0,
        }
    }

    /// Attention of one token's query heads, in f64.
    fn attend(&self, row: usize, position: usize, queries: &[u16], scale: f64) -> Vec<f64> {
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
            let scores: Vec<f64> = (0..=position)
                .map(|p| {
                    query
                        .iter()
                        .zip(vector(p, 0))
                        .map(|(&q, k)| value(q) * k)
                        .sum::<f64>()
                        * scale
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut mean = vec![0.0; head_dim];
            for (p, score) in scores.iter().enumerate() {
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
        let (mut items, mut merged) = (Vec::new(), Vec::new());
        for &[row, token, length] in sequences {
            let n_items = (length as u32).div_ceil(PARTITION);
            merged.push(DecodeSequence {
                token: token as u32,
                first_item: items.len() as u32,
                n_items,
                unused: 0,
            });
            // An inert one has an item too, as padding has.
            items.extend((0..n_items.max(1)).map(|i| DecodeItem {
                row: row as u32,
                token: token as u32,
                length: length as u32,
                start: i * PARTITION,
            }));
        }
        let n_partials = items.len() * n_heads;
        let mut partial_out = vec![f32::NAN; n_partials * head_dim];
        let mut partial_softmax = vec![f32::NAN; n_partials * 2];
        let args = PagedDecodeArgs {
            cache: self.argument(),
            out: address(out.as_mut_ptr()),
            qkv: address(qkv.as_ptr()),
            items: address(items.as_ptr()),
            sequences: address(merged.as_ptr()),
            partial_out: address(partial_out.as_mut_ptr()),
            partial_softmax: address(partial_softmax.as_mut_ptr()),
            out_stride: (n_heads * head_dim) as u32,
            qkv_stride: qkv_stride as u32,
            n_heads: n_heads as u32,
            scale_log2: SCALE * std::f32::consts::LOG2_E,
        };
        let size = HeadDim::new(head_dim).unwrap();
        let (heads, kv_heads) = (n_heads as u32, n_kv_heads as u32);
        let (name, split) =
            kernel::paged_decode(items.len(), heads, kv_heads, size, n_multiprocessors);
        let most = merged.iter().map(|s| s.n_items as usize).max().unwrap_or(0);
        let merge = kernel::merge_partitions(merged.len(), most, heads, size);
        // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
        unsafe {
            launch(name, split, seed, &args);
            launch("merge_partitions", merge, seed, &args);
        }
        out
    }

    /// Spans of (row, first token, tokens, first position).
    fn prefill(&mut self, spans: &[[usize; 4]], qkv: &[u16], seed: u64) -> Vec<u16> {
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
        let tiles: Vec<PrefillTile> = spans
            .iter()
            .flat_map(|&[row, first_token, n_tokens, first_position]| {
                (0..n_tokens * group)
                    .step_by(size.prefill_rows() as usize)
                    .map(move |first_row| PrefillTile {
                        row: row as u32,
                        first_token: first_token as u32,
                        n_tokens: n_tokens as u32,
                        first_position: first_position as u32,
                        first_row: first_row as u32,
                        unused: 0,
                    })
            })
            .collect();
        let args = PagedPrefillArgs {
            cache: self.argument(),
            out: address(out.as_mut_ptr()),
            qkv: address(qkv.as_ptr()),
            tiles: address(tiles.as_ptr()),
            out_stride: (n_heads * head_dim) as u32,
            qkv_stride: qkv_stride as u32,
            n_heads: n_heads as u32,
            scale_log2: SCALE * std::f32::consts::LOG2_E,
        };
        let grid = kernel::paged_prefill(tiles.len(), n_kv_heads as u32, size);
        // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
        unsafe { launch(size.prefill(), grid, seed, &args) };
        out
    }
}

const SCALE: f32 = 0.25;

/// Values are within [-1, 1]: weights rounded to bfloat16 move a mean of them by at most 2^-8, the rounding of the result
/// moves it by at most 2^-9, and the rest is for binary32 sums.
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
        let mut world = World::new(shape, &lengths, &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(lengths.len() * stride);
        let mut sequences: Vec<[usize; 3]> = lengths
            .iter()
            .enumerate()
            .map(|(i, &length)| [i, i, length])
            .collect();
        sequences.push([0, 0, 0]);
        let out = world.decode(&sequences, &qkv, 1, 1);
        for (i, &length) in lengths.iter().enumerate() {
            let want = world.attend(i, length - 1, &qkv[i * stride..], f64::from(SCALE));
            let got = &out[i * want.len()..][..want.len()];
            let why = format!("decode, head size {}, length {length}", shape.head_dim);
            assert_near(&why, got, &want, |_| TOLERANCE);
            let alone = world.decode(&sequences[i..=i], &qkv, 1000, 2);
            assert_eq!(&alone[i * want.len()..][..want.len()], got, "{why}: alone");
        }
    }
}

#[test]
fn prefill_is_close_and_the_same_in_chunks() {
    let mut noise = Noise(11);
    for shape in shapes() {
        let lengths = [1, 70, 150];
        let mut world = World::new(shape, &lengths, &mut noise);
        let stride = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let qkv = noise.bf16s(lengths.iter().sum::<usize>() * stride);
        let width = shape.n_heads * shape.head_dim;
        let out = world.prefill(&[[0, 0, 1, 0], [1, 1, 70, 0], [2, 71, 150, 0]], &qkv, 1);
        let mut token = 0;
        for (row, &length) in lengths.iter().enumerate() {
            for position in 0..length {
                // Every position near the tiles' edges, few of the others: the oracle is slow.
                if [0, 1, 31, 32, 63, 64, 65, 127, 128, 149].contains(&position)
                    || position == length - 1
                {
                    let want =
                        world.attend(row, position, &qkv[token * stride..], f64::from(SCALE));
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
fn rope_turns_pairs_and_appends() {
    let mut noise = Noise(12);
    for shape in shapes() {
        let Shape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = shape;
        let mut world = World::new(shape, &[0, 0, 300], &mut noise);
        world.cache.fill(0xffff);
        let stride = (n_heads + 2 * n_kv_heads) * head_dim;
        let positions = vec![5_u32, INERT, 299, 0];
        let rows = vec![1_u32, 0, 2, 0];
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 10_000_f32.powf(-(i as f32) / half as f32))
            .collect();
        let before = noise.bf16s(positions.len() * stride);
        let mut qkv = before.clone();
        let args = RopeAppendArgs {
            cache: world.argument(),
            qkv: address(qkv.as_mut_ptr()),
            positions: address(positions.as_ptr()),
            rows: address(rows.as_ptr()),
            inverse_frequencies: address(frequencies.as_ptr()),
            n_heads: n_heads as u32,
            stride: stride as u32,
            scale: 1.5,
            unused: 0,
        };
        let grid = kernel::rope_append(positions.len(), head_dim as u32);
        // SAFETY: every vector holds what the fields above say, and tables and positions stay inside the cache.
        unsafe { launch("rope_append", grid, 3, &args) };
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
            let n_rotated = (n_heads + n_kv_heads) * head_dim;
            let mut want: Vec<f64> = old.iter().map(|&x| value(x)).collect();
            for head in want[..n_rotated].chunks_mut(head_dim) {
                for i in 0..half {
                    let (sin, cos) = f64::from(position as f32 * frequencies[i]).sin_cos();
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = (a * cos - b * sin) * 1.5;
                    head[i + half] = (b * cos + a * sin) * 1.5;
                }
            }
            // One rounding to bfloat16 is at most 2^-8 of the value; cancellation leaves binary32 noise.
            assert_near("rope", new, &want, |want| want.abs() / 256.0 + 1e-5);
            for head in 0..n_kv_heads {
                let key = world.at(row as usize, position as usize, head, 0);
                let at = (n_heads + head) * head_dim;
                assert_eq!(
                    world.cache[key..][..head_dim],
                    new[at..][..head_dim],
                    "keys"
                );
                let values = world.at(row as usize, position as usize, head, 1);
                let at = (n_heads + n_kv_heads + head) * head_dim;
                assert_eq!(
                    world.cache[values..][..head_dim],
                    new[at..][..head_dim],
                    "values"
                );
                n_written += 2 * head_dim;
            }
        }
        let written = world.cache.iter().filter(|&&x| x != 0xffff).count();
        assert_eq!(written, n_written, "nothing else is written");
    }
}
