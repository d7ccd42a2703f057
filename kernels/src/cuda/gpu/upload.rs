//! Weights on their way up: threads fill one piece of pinned memory while another is copied.

use cudarc::driver::result;
use cudarc::driver::sys::CUstream;

use crate::device::DeviceError;

use super::super::driver::{Driver, FillRow, Pinned};
use super::Gpu;
use super::context::{Event, failed};

const PIECE_BYTES: usize = 32 << 20;
/// One is filled, one is copied, and one gives the copy time to end: filling is slower than the link.
const N_PIECES: usize = 3;
/// Below this one thread is quicker than many.
const BYTES_OF_A_THREAD: usize = 1 << 20;

pub(super) struct Staging {
    pieces: Vec<Piece>,
    next: usize,
    n_threads: usize,
}

struct Piece {
    memory: Pinned,
    /// Recorded behind the piece's last copy.
    copied: Event,
}

impl Staging {
    pub(super) fn new(gpu: &mut Gpu) -> Result<Self, DeviceError> {
        let mut piece = || {
            Ok(Piece {
                memory: gpu.pinned(PIECE_BYTES)?,
                copied: Event::new(&gpu.context)?,
            })
        };
        let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(12));
        Ok(Self {
            pieces: (0..N_PIECES).map(|_| piece()).collect::<Result<_, _>>()?,
            next: 0,
            n_threads,
        })
    }

    pub(super) fn upload(
        &mut self,
        stream: CUstream,
        to: u64,
        n_rows: usize,
        row_bytes: usize,
        fill: FillRow<'_>,
    ) -> Result<(), DeviceError> {
        if n_rows == 0 || row_bytes == 0 {
            return Ok(());
        }
        let rows_of_a_piece = PIECE_BYTES / row_bytes;
        if rows_of_a_piece == 0 {
            return Err(DeviceError::Unsupported {
                device: "cuda",
                what: format!("a row of {row_bytes} bytes, {PIECE_BYTES} at most"),
            });
        }
        for first in (0..n_rows).step_by(rows_of_a_piece) {
            let rows = rows_of_a_piece.min(n_rows - first);
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % N_PIECES;
            // SAFETY: the event is valid; one that was never recorded counts as past.
            unsafe { result::event::synchronize(piece.copied.raw()) }
                .map_err(|error| failed("uploading", error))?;
            let bytes = &mut piece.memory.bytes_mut()[..rows * row_bytes];
            fill_rows(bytes, row_bytes, first, self.n_threads, fill);
            // SAFETY: the destination has room for all rows, as the caller has checked; the source is pinned, and is not
            // touched again before the event.
            unsafe {
                let to = to + (first * row_bytes) as u64;
                result::memcpy_htod_async(to, bytes, stream)
                    .and_then(|()| result::event::record(piece.copied.raw(), stream))
            }
            .map_err(|error| failed("uploading", error))?;
        }
        Ok(())
    }
}

fn fill_rows(
    bytes: &mut [u8],
    row_bytes: usize,
    first: usize,
    n_threads: usize,
    fill: FillRow<'_>,
) {
    let fill_part = |first: usize, part: &mut [u8]| {
        for (r, row) in part.chunks_exact_mut(row_bytes).enumerate() {
            fill(first + r, row);
        }
    };
    if bytes.len() < BYTES_OF_A_THREAD {
        return fill_part(first, bytes);
    }
    let rows = (bytes.len() / row_bytes).div_ceil(n_threads);
    std::thread::scope(|scope| {
        for (i, part) in bytes.chunks_mut(rows * row_bytes).enumerate() {
            scope.spawn(move || fill_part(first + i * rows, part));
        }
    });
}
