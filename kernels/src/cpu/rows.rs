//! ActivationBuffer: row-major f32 matrices in the workspace, and views of them that tasks share.
//!
//! Rows are padded to whole vectors of 16 columns, so that kernels store vectors without masks; the padding holds
//! whatever the kernels leave there and is never read as a value.

use super::mapping::Mapping;
use super::tile::LANES;
use crate::device::{DeviceError, Rows};

/// A planned buffer.
#[derive(Debug)]
pub(crate) struct ActivationBuffer {
    pub(crate) rows: Rows,
    cols: usize,
    stride: usize,
    memory: Mapping,
}

impl ActivationBuffer {
    /// Room for `max_rows` rows of `cols` elements.
    pub(crate) fn new(rows: Rows, max_rows: usize, cols: usize) -> Result<Self, DeviceError> {
        let stride = cols.next_multiple_of(LANES);
        let memory = Mapping::new("an activation buffer", Self::bytes_for(max_rows, cols))?;
        Ok(Self {
            rows,
            cols,
            stride,
            memory,
        })
    }

    /// The same without any memory: for a device that only counts.
    pub(crate) fn imagined(rows: Rows, max_rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            stride: cols.next_multiple_of(LANES),
            memory: Mapping::imagined(Self::bytes_for(max_rows, cols)),
        }
    }

    /// Bytes that it takes.
    pub(crate) fn bytes_for(max_rows: usize, cols: usize) -> usize {
        max_rows * cols.next_multiple_of(LANES) * size_of::<f32>()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The first `n_rows` rows. They must be within the rows planned.
    pub(crate) fn view(&self, n_rows: usize) -> RowsView {
        assert!(
            n_rows * self.stride * size_of::<f32>() <= self.memory.bytes(),
            "more rows than planned"
        );
        RowsView {
            start: self.memory.as_ptr(),
            stride: self.stride,
            cols: self.cols,
            n_rows,
        }
    }
}

/// Rows that the tasks of one parallel loop read or write. Copyable, like a pointer, and as careless: who makes slices
/// of it proves that nobody writes a row that another has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowsView {
    start: *mut f32,
    pub(crate) stride: usize,
    pub(crate) cols: usize,
    pub(crate) n_rows: usize,
}

// SAFETY: it points into `Mapping`, which outlives every loop; making slices is unsafe and has its own proof.
unsafe impl Send for RowsView {}
// SAFETY: as above.
unsafe impl Sync for RowsView {}

impl RowsView {
    /// The first element of a row, its padding included behind it.
    pub(crate) fn row_ptr(self, row: usize) -> *mut f32 {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        // SAFETY: the row lies in the buffer, as `ActivationBuffer::view` checked.
        unsafe { self.start.add(row * self.stride) }
    }

    /// # Safety
    /// The buffer is alive, and nobody writes the row as long as the slice lives.
    pub(crate) unsafe fn row<'a>(self, row: usize) -> &'a [f32] {
        // SAFETY: in bounds by `row_ptr`, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.row_ptr(row), self.cols) }
    }

    /// # Safety
    /// The buffer is alive, and nobody else reads or writes the row as long as the slice lives.
    pub(crate) unsafe fn row_mut<'a>(self, row: usize) -> &'a mut [f32] {
        // SAFETY: in bounds by `row_ptr`, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.row_ptr(row), self.cols) }
    }

    /// All rows, one after another.
    ///
    /// # Safety
    /// The buffer is alive, and nobody writes its rows meanwhile.
    pub(crate) unsafe fn to_vec(self) -> Vec<f32> {
        // SAFETY: the caller's promise.
        (0..self.n_rows)
            .flat_map(|r| unsafe { self.row(r) }.to_vec())
            .collect()
    }
}
