//! Launches of the kernels that know the paged cache.

use super::super::bounds::Bounds;
use super::*;

/// A head size that the attention kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadDim {
    /// Into [`HEAD_DIMS`].
    index: usize,
}

impl HeadDim {
    /// `None` where no kernel has this head size.
    pub fn new(elements: usize) -> Option<Self> {
        let index = HEAD_DIMS.iter().position(|&d| d == elements)?;
        Some(Self { index })
    }

    /// Elements of a head.
    pub fn elements(self) -> u32 {
        HEAD_DIMS[self.index] as u32
    }

    /// Rows (token, head of the group) of one tile of `paged_prefill`.
    pub fn prefill_rows(self) -> u32 {
        prefill_rows(self.elements())
    }

    /// Keys of one tile of `paged_prefill`.
    pub fn prefill_keys(self) -> u32 {
        prefill_keys(self.elements())
    }
}

/// A block each token.
pub fn rope_append(tokens: usize, head_dim: u32) -> Launch<RopeAppendArgs> {
    let shared_bytes = (1 + ROPE_WARPS) * head_dim * 4;
    Launch::new(&ROPE_APPEND, [tokens, 1], shared_bytes)
}

impl Arguments for RopeAppendArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let heads = self.n_heads + 2 * self.cache.n_kv_heads;
        let cols = heads * self.cache.head_dim;
        bounds.writes(self.qkv, matrix(launch.x(), self.stride, cols));
        bounds.reads(self.positions, launch.x());
        bounds.reads(self.rows, launch.x());
        bounds.reads(self.inverse_frequencies, u64::from(self.n_frequencies));
        assert!(
            2 * self.n_frequencies <= self.cache.head_dim,
            "more pairs than a head has"
        );
        if self.query_norm.address() != 0 {
            for norm in [self.query_norm, self.key_norm] {
                bounds.reads(norm, u64::from(self.cache.head_dim));
            }
        }
        self.cache.check(bounds);
    }
}

impl KvCache {
    /// Where a page or a table lies is a matter of indices.
    fn check(&self, bounds: &Bounds<'_>) {
        bounds.writes(self.layer, 1);
        bounds.reads(self.tables, u64::from(self.table_width));
    }
}

/// A block each split-KV tile and tile of 16 grouped heads. Both kernels of a head size give the same bits; one suits a
/// grid that leaves each block a multiprocessor to itself.
pub fn paged_decode(
    tiles: usize,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: HeadDim,
    n_multiprocessors: u32,
) -> Launch<PagedDecodeArgs> {
    let heads = (n_kv_heads * (n_heads / n_kv_heads).div_ceil(16)) as usize;
    let alone = tiles * heads <= n_multiprocessors as usize;
    let entries = if alone {
        &PAGED_DECODE_ALONE
    } else {
        &PAGED_DECODE
    };
    let shared_bytes = decode_shared_bytes(head_dim.elements(), alone);
    Launch::new(&entries[head_dim.index], [tiles, heads], shared_bytes)
}

/// A block each head of each sequence; none has more than `most_tiles`. Takes what `paged_decode` took.
pub fn combine_split_kv(
    sequences: usize,
    most_tiles: usize,
    n_heads: u32,
    head_dim: HeadDim,
) -> Launch<PagedDecodeArgs> {
    let (groups, shared_bytes) = if most_tiles > COMBINE_TOGETHER as usize {
        let words = COMBINE_GROUPS * (head_dim.elements() + 1) + most_tiles as u32;
        (COMBINE_GROUPS, words * 4)
    } else {
        (1, 0)
    };
    let grid = [n_heads as usize, sequences];
    Launch {
        threads: (groups * head_dim.elements()).next_multiple_of(32),
        ..Launch::new(&COMBINE_SPLIT_KV, grid, shared_bytes)
    }
}

impl PagedDecodeArgs {
    /// Those of the layer and step that `prefill` is of; tiles and sequences are yet to be named.
    pub fn like(prefill: &PagedPrefillArgs) -> Self {
        let &PagedPrefillArgs {
            cache,
            out,
            qkv,
            tiles: _,
            partial_out,
            partial_softmax,
            out_stride,
            qkv_stride,
            n_heads,
            window,
            scale_log2,
            tanh_scale,
        } = prefill;
        Self {
            cache,
            out,
            qkv,
            tiles: In::NULL,
            sequences: In::NULL,
            partial_out,
            partial_softmax,
            out_stride,
            qkv_stride,
            n_heads,
            window,
            scale_log2,
            tanh_scale,
        }
    }
}

impl Arguments for PagedDecodeArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let width = self.n_heads * self.cache.head_dim;
        bounds.writes(self.out, u64::from(width));
        bounds.reads(self.qkv, u64::from(width));
        if launch.name == COMBINE_SPLIT_KV.name {
            bounds.reads(self.sequences, launch.y());
            return;
        }
        let partials = launch.x() * u64::from(self.n_heads);
        bounds.reads(self.tiles, launch.x());
        bounds.writes(self.partial_out, partials * u64::from(self.cache.head_dim));
        bounds.writes(self.partial_softmax, partials * 2);
        self.cache.check(bounds);
    }
}

/// Which keys a prefill chunk's kernel knows how to leave out or cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillKind {
    /// Those after the query, no others.
    Causal,
    /// Those before a window too; and it caps scores.
    Local,
}

/// A block each tile and KV head.
pub fn paged_prefill(
    tiles: usize,
    n_kv_heads: u32,
    head_dim: HeadDim,
    kind: PrefillKind,
) -> Launch<PagedPrefillArgs> {
    let entries = match kind {
        PrefillKind::Causal => &PAGED_PREFILL,
        PrefillKind::Local => &PAGED_PREFILL_LOCAL,
    };
    let shared_bytes = prefill_shared_bytes(head_dim.elements());
    let grid = [tiles, n_kv_heads as usize];
    Launch::new(&entries[head_dim.index], grid, shared_bytes)
}

impl Arguments for PagedPrefillArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let width = self.n_heads * self.cache.head_dim;
        bounds.writes(self.out, u64::from(width));
        bounds.reads(self.qkv, u64::from(width));
        bounds.reads(self.tiles, launch.x());
        // How many there are is a matter of indices.
        bounds.writes(self.partial_out, u64::from(width));
        bounds.writes(self.partial_softmax, 2 * u64::from(self.n_heads));
        self.cache.check(bounds);
    }
}
