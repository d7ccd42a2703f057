//! The kernels of `kernels/cuda`: their names, their arguments as the sources declare them, and the shapes of their
//! launches. It knows no step; each struct stands beside the launch that takes it.
//!
//! Addresses are of the device, strides are in elements.

use super::driver::{Arguments, Launch};

/// A head size that the attention kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadDim {
    elements: u32,
    decode: [&'static str; 2],
    prefill: &'static str,
}

impl HeadDim {
    /// All of them, rising.
    pub const ALL: [u32; 6] = [64, 80, 96, 128, 192, 256];

    /// `None` where no kernel has this head size.
    pub fn new(elements: usize) -> Option<Self> {
        let (decode, prefill) = match elements {
            64 => (
                ["paged_decode_64", "paged_decode_alone_64"],
                "paged_prefill_64",
            ),
            80 => (
                ["paged_decode_80", "paged_decode_alone_80"],
                "paged_prefill_80",
            ),
            96 => (
                ["paged_decode_96", "paged_decode_alone_96"],
                "paged_prefill_96",
            ),
            128 => (
                ["paged_decode_128", "paged_decode_alone_128"],
                "paged_prefill_128",
            ),
            192 => (
                ["paged_decode_192", "paged_decode_alone_192"],
                "paged_prefill_192",
            ),
            256 => (
                ["paged_decode_256", "paged_decode_alone_256"],
                "paged_prefill_256",
            ),
            _ => return None,
        };
        Some(Self {
            elements: elements as u32,
            decode,
            prefill,
        })
    }

    /// Elements of a head.
    pub fn elements(self) -> u32 {
        self.elements
    }

    /// The kernel that attends for prefill chunks; takes [`PagedPrefillArgs`].
    pub fn prefill(self) -> &'static str {
        self.prefill
    }

    /// Rows (token, head of the group) of one tile of it.
    pub fn prefill_rows(self) -> u32 {
        if self.elements <= 128 { 128 } else { 64 }
    }
}

/// Positions that one block of `paged_decode` attends to.
pub const PARTITION: u32 = 256;
/// Log-probabilities that `sample` can report of a row.
pub const MAX_TOP: usize = 256;
/// Logits of a row at most: `BINNED_TOKENS` of sample.cu.
pub const MAX_VOCABULARY: usize = 1 << 18;
/// Marks a token id that is an index into the step before's draws.
pub const SAMPLED: u32 = crate::step::ON_DEVICE;
/// A position that makes its token inert.
pub const INERT: u32 = u32::MAX;
/// A score's token, where one is drawn instead.
pub const DRAW: u32 = u32::MAX;
/// Registers limit a block of `rms_norm`; the others are what their sources say.
const NORM_WARPS: u32 = 8;
/// Bins, candidates and their weights, a histogram, the most likely tokens, a few words: `SampleShared` in sample.cu.
const SAMPLE_SHARED_BYTES: u32 = 12 * 1024 + 8 * (2 * 1024 + 256 + 256 + 32 + 2) + 8;

/// One layer of the paged KV cache.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvCache {
    /// `[block][K|V][kv head][slot][dim]`, bfloat16.
    pub layer: u64,
    /// `[max_sequences][table_width]`.
    pub tables: u64,
    /// Blocks of a row of the tables.
    pub table_width: u32,
    /// Slots of a block: 8 to 128.
    pub block_size: u32,
    /// ceil(2^32 / block_size).
    pub block_size_magic: u32,
    /// KV heads.
    pub n_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Zero.
    pub unused: u32,
}

impl KvCache {
    /// Division by the block size as one multiplication.
    pub fn magic(block_size: u32) -> u32 {
        (1_u64 << 32).div_ceil(u64::from(block_size)) as u32
    }
}

/// `copy_blocks`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopyBlocksArgs {
    /// All layers.
    pub cache: u64,
    /// `[n][2]`: from, to.
    pub pairs: u64,
    /// 16 bytes each.
    pub chunks_per_layer: u64,
    /// 16 bytes each.
    pub chunks_per_block: u32,
    /// Zero.
    pub unused: u32,
}

/// Blocks: pairs, layers.
pub fn copy_blocks(n_pairs: usize, n_layers: usize) -> Launch {
    grid([n_pairs as u32, n_layers as u32, 1], 256, 0)
}

/// `update_tables`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UpdateTablesArgs {
    /// The block-table matrix.
    pub tables: u64,
    /// `[n][2]`: index of the entry, block.
    pub changes: u64,
    /// Changes.
    pub n: u32,
    /// Zero.
    pub unused: u32,
}

/// A thread each change.
pub fn update_tables(n: usize) -> Launch {
    grid([(n as u32).div_ceil(128), 1, 1], 128, 0)
}

/// `embed`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EmbedArgs {
    /// `[T, out_stride]`.
    pub out: u64,
    /// `[vocabulary, table_stride]`.
    pub table: u64,
    /// `[T]`: ids, or [`SAMPLED`] and an index.
    pub tokens: u64,
    /// What the step before drew.
    pub previous: u64,
    /// 8 columns each.
    pub chunks: u32,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `table`.
    pub table_stride: u32,
    /// Zero.
    pub unused: u32,
}

/// `gather_rows`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherRowsArgs {
    /// `[L, out_stride]`.
    pub out: u64,
    /// `[T, x_stride]`.
    pub x: u64,
    /// `[L]`.
    pub index: u64,
    /// 8 columns each.
    pub chunks: u32,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `x`.
    pub x_stride: u32,
    /// Zero.
    pub unused: u32,
}

/// A block each row: `embed` and `gather_rows`.
pub fn move_rows(rows: usize) -> Launch {
    grid([rows as u32, 1, 1], 128, 0)
}

/// `rms_norm`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RmsNormArgs {
    /// `[T, out_stride]`.
    pub out: u64,
    /// `[T, residual_stride]`, updated; 0: no addition.
    pub residual: u64,
    /// `[T, x_stride]`.
    pub x: u64,
    /// `[8 chunks]`, binary32.
    pub weight: u64,
    /// Without padding.
    pub cols: u32,
    /// 8 columns each.
    pub chunks: u32,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `residual`.
    pub residual_stride: u32,
    /// Of `x`.
    pub x_stride: u32,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// A block each row.
pub fn rms_norm(rows: usize) -> Launch {
    grid([rows as u32, 1, 1], NORM_WARPS * 32, NORM_WARPS * 4)
}

/// `rope_append`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RopeAppendArgs {
    /// Where keys and values go.
    pub cache: KvCache,
    /// `[T, stride]`: query heads, key heads, value heads.
    pub qkv: u64,
    /// `[T]`; [`INERT`] ones are left alone.
    pub positions: u64,
    /// `[T]`: rows of the block tables.
    pub rows: u64,
    /// `[head_dim / 2]`, binary32.
    pub inverse_frequencies: u64,
    /// Query heads.
    pub n_heads: u32,
    /// Of `qkv`.
    pub stride: u32,
    /// Of sine and cosine.
    pub scale: f32,
    /// Zero.
    pub unused: u32,
}

/// A block each token.
pub fn rope_append(tokens: usize, head_dim: u32) -> Launch {
    grid([tokens as u32, 1, 1], 128, head_dim * 4)
}

/// One partition of one sequence, for `paged_decode`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DecodeItem {
    /// Of the block tables.
    pub row: u32,
    /// Row of qkv and out.
    pub token: u32,
    /// Tokens that the sequence has in the cache, its new one included; 0: inert.
    pub length: u32,
    /// First position of the partition.
    pub start: u32,
}

/// The partitions of one sequence, for `merge_partitions`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DecodeSequence {
    /// Row of out.
    pub token: u32,
    /// Its first item.
    pub first_item: u32,
    /// Its items; with one or none there is nothing to merge.
    pub n_items: u32,
    /// Zero.
    pub unused: u32,
}

/// `paged_decode_*` and `merge_partitions`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PagedDecodeArgs {
    /// Keys and values.
    pub cache: KvCache,
    /// `[T, out_stride]`.
    pub out: u64,
    /// `[T, qkv_stride]`, rotated.
    pub qkv: u64,
    /// [`DecodeItem`]s.
    pub items: u64,
    /// [`DecodeSequence`]s.
    pub sequences: u64,
    /// `[item][head][head_dim]`, binary32.
    pub partial_out: u64,
    /// `[item][head][2]`, binary32.
    pub partial_softmax: u64,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `qkv`.
    pub qkv_stride: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Scale of the scores times log2(e).
    pub scale_log2: f32,
}

/// A block each item and tile of 16 grouped heads: the kernel, which takes [`PagedDecodeArgs`], and its launch. Both
/// kernels of a head size give the same bits; one suits a grid that leaves each block a multiprocessor to itself.
pub fn paged_decode(
    items: usize,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: HeadDim,
    n_multiprocessors: u32,
) -> (&'static str, Launch) {
    let head_tiles = (n_heads / n_kv_heads).div_ceil(16);
    let blocks = [items as u32, n_kv_heads * head_tiles, 1];
    let alone = blocks[0] * blocks[1] <= n_multiprocessors;
    let stages = match (alone, head_dim.elements) {
        (true, 0..=192) => 4,
        (true, _) => 3,
        (false, 0..=64) => 4,
        (false, _) => 2,
    };
    let rows = 16 + 4 * stages * 2 * 16;
    let shared_bytes = rows * (head_dim.elements + 8) * 2 + 4 * 16 * 2 * 4;
    (
        head_dim.decode[usize::from(alone)],
        grid(blocks, 128, shared_bytes),
    )
}

/// A block each head of each sequence; none has more than `most_items`.
pub fn merge_partitions(
    sequences: usize,
    most_items: usize,
    n_heads: u32,
    head_dim: HeadDim,
) -> Launch {
    const GROUPS: u32 = 4;
    const TOGETHER: usize = 16;
    let (groups, shared_bytes) = if most_items > TOGETHER {
        let words = GROUPS * (head_dim.elements + 1) + most_items as u32;
        (GROUPS, words * 4)
    } else {
        (1, 0)
    };
    let threads = (groups * head_dim.elements).next_multiple_of(32);
    grid([n_heads, sequences as u32, 1], threads, shared_bytes)
}

/// Up to [`HeadDim::prefill_rows`] rows of one span, for `paged_prefill`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PrefillTile {
    /// Of the block tables.
    pub row: u32,
    /// Of the span: row of qkv and out.
    pub first_token: u32,
    /// Of the span.
    pub n_tokens: u32,
    /// Of the span.
    pub first_position: u32,
    /// Of the tile, in rows of (token of the span, head of the group).
    pub first_row: u32,
    /// Zero.
    pub unused: u32,
}

/// `paged_prefill_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PagedPrefillArgs {
    /// Keys and values.
    pub cache: KvCache,
    /// `[T, out_stride]`.
    pub out: u64,
    /// `[T, qkv_stride]`, rotated.
    pub qkv: u64,
    /// [`PrefillTile`]s.
    pub tiles: u64,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `qkv`.
    pub qkv_stride: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Scale of the scores times log2(e).
    pub scale_log2: f32,
}

/// A block each tile and KV head.
pub fn paged_prefill(tiles: usize, n_kv_heads: u32, head_dim: HeadDim) -> Launch {
    let keys = if head_dim.elements <= 128 { 64 } else { 32 };
    let rows = head_dim.prefill_rows();
    let shared_bytes = (rows + 4 * keys) * (head_dim.elements + 8) * 2 + rows * 4;
    grid([tiles as u32, n_kv_heads, 1], 128, shared_bytes)
}

/// `swiglu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SwigluArgs {
    /// `[T, out_stride]`.
    pub out: u64,
    /// `[T, in_stride]`: n gates, n ups.
    pub gate_up: u64,
    /// Columns of the result.
    pub n: u32,
    /// Of `out`.
    pub out_stride: u32,
    /// Of `gate_up`.
    pub in_stride: u32,
    /// Zero.
    pub unused: u32,
}

/// A thread each 8 columns.
pub fn swiglu(rows: usize, n: usize) -> Launch {
    grid([rows as u32, (n as u32).div_ceil(8 * 128), 1], 128, 0)
}

/// What is wanted of a row of logits.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleRow {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// The generator's counter.
    pub output_index: u32,
    /// The generator's key, low word first.
    pub seed: [u32; 2],
    /// The token to report on; [`DRAW`]: draw one.
    pub score: u32,
    /// Log-probabilities of so many of the most likely tokens; -1: of none, not of the drawn one either.
    pub n_logprobs: i32,
}

/// `sample`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SampleArgs {
    /// `[L, stride]`, binary32.
    pub logits: u64,
    /// [`SampleRow`]s.
    pub rows: u64,
    /// `[L]`.
    pub tokens: u64,
    /// `[L]`, binary32.
    pub logprobs: u64,
    /// `[L, MAX_TOP]`, most likely first.
    pub top_ids: u64,
    /// `[L, MAX_TOP]`, binary32.
    pub top_logprobs: u64,
    /// Logits of a row.
    pub vocabulary: u32,
    /// Of `logits`.
    pub stride: u32,
}

/// A block each row.
pub fn sample(rows: usize) -> Launch {
    grid([rows as u32, 1, 1], 1024, SAMPLE_SHARED_BYTES)
}

fn grid(grid: [u32; 3], threads: u32, shared_bytes: u32) -> Launch {
    Launch {
        grid,
        threads,
        shared_bytes,
    }
}

macro_rules! arguments {
    ($($name:ident)*) => { $(
        // SAFETY: repr(C) with the fields of the source; the shim asserts the size at each launch.
        unsafe impl Arguments for $name {}
    )* };
}
arguments! {
    CopyBlocksArgs UpdateTablesArgs EmbedArgs GatherRowsArgs RmsNormArgs RopeAppendArgs PagedDecodeArgs
    PagedPrefillArgs SwigluArgs SampleArgs
}
