//! Weight matrices, packed once at load: panels of 16 output rows, in which the packed pairs of one step of the inner
//! dimension lie together. A panel is one sequential stream for a single row of activations, a tile of `B` for many,
//! and has the form that AMX wants; the embedding reads single rows back out of it.
//!
//! Both dimensions are padded with zeros to 16. Elements are rounded to bf16 (f16, f32 and quantized weights lose
//! precision then) or converted to f32, as the device's precision says.

use super::mapping::Mapping;
use super::pool::Pool;
use super::simd::bf16_bits;
use super::tile::{LANES, elements_per_pair};
use crate::device::DeviceError;
use crate::shape::Precision;
use crate::stored::{Dtype, StoredMatrix, TensorView};

/// Steps packed at a time: a block of a panel that stays in the first cache.
const PACK_STEPS: usize = 64;

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct PackedWeight {
    pub(crate) n_rows: usize,
    pub(crate) cols: usize,
    /// Packed pairs along the inner dimension, padded to 16.
    pub(crate) n_steps: usize,
    precision: Precision,
    memory: Mapping,
}

impl PackedWeight {
    /// Bytes that a matrix of this shape takes.
    pub(crate) fn bytes_for(precision: Precision, n_rows: usize, cols: usize) -> usize {
        n_rows.next_multiple_of(LANES) * padded_steps(precision, cols) * size_of::<u32>()
    }

    /// A matrix of this shape that takes no memory: for a device that only counts.
    pub(crate) fn imagined(precision: Precision, n_rows: usize, cols: usize) -> Self {
        Self {
            n_rows,
            cols,
            n_steps: padded_steps(precision, cols),
            precision,
            memory: Mapping::imagined(Self::bytes_for(precision, n_rows, cols)),
        }
    }

    /// Packs the parts, stacked along the rows, on all threads.
    pub(crate) fn pack(
        pool: &Pool,
        precision: Precision,
        parts: &[StoredMatrix<'_>],
    ) -> Result<Self, DeviceError> {
        let (n_rows, cols) = stacked_shape(parts);
        for part in parts {
            assert_eq!(
                part.shape()[1],
                cols,
                "the parts of a weight differ in width"
            );
            part.assert_whole();
        }
        let memory = Mapping::new("a weight", Self::bytes_for(precision, n_rows, cols))?;
        let weight = Self {
            n_rows,
            cols,
            n_steps: padded_steps(precision, cols),
            precision,
            memory,
        };
        pool.run(weight.n_panels(), &|panel, _| {
            // SAFETY: panels are disjoint parts of the memory, and each is one task's.
            let pairs = unsafe {
                std::slice::from_raw_parts_mut(
                    weight.panel(panel).cast_mut(),
                    weight.n_steps * LANES,
                )
            };
            let mut dequantized = Vec::new();
            for lane in 0..LANES.min(n_rows - panel * LANES) {
                let (part, row) = stacked_row(parts, panel * LANES + lane);
                if let Some(view) = part.dense() {
                    pack_row(precision, view.dtype, view.row(row), lane, pairs);
                } else {
                    dequantized.resize(cols, 0.0);
                    part.read_row(row, &mut dequantized);
                    let bytes = bytemuck::cast_slice(&dequantized);
                    pack_row(precision, Dtype::F32, bytes, lane, pairs);
                }
            }
        });
        Ok(weight)
    }

    /// Vectors of output columns.
    pub(crate) fn n_panels(&self) -> usize {
        self.n_rows.div_ceil(LANES)
    }

    /// Packed pairs from one panel to the next.
    pub(crate) fn panel_pairs(&self) -> usize {
        self.n_steps * LANES
    }

    /// The first pair of a panel.
    pub(crate) fn panel(&self, panel: usize) -> *const u32 {
        assert!(
            panel < self.n_panels(),
            "panel {panel} of {}",
            self.n_panels()
        );
        // SAFETY: `bytes_for` counts `n_panels` panels of `panel_pairs` pairs.
        unsafe { self.memory.as_ptr::<u32>().add(panel * self.panel_pairs()) }
    }

    /// Reads a row back, as f32.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        // SAFETY: a panel holds `panel_pairs` pairs, and nobody writes them after `pack`.
        let pairs =
            unsafe { std::slice::from_raw_parts(self.panel(row / LANES), self.panel_pairs()) };
        let column = pairs.iter().skip(row % LANES).step_by(LANES);
        match self.precision {
            Precision::F32 => out
                .iter_mut()
                .zip(column)
                .for_each(|(out, pair)| *out = f32::from_bits(*pair)),
            Precision::BF16 => out.chunks_mut(2).zip(column).for_each(|(out, pair)| {
                out[0] = f32::from_bits(pair << 16);
                if let Some(second) = out.get_mut(1) {
                    *second = f32::from_bits(pair & 0xffff_0000);
                }
            }),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// The shape of the parts, stacked along the rows.
pub(crate) fn stacked_shape(parts: &[StoredMatrix<'_>]) -> (usize, usize) {
    let cols = parts.first().map_or(0, |part| part.shape()[1]);
    (parts.iter().map(|part| part.shape()[0]).sum(), cols)
}

/// The elements of a vector, or of all parts of one, as f32, each plus `offset`.
pub(crate) fn vector(parts: &[TensorView<'_>], offset: f32) -> Vec<f32> {
    let elements = |part: &TensorView<'_>| {
        let n = part.shape[1];
        (0..n).map(|i| part.at(0, i) + offset).collect::<Vec<f32>>()
    };
    parts.iter().flat_map(elements).collect()
}

fn padded_steps(precision: Precision, cols: usize) -> usize {
    cols.div_ceil(elements_per_pair(precision))
        .next_multiple_of(LANES)
}

/// The part that a row of the stack is in, and its row there.
fn stacked_row<'p, 'a>(
    parts: &'p [StoredMatrix<'a>],
    mut row: usize,
) -> (&'p StoredMatrix<'a>, usize) {
    for part in parts {
        if row < part.shape()[0] {
            return (part, row);
        }
        row -= part.shape()[0];
    }
    unreachable!("the row is below the sum of the parts' rows")
}

fn pack_row(precision: Precision, dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u32]) {
    let per_pair = elements_per_pair(precision);
    let blocks = panel
        .chunks_mut(PACK_STEPS * LANES)
        .zip(row.chunks(PACK_STEPS * per_pair * dtype.bytes()));
    for (block, bytes) in blocks {
        let pairs = block
            .iter_mut()
            .skip(lane)
            .step_by(LANES)
            .zip(bytes.chunks(per_pair * dtype.bytes()));
        match (precision, dtype) {
            (Precision::BF16, Dtype::BF16) => {
                for (pair, bytes) in pairs {
                    *pair = match *bytes {
                        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
                        _ => u32::from(u16::from_le_bytes([bytes[0], bytes[1]])),
                    };
                }
            }
            (Precision::BF16, _) => {
                for (pair, bytes) in pairs {
                    let high = if bytes.len() > dtype.bytes() {
                        bf16_bits(element(dtype, bytes, 1))
                    } else {
                        0
                    };
                    *pair = bf16_bits(element(dtype, bytes, 0)) | (high << 16);
                }
            }
            (Precision::F32, _) => {
                for (pair, bytes) in pairs {
                    *pair = element(dtype, bytes, 0).to_bits();
                }
            }
        }
    }
}

fn element(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    dtype.to_f32(&bytes[index * dtype.bytes()..][..dtype.bytes()])
}
