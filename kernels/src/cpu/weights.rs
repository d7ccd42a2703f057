//! Weight matrices, packed once at load: panels of 16 output rows, in which the units of one step of the inner
//! dimension lie together. A panel is one sequential stream for a single row of activations, a tile of `B` for many,
//! and has the form that AMX wants; the embedding reads single rows back out of it.
//!
//! Both dimensions are padded with zeros to 16. Elements are rounded to bf16 (f16 and f32 weights lose precision then)
//! or widened to f32, as the device's precision says.

use super::lanes::bf16_bits;
use super::pages::Pages;
use super::pool::Pool;
use super::tile::{LANES, elements_per_unit};
use crate::device::{DeviceError, Dtype, Precision, TensorView};

/// Steps packed at a time: a block of a panel that stays in the first cache.
const PACK_STEPS: usize = 64;

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct PackedWeight {
    pub(crate) n_rows: usize,
    pub(crate) cols: usize,
    /// Units along the inner dimension, padded to 16.
    pub(crate) n_steps: usize,
    precision: Precision,
    pages: Pages,
}

impl PackedWeight {
    /// Bytes that a matrix of this shape takes.
    pub(crate) fn bytes_for(precision: Precision, n_rows: usize, cols: usize) -> usize {
        n_rows.next_multiple_of(LANES) * padded_steps(precision, cols) * size_of::<u32>()
    }

    /// Packs the parts, stacked along the rows, on all threads.
    pub(crate) fn pack(
        pool: &Pool,
        precision: Precision,
        parts: &[TensorView<'_>],
    ) -> Result<Self, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape[1]);
        for part in parts {
            assert_eq!(part.shape[1], cols, "the parts of a weight differ in width");
            assert_eq!(
                part.bytes.len(),
                part.shape[0] * cols * part.dtype.bytes(),
                "a tensor of another size"
            );
        }
        let n_rows = parts.iter().map(|part| part.shape[0]).sum();
        let pages = Pages::new("a weight", Self::bytes_for(precision, n_rows, cols))?;
        let weight = Self {
            n_rows,
            cols,
            n_steps: padded_steps(precision, cols),
            precision,
            pages,
        };
        pool.run(weight.n_panels(), &|panel, _| {
            // SAFETY: panels are disjoint parts of the pages, and each is one task's.
            let units = unsafe {
                std::slice::from_raw_parts_mut(
                    weight.panel(panel).cast_mut(),
                    weight.n_steps * LANES,
                )
            };
            for lane in 0..LANES.min(n_rows - panel * LANES) {
                let (dtype, row) = stacked_row(parts, panel * LANES + lane);
                pack_row(precision, dtype, row, lane, units);
            }
        });
        Ok(weight)
    }

    /// Vectors of output columns.
    pub(crate) fn n_panels(&self) -> usize {
        self.n_rows.div_ceil(LANES)
    }

    /// Units from one panel to the next.
    pub(crate) fn panel_units(&self) -> usize {
        self.n_steps * LANES
    }

    /// The first unit of a panel.
    pub(crate) fn panel(&self, panel: usize) -> *const u32 {
        assert!(
            panel < self.n_panels(),
            "panel {panel} of {}",
            self.n_panels()
        );
        // SAFETY: `bytes_for` counts `n_panels` panels of `panel_units` units.
        unsafe { self.pages.as_ptr::<u32>().add(panel * self.panel_units()) }
    }

    /// Reads a row back, as f32.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        // SAFETY: a panel holds `panel_units` units, and nobody writes them after `pack`.
        let units =
            unsafe { std::slice::from_raw_parts(self.panel(row / LANES), self.panel_units()) };
        let column = units.iter().skip(row % LANES).step_by(LANES);
        match self.precision {
            Precision::F32 => out
                .iter_mut()
                .zip(column)
                .for_each(|(out, unit)| *out = f32::from_bits(*unit)),
            Precision::BF16 => out.chunks_mut(2).zip(column).for_each(|(pair, unit)| {
                pair[0] = f32::from_bits(unit << 16);
                if let Some(second) = pair.get_mut(1) {
                    *second = f32::from_bits(unit & 0xffff_0000);
                }
            }),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages.bytes()
    }
}

/// The elements of a vector, or of all parts of one, as f32.
pub(crate) fn widen(parts: &[TensorView<'_>]) -> Vec<f32> {
    let elements = |part: &TensorView<'_>| {
        let (dtype, bytes) = (part.dtype, part.bytes.to_vec());
        (0..bytes.len() / dtype.bytes())
            .map(move |i| element(dtype, &bytes, i))
            .collect::<Vec<_>>()
    };
    parts.iter().flat_map(elements).collect()
}

fn padded_steps(precision: Precision, cols: usize) -> usize {
    cols.div_ceil(elements_per_unit(precision))
        .next_multiple_of(LANES)
}

fn stacked_row<'a>(parts: &[TensorView<'a>], mut row: usize) -> (Dtype, &'a [u8]) {
    for part in parts {
        if row < part.shape[0] {
            let bytes = part.shape[1] * part.dtype.bytes();
            return (part.dtype, &part.bytes[row * bytes..][..bytes]);
        }
        row -= part.shape[0];
    }
    unreachable!("the row is below the sum of the parts' rows")
}

fn pack_row(precision: Precision, dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u32]) {
    let per_unit = elements_per_unit(precision);
    let blocks = panel
        .chunks_mut(PACK_STEPS * LANES)
        .zip(row.chunks(PACK_STEPS * per_unit * dtype.bytes()));
    for (block, bytes) in blocks {
        let units = block
            .iter_mut()
            .skip(lane)
            .step_by(LANES)
            .zip(bytes.chunks(per_unit * dtype.bytes()));
        match (precision, dtype) {
            (Precision::BF16, Dtype::BF16) => {
                for (unit, pair) in units {
                    *unit = match *pair {
                        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
                        _ => u32::from(u16::from_le_bytes([pair[0], pair[1]])),
                    };
                }
            }
            (Precision::BF16, _) => {
                for (unit, pair) in units {
                    let high = if pair.len() > dtype.bytes() {
                        bf16_bits(element(dtype, pair, 1))
                    } else {
                        0
                    };
                    *unit = bf16_bits(element(dtype, pair, 0)) | (high << 16);
                }
            }
            (Precision::F32, _) => {
                for (unit, bytes) in units {
                    *unit = element(dtype, bytes, 0).to_bits();
                }
            }
        }
    }
}

fn element(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    dtype.widen(&bytes[index * dtype.bytes()..][..dtype.bytes()])
}
