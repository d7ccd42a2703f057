//! The launches of the kernels in `kernels/cuda`: each ties an entry point to the struct that it takes, and says how much
//! memory that struct must name ([`Arguments::check`]). It knows no step and no model.
//!
//! - `attention`, `experts`: the kernels of those; the others are here.

mod attention;
mod experts;

use std::marker::PhantomData;

use super::bounds::{Allocations, Bounds};
pub use super::interface::*;
pub use attention::{
    HeadDim, PrefillKind, combine_split_kv, paged_decode, paged_prefill, rope_append,
};
pub use experts::{
    combine_experts, group_by_expert, grouped_gemm, max_expert_tiles, route_experts,
};

/// A launch of a kernel that takes the struct `A`. Only this module makes them, each from an [`Entry`].
#[derive(Debug)]
pub struct Launch<A> {
    /// The kernel's name.
    pub(super) name: &'static str,
    /// Blocks along x, y, z.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(super) shared_bytes: u32,
    args: PhantomData<A>,
}

impl<A> Clone for Launch<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Launch<A> {}

impl<A> Launch<A> {
    fn new(entry: &Entry<A>, grid: [usize; 2], shared_bytes: u32) -> Self {
        let [x, y] = grid.map(|n| u32::try_from(n).expect("a grid's size has 32 bits"));
        Self {
            name: entry.name,
            grid: [x, y, 1],
            threads: entry.threads,
            shared_bytes,
            args: PhantomData,
        }
    }

    /// The launch without what it takes, to be kept until it is run.
    #[cfg(feature = "cuda-shim")]
    pub(super) fn erased(&self) -> Launch<()> {
        Launch {
            name: self.name,
            grid: self.grid,
            threads: self.threads,
            shared_bytes: self.shared_bytes,
            args: PhantomData,
        }
    }

    /// What its arguments are held against.
    pub(super) fn bounds<'a>(&self, memory: &'a Allocations) -> Bounds<'a> {
        Bounds {
            what: self.name,
            memory,
        }
    }

    /// No blocks.
    pub(super) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// Blocks along x.
    fn x(&self) -> u64 {
        u64::from(self.grid[0])
    }

    /// Blocks along y.
    fn y(&self) -> u64 {
        u64::from(self.grid[1])
    }
}

/// A kernel's struct of arguments.
pub trait Arguments: CType + Copy {
    /// Asserts, by way of `bounds`, that every address names as much memory as blocks of `launch` touch.
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>);
}

/// Elements from the first of `rows` rows to the end of the last one's `cols` columns.
fn matrix(rows: u64, stride: u32, cols: u32) -> u64 {
    match rows.checked_sub(1) {
        Some(last) => last * u64::from(stride) + u64::from(cols),
        None => 0,
    }
}

impl KvCache {
    /// Division by the block size as one multiplication.
    pub fn magic(block_size: u32) -> u32 {
        (1_u64 << 32).div_ceil(u64::from(block_size)) as u32
    }
}

/// Blocks: pairs, places.
pub fn copy_blocks(n_pairs: usize, n_places: usize) -> Launch<CopyBlocksArgs> {
    Launch::new(&COPY_BLOCKS, [n_pairs, n_places], 0)
}

impl Arguments for CopyBlocksArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(self.cache, launch.y() * self.chunks_per_place);
        bounds.reads(self.pairs, 2 * launch.x());
    }
}

/// A thread each change.
pub fn update_tables(n: usize) -> Launch<UpdateTablesArgs> {
    let threads = UPDATE_TABLES.threads as usize;
    Launch::new(&UPDATE_TABLES, [n.div_ceil(threads), 1], 0)
}

impl Arguments for UpdateTablesArgs {
    fn check(&self, _launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(self.tables, 1);
        bounds.reads(self.changes, 2 * u64::from(self.n));
    }
}

/// A block each row.
pub fn embed(rows: usize) -> Launch<EmbedArgs> {
    Launch::new(&EMBED, [rows, 1], 0)
}

impl Arguments for EmbedArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(
            self.out,
            matrix(launch.x(), self.out_stride, 8 * self.chunks),
        );
        bounds.reads(self.table, u64::from(8 * self.chunks));
        bounds.reads(self.tokens, launch.x());
        bounds.reads(self.previous, 1);
    }
}

/// A block each row.
pub fn gather_rows(rows: usize) -> Launch<GatherRowsArgs> {
    Launch::new(&GATHER_ROWS, [rows, 1], 0)
}

impl Arguments for GatherRowsArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(
            self.out,
            matrix(launch.x(), self.out_stride, 8 * self.chunks),
        );
        bounds.reads(self.x, u64::from(8 * self.chunks));
        bounds.reads(self.index, launch.x());
    }
}

/// A block each row.
pub fn rms_norm(rows: usize) -> Launch<RmsNormArgs> {
    Launch::new(&RMS_NORM, [rows, 1], NORM_WARPS * 4)
}

impl Arguments for RmsNormArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let cols = 8 * self.chunks;
        bounds.writes(self.out, matrix(launch.x(), self.out_stride, cols));
        bounds.reads(self.x, matrix(launch.x(), self.x_stride, cols));
        bounds.reads(self.weight, u64::from(cols));
        if self.residual.address() != 0 {
            bounds.writes(
                self.residual,
                matrix(launch.x(), self.residual_stride, cols),
            );
        }
    }
}

/// A thread each 8 columns.
pub fn gated_activation(rows: usize, n: usize) -> Launch<GatedActivationArgs> {
    let columns = 8 * GATED_ACTIVATION.threads as usize;
    Launch::new(&GATED_ACTIVATION, [rows, n.div_ceil(columns)], 0)
}

impl Arguments for GatedActivationArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        bounds.writes(self.out, matrix(launch.x(), self.out_stride, self.n));
        bounds.reads(self.gate_up, matrix(launch.x(), self.in_stride, 2 * self.n));
    }
}

/// A block each row.
pub fn edit_logits(rows: usize) -> Launch<EditLogitsArgs> {
    Launch::new(&EDIT_LOGITS, [rows, 1], 0)
}

impl Arguments for EditLogitsArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let last = launch.x() + u64::from(self.first);
        bounds.writes(self.edited, matrix(last, self.stride, self.vocabulary));
        bounds.reads(self.logits, u64::from(self.vocabulary));
        bounds.reads(self.rows, launch.x());
        bounds.reads(self.words, u64::from(self.n_words));
    }
}

/// A block each row.
pub fn sample(rows: usize) -> Launch<SampleArgs> {
    Launch::new(&SAMPLE, [rows, 1], SAMPLE_SHARED_BYTES)
}

impl Arguments for SampleArgs {
    fn check(&self, launch: &Launch<Self>, bounds: &Bounds<'_>) {
        let (rows, top) = (launch.x(), launch.x() * u64::from(MAX_TOP));
        bounds.reads(self.logits, matrix(rows, self.stride, self.vocabulary));
        bounds.reads(self.edited, u64::from(self.vocabulary));
        bounds.reads(self.rows, rows);
        bounds.writes(self.tokens, rows);
        bounds.writes(self.logprobs, rows);
        bounds.writes(self.top_ids, top);
        bounds.writes(self.top_logprobs, top);
        assert!(
            self.vocabulary <= MAX_VOCABULARY,
            "a row of {} logits, {MAX_VOCABULARY} at most",
            self.vocabulary
        );
    }
}

macro_rules! plain {
    ($($name:ident)*) => { $(
        // SAFETY: integers and floats only, repr(C), and without padding, as `structs!` asserts.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: likewise.
        unsafe impl bytemuck::Pod for $name {}
    )* };
}
plain! { SplitKvTile SplitKvSequence PrefillTile ExpertTile EditRow SampleRow }
