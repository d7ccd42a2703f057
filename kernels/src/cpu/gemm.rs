//! Products with weights: how a product is cut into tasks and calls of a tile kernel.
//!
//! Each weight is read from memory once, whatever the number of rows: a task takes a few panels and runs all rows over
//! them. With more rows than a kernel keeps in registers the inner dimension is cut, so that the piece of the panels
//! at hand stays in the first cache while the rows pass. Sums are kept in the output between the pieces: cutting
//! changes no bit.

use super::mapping::Mapping;
use super::pool::Pool;
use super::rows::RowsView;
use super::simd::SimdOps;
use super::tile::{LANES, Tile, TileFn, elements_per_pair};
use super::weights::PackedWeight;
use crate::device::DeviceError;
use crate::shape::Precision;
use std::ops::Range;

/// Rows up to which panels are streamed whole.
const STREAMED_ROWS: usize = 12;
/// Panels of a task: for streaming, as many as one call keeps sums for; otherwise few, to fit the caches.
const STREAMED_PANELS: usize = 8;
const BLOCKED_PANELS: usize = 4;
/// Steps of a piece: 16 KB a panel.
const BLOCKED_STEPS: usize = 256;
/// Elements above which packing the activations is worth all threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// Memory for the activations of one product, rounded and in packed pairs.
#[derive(Debug)]
pub(crate) struct PackedActivations {
    memory: Mapping,
}

/// Room for `max_rows` packed rows of `n_steps` pairs. Rows lie a cache line more than that apart: a distance of a
/// multiple of 4 KB would put all rows into the same few sets of the first cache.
pub(crate) fn packed_bytes(max_rows: usize, n_steps: usize) -> usize {
    max_rows * (n_steps + LANES) * size_of::<u32>()
}

impl PackedActivations {
    /// Room for the largest product.
    pub(crate) fn new(bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            memory: Mapping::new("packed activations", bytes)?,
        })
    }
}

/// What a product needs beside its operands.
pub(crate) struct Gemm<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) simd: &'static SimdOps,
    pub(crate) tile: TileFn,
    pub(crate) precision: Precision,
    pub(crate) packed: &'a PackedActivations,
}

/// Rows of activations that are multiplied with the same part of a weight.
#[derive(Clone, Debug)]
pub(crate) struct RowGroup {
    pub(crate) rows: Range<usize>,
    pub(crate) weight_rows: Range<usize>,
}

/// A part of a product: rows of activations, panels of the weight, and where the first panel's columns go.
struct GemmBlock {
    rows: Range<usize>,
    panels: Range<usize>,
    first_column: usize,
}

impl Gemm<'_> {
    /// `out[r] = weight x[r] + bias`. `out` and `x` are different buffers of equally many rows.
    pub(crate) fn matmul(
        &self,
        out: RowsView,
        x: RowsView,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
    ) {
        assert_eq!(
            (x.cols, out.cols),
            (weight.cols, weight.n_rows),
            "a matmul of other widths"
        );
        assert_eq!(x.n_rows, out.n_rows, "a matmul of different rows");
        assert!(
            bias.is_none_or(|bias| bias.len() == weight.n_rows),
            "a bias of another length"
        );
        // SAFETY: nobody writes `x` while this product runs.
        let x_rows = self.pack(x.n_rows, x.cols, weight, |r| unsafe { x.row(r) });
        let panels_per_task = panels_per_call(x.n_rows);
        let n_tasks = weight.n_panels().div_ceil(panels_per_task);
        self.pool.run(n_tasks, &|task, _| {
            let first = task * panels_per_task;
            let block = GemmBlock {
                rows: 0..out.n_rows,
                panels: first..weight.n_panels().min(first + panels_per_task),
                first_column: first * LANES,
            };
            // SAFETY: the columns of a panel are one task's alone.
            unsafe { self.multiply(x_rows, out, weight, bias, &block) };
        });
    }

    /// `out[r][offset + i] = weight[weight_rows.start + i] x[r]` for the rows of each of `n_groups` groups, with `offset
    /// = weight_rows.start % 16`: a panel may hold rows of two groups, and what is beside the group's columns is not to
    /// be used. `out` is wide enough for the panels of a group; groups have equally many weight rows.
    pub(crate) fn grouped(
        &self,
        out: RowsView,
        x: PackedRows,
        weight: &PackedWeight,
        n_groups: usize,
        group: impl Fn(usize) -> RowGroup + Sync,
    ) {
        let panels_of = |group: &RowGroup| {
            group.weight_rows.start / LANES..group.weight_rows.end.div_ceil(LANES)
        };
        let most = (0..n_groups).map(|g| panels_of(&group(g)).len()).max();
        let tasks_per_group = most.unwrap_or(0).div_ceil(STREAMED_PANELS);
        self.pool.run(n_groups * tasks_per_group, &|task, _| {
            let group = group(task / tasks_per_group);
            let all = panels_of(&group);
            let first = all.start + task % tasks_per_group * STREAMED_PANELS;
            let end = all.end.min(first + STREAMED_PANELS);
            let step = panels_per_call(group.rows.len());
            for panel in (first..end).step_by(step) {
                let block = GemmBlock {
                    rows: group.rows.clone(),
                    panels: panel..end.min(panel + step),
                    first_column: (panel - all.start) * LANES,
                };
                // SAFETY: a row belongs to one group, and the columns of a panel there to one task.
                unsafe { self.multiply(x, out, weight, None, &block) };
            }
        });
    }

    /// Rows of `cols` elements as packed pairs, padded with zeros as the weight's are.
    pub(crate) fn pack<'x>(
        &self,
        n_rows: usize,
        cols: usize,
        weight: &PackedWeight,
        row: impl Fn(usize) -> &'x [f32] + Sync,
    ) -> PackedRows {
        let n_steps = weight.n_steps;
        assert_eq!(cols, weight.cols, "activations of another width");
        assert!(
            packed_bytes(n_rows, n_steps) <= self.packed.memory.bytes(),
            "a product larger than planned"
        );
        let packed = PackedRows {
            start: self.packed.memory.as_ptr(),
            n_rows,
            n_steps,
        };
        let (simd, precision) = (self.simd, self.precision);
        let pack = |r: usize| {
            // SAFETY: row `r` is `n_steps` pairs inside the memory by the assertion, and one task's.
            let pairs = unsafe { std::slice::from_raw_parts_mut(packed.at(r, 0), n_steps) };
            simd.pack_pairs(precision, row(r), pairs);
            pairs[cols.div_ceil(elements_per_pair(precision))..].fill(0);
        };
        if n_rows * cols < PARALLEL_ELEMENTS {
            (0..n_rows).for_each(pack);
        } else {
            self.pool.run(n_rows, &|r, _| pack(r));
        }
        packed
    }

    /// # Safety
    /// Nobody else touches the block's columns of its rows of `out`, nor writes the packed activations meanwhile.
    unsafe fn multiply(
        &self,
        x: PackedRows,
        out: RowsView,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        block: &GemmBlock,
    ) {
        let (n_vectors, first_row) = (block.panels.len(), block.rows.start);
        if block.rows.is_empty() || block.panels.is_empty() {
            return;
        }
        assert!(
            x.n_steps == weight.n_steps
                && block.rows.end <= x.n_rows
                && block.panels.end <= weight.n_panels()
                && block.first_column + n_vectors * LANES <= out.stride,
            "a block outside its product"
        );
        for r in block.rows.clone() {
            // SAFETY: the columns lie in the row by the assertion, and are the caller's alone.
            let row = unsafe {
                std::slice::from_raw_parts_mut(
                    out.row_ptr(r).add(block.first_column),
                    n_vectors * LANES,
                )
            };
            row.fill(0.0);
            if let Some(bias) = bias {
                row.iter_mut()
                    .zip(&bias[block.first_column..])
                    .for_each(|(sum, bias)| *sum = *bias);
            }
        }
        let steps_per_call = if block.rows.len() <= STREAMED_ROWS {
            weight.n_steps
        } else {
            BLOCKED_STEPS
        };
        for step in (0..weight.n_steps).step_by(steps_per_call) {
            // SAFETY: `step` lies in the packed rows (`n_steps` long) and in the panels; rows, panels and columns lie in
            // their memory by the assertion, the columns of the output are the caller's alone. The kernel is one of
            // this machine's, and `n_steps` and its pieces are multiples of 16.
            unsafe {
                (self.tile)(&Tile {
                    a: x.at(first_row, step),
                    a_row: x.n_steps + LANES,
                    b: weight.panel(block.panels.start).add(step * LANES),
                    b_step: LANES,
                    b_vector: weight.panel_pairs(),
                    c: out.row_ptr(first_row).add(block.first_column),
                    c_row: out.stride,
                    n_rows: block.rows.len(),
                    n_vectors,
                    n_steps: steps_per_call.min(weight.n_steps - step),
                });
            }
        }
    }
}

fn panels_per_call(n_rows: usize) -> usize {
    if n_rows <= STREAMED_ROWS {
        STREAMED_PANELS
    } else {
        BLOCKED_PANELS
    }
}

/// Rows in the memory of [`PackedActivations`], until the next product packs its own.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows {
    start: *mut u32,
    n_rows: usize,
    n_steps: usize,
}

// SAFETY: it points into `PackedActivations`, which outlive the product; rows are written by one task each.
unsafe impl Send for PackedRows {}
// SAFETY: as above.
unsafe impl Sync for PackedRows {}

impl PackedRows {
    /// A row's pair of a step.
    fn at(self, row: usize, step: usize) -> *mut u32 {
        assert!(
            row < self.n_rows && step <= self.n_steps,
            "outside the packed activations"
        );
        // SAFETY: `pack` checked that all rows lie in the memory.
        unsafe { self.start.add(row * (self.n_steps + LANES) + step) }
    }
}
