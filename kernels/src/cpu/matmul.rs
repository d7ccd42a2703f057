//! Products with weights: how a product is cut into tasks and calls of a tile kernel.
//!
//! Each weight is read from memory once, whatever the number of rows: a task takes a few panels and runs all rows over
//! them. With more rows than a kernel keeps in registers the inner dimension is cut, so that the piece of the panels
//! at hand stays in the first cache while the rows pass. Sums are kept in the output between the pieces: cutting
//! changes no bit.

use super::lanes::Lanes;
use super::pages::Pages;
use super::pool::Pool;
use super::rows::RowsView;
use super::tile::{LANES, Tile, TileFn};
use super::weights::PackedWeight;
use crate::device::{DeviceError, Precision};

/// Rows up to which panels are streamed whole.
const STREAMED_ROWS: usize = 12;
/// Panels of a task: for streaming, as many as one call keeps sums for; otherwise few, to fit the caches.
const STREAMED_PANELS: usize = 8;
const BLOCKED_PANELS: usize = 4;
/// Steps of a piece: 16 KB a panel.
const BLOCKED_STEPS: usize = 256;
/// Elements above which rounding the activations is worth all threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// The activations of one product, rounded and in units.
#[derive(Debug)]
pub(crate) struct Factors {
    pages: Pages,
}

/// Room for the factors of `max_rows` rows of `n_steps` units. Rows lie a cache line more than that apart: a distance
/// of a multiple of 4 KB would put all rows into the same few sets of the first cache.
pub(crate) fn factors_bytes(max_rows: usize, n_steps: usize) -> usize {
    max_rows * (n_steps + LANES) * size_of::<u32>()
}

impl Factors {
    /// Room for the largest product.
    pub(crate) fn new(bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            pages: Pages::new("rounded activations", bytes)?,
        })
    }
}

/// What a product needs beside its operands.
pub(crate) struct Products<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) lanes: &'static Lanes,
    pub(crate) tile: TileFn,
    pub(crate) precision: Precision,
    pub(crate) factors: &'a Factors,
}

impl Products<'_> {
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
        let factors = self.round(x, weight.n_steps);
        let streamed = x.n_rows <= STREAMED_ROWS;
        let panels_per_task = if streamed {
            STREAMED_PANELS
        } else {
            BLOCKED_PANELS
        };
        let steps_per_call = if streamed {
            weight.n_steps
        } else {
            BLOCKED_STEPS
        };
        let tile = self.tile;
        self.pool
            .run(weight.n_panels().div_ceil(panels_per_task), &|task, _| {
                let first = task * panels_per_task;
                let n_vectors = panels_per_task.min(weight.n_panels() - first);
                for r in 0..out.n_rows {
                    // SAFETY: rows are padded to whole vectors, of which this task alone has these.
                    let row = unsafe {
                        std::slice::from_raw_parts_mut(
                            out.row_ptr(r).add(first * LANES),
                            n_vectors * LANES,
                        )
                    };
                    row.fill(0.0);
                    if let Some(bias) = bias {
                        row.iter_mut()
                            .zip(&bias[first * LANES..])
                            .for_each(|(sum, bias)| *sum = *bias);
                    }
                }
                if out.n_rows == 0 {
                    return;
                }
                for step in (0..weight.n_steps).step_by(steps_per_call) {
                    // SAFETY: `step` lies in the rows of factors (`n_steps` long) and in the panels; the columns of `out`
                    // are this task's. The kernel is one of this machine's, and `n_steps` and its pieces are multiples
                    // of 16.
                    unsafe {
                        tile(&Tile {
                            a: factors.at(step),
                            a_row: weight.n_steps + LANES,
                            b: weight.panel(first).add(step * LANES),
                            b_step: LANES,
                            b_vector: weight.panel_units(),
                            c: out.row_ptr(0).add(first * LANES),
                            c_row: out.stride,
                            n_rows: out.n_rows,
                            n_vectors,
                            n_steps: steps_per_call.min(weight.n_steps - step),
                        });
                    }
                }
            });
    }

    /// The rows as units, padded with zeros to `n_steps`.
    fn round(&self, x: RowsView, n_steps: usize) -> SharedUnits {
        assert!(
            factors_bytes(x.n_rows, n_steps) <= self.factors.pages.bytes(),
            "a product larger than planned"
        );
        let units = SharedUnits(self.factors.pages.as_ptr());
        let (lanes, precision) = (self.lanes, self.precision);
        let round = |r: usize| {
            // SAFETY: row `r` of the factors is `n_steps` units at `r * (n_steps + LANES)`, inside the pages by the
            // assertion; each row is one task's, and nobody writes `x`.
            unsafe {
                let row = std::slice::from_raw_parts_mut(units.at(r * (n_steps + LANES)), n_steps);
                lanes.to_units(precision, x.row(r), row);
                let used = x.cols.div_ceil(super::tile::elements_per_unit(precision));
                row[used..].fill(0);
            }
        };
        if x.n_rows * x.cols < PARALLEL_ELEMENTS {
            (0..x.n_rows).for_each(round);
        } else {
            self.pool.run(x.n_rows, &|r, _| round(r));
        }
        units
    }
}

/// The factors' first unit.
#[derive(Clone, Copy)]
struct SharedUnits(*mut u32);

// SAFETY: it points into `Factors`, which outlive the product; rows are written by one task each.
unsafe impl Send for SharedUnits {}
// SAFETY: as above.
unsafe impl Sync for SharedUnits {}

impl SharedUnits {
    /// # Safety
    /// `offset` lies inside the factors.
    unsafe fn at(self, offset: usize) -> *mut u32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}
