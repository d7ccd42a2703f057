//! Activations: row-major f32 matrices in the workspace, and views of them that tasks share.
//!
//! Rows are padded to whole vectors of 16 columns, so that kernels store vectors without masks; the padding holds
//! whatever the kernels leave there and is never read as a value.

use super::pages::Pages;
use super::tile::LANES;
use crate::device::{DeviceError, Rows};

/// A planned buffer.
#[derive(Debug)]
pub(crate) struct Activations {
    pub(crate) rows: Rows,
    cols: usize,
    stride: usize,
    pages: Pages,
}

impl Activations {
    /// Room for `max_rows` rows of `cols` elements.
    pub(crate) fn new(rows: Rows, max_rows: usize, cols: usize) -> Result<Self, DeviceError> {
        let stride = cols.next_multiple_of(LANES);
        let pages = Pages::new("an activation buffer", max_rows * stride * size_of::<f32>())?;
        Ok(Self {
            rows,
            cols,
            stride,
            pages,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// The first `n_rows` rows. They must be within the rows planned.
    pub(crate) fn view(&self, n_rows: usize) -> RowsView {
        assert!(
            n_rows * self.stride * size_of::<f32>() <= self.pages.bytes(),
            "more rows than planned"
        );
        RowsView {
            start: self.pages.as_ptr(),
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

// SAFETY: it points into `Pages`, which outlive every loop; making slices is unsafe and has its own proof.
unsafe impl Send for RowsView {}
// SAFETY: as above.
unsafe impl Sync for RowsView {}

impl RowsView {
    /// The first element of a row, its padding included behind it.
    pub(crate) fn row_ptr(self, row: usize) -> *mut f32 {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        // SAFETY: the row lies in the buffer, as `Activations::view` checked.
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
}
