//! Tiles for AMX: 16 rows by 32 bf16 against 32 bf16 by 16 columns in one instruction, in inline assembly because
//! stable Rust has no intrinsics for it.
//!
//! Used for every product with weights, down to one row: AMX adds a pair before it adds it to the sum, unlike the
//! vector instruction, and a row must give the same bits in every batch.
#![cfg(target_arch = "x86_64")]

use super::{LANES, Tile};
use std::arch::asm;
use std::sync::OnceLock;

/// Steps (bf16 pairs) in a tile, and rows of one.
const SIDE: usize = 16;

/// Whether the machine has AMX for bf16 and the kernel lets this process use its registers.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // Leaf 7: bit 22 of edx is AMX-BF16, bit 24 AMX-TILE.
        let has_amx = std::arch::x86_64::__cpuid(0).eax >= 7
            && std::arch::x86_64::__cpuid_count(7, 0).edx & (1 << 22 | 1 << 24)
                == (1 << 22 | 1 << 24);
        has_amx && request_permission()
    })
}

/// Asks the kernel for the state that tiles need (Documentation/arch/x86/xstate.rst).
fn request_permission() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call changes this process's permission bits and touches no memory.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The 64 bytes of LDTILECFG: palette 1, then bytes a row and rows of each tile.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Tiles 0 to 3 are C (upper left, upper right, lower left, lower right), 4 and 5 are A (upper, lower), 6 and 7
    /// are B (left, right). The lower ones have at least a row, which nobody reads.
    fn new(upper: usize, lower: usize) -> Self {
        let (upper, lower) = (upper as u8, lower.max(1) as u8);
        let mut rows = [0; 16];
        rows[..8].copy_from_slice(&[
            upper, upper, lower, lower, upper, lower, SIDE as u8, SIDE as u8,
        ]);
        let mut row_bytes = [0; 16];
        row_bytes[..8].fill(64);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes,
            rows,
        }
    }
}

/// # Safety
/// As [`super::TileFn`] says; `n_steps` is a multiple of 16.
pub(super) unsafe fn tile_bf16(tile: &Tile) {
    debug_assert!(tile.n_steps.is_multiple_of(SIDE));
    let mut row = 0;
    while row < tile.n_rows {
        let upper = (tile.n_rows - row).min(SIDE);
        let lower = (tile.n_rows - row - upper).min(SIDE);
        let config = Config::new(upper, lower);
        // SAFETY: `config` is 64 valid bytes; tile registers are nobody else's here and released below.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags))
        };
        let mut vector = 0;
        while vector < tile.n_vectors {
            // SAFETY: rows `row..row + upper + lower` and the vectors named lie inside the tile.
            unsafe {
                match (lower, tile.n_vectors - vector) {
                    (0, 1) => part::<1, 1>(tile, row, vector),
                    (0, _) => part::<1, 2>(tile, row, vector),
                    (_, 1) => part::<2, 1>(tile, row, vector),
                    _ => part::<2, 2>(tile, row, vector),
                }
            }
            vector += 2;
        }
        row += upper + lower;
    }
    // SAFETY: returns the tile registers to their initial state, which keeps context switches cheap.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}

/// One or two tiles of rows by one or two vectors.
///
/// # Safety
/// As [`super::TileFn`] says; the part lies inside the tile, and the configuration in force has its rows.
unsafe fn part<const R: usize, const V: usize>(tile: &Tile, first: usize, vector: usize) {
    // SAFETY: tile loads and stores touch `rows` rows of 64 bytes at the given strides: 16 pairs of A at
    // `a[r * a_row + s..]`, 16 columns of B at `b[(s + i) * b_step + ..]`, 16 columns of C, all inside the tile. The
    // tile registers are declared to the compiler by nobody and used by nobody but this module.
    unsafe {
        let mut a = tile.a.add(first * tile.a_row);
        let mut b = tile.b.add(vector * tile.b_vector);
        let c = tile.c.add(first * tile.c_row + vector * LANES);
        let (a_row, b_row, c_row) = (4 * tile.a_row, 4 * tile.b_step, 4 * tile.c_row);
        let (a_lower, b_right) = (SIDE * tile.a_row, tile.b_vector);
        let c_lower = c.wrapping_add(SIDE * tile.c_row);
        asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c, s = in(reg) c_row, options(nostack));
        if V > 1 {
            asm!("tileloadd tmm1, [{c} + {s} + 64]", c = in(reg) c, s = in(reg) c_row, options(nostack));
        }
        if R > 1 {
            asm!("tileloadd tmm2, [{c} + {s}]", c = in(reg) c_lower, s = in(reg) c_row, options(nostack));
        }
        if R > 1 && V > 1 {
            asm!("tileloadd tmm3, [{c} + {s} + 64]", c = in(reg) c_lower, s = in(reg) c_row, options(nostack));
        }
        for _ in 0..tile.n_steps / SIDE {
            if R == 1 {
                prefetch(b, tile.b_step);
                if V > 1 {
                    prefetch(b.add(b_right), tile.b_step);
                }
            }
            asm!("tileloadd tmm6, [{b} + {s}]", b = in(reg) b, s = in(reg) b_row, options(nostack));
            asm!("tileloadd tmm4, [{a} + {s}]", a = in(reg) a, s = in(reg) a_row, options(nostack));
            asm!("tdpbf16ps tmm0, tmm4, tmm6", options(nostack, nomem));
            if V > 1 {
                let b = b.add(b_right);
                asm!("tileloadd tmm7, [{b} + {s}]", b = in(reg) b, s = in(reg) b_row, options(nostack));
                asm!("tdpbf16ps tmm1, tmm4, tmm7", options(nostack, nomem));
            }
            if R > 1 {
                let a = a.add(a_lower);
                asm!("tileloadd tmm5, [{a} + {s}]", a = in(reg) a, s = in(reg) a_row, options(nostack));
                asm!("tdpbf16ps tmm2, tmm5, tmm6", options(nostack, nomem));
            }
            if R > 1 && V > 1 {
                asm!("tdpbf16ps tmm3, tmm5, tmm7", options(nostack, nomem));
            }
            a = a.wrapping_add(SIDE);
            b = b.wrapping_add(SIDE * tile.b_step);
        }
        asm!("tilestored [{c} + {s}], tmm0", c = in(reg) c, s = in(reg) c_row, options(nostack));
        if V > 1 {
            asm!("tilestored [{c} + {s} + 64], tmm1", c = in(reg) c, s = in(reg) c_row, options(nostack));
        }
        if R > 1 {
            asm!("tilestored [{c} + {s}], tmm2", c = in(reg) c_lower, s = in(reg) c_row, options(nostack));
        }
        if R > 1 && V > 1 {
            asm!("tilestored [{c} + {s} + 64], tmm3", c = in(reg) c_lower, s = in(reg) c_row, options(nostack));
        }
    }
}

/// Fetches a tile of B two kilobytes ahead: one row of activations is bound by memory.
fn prefetch(b: *const u32, b_step: usize) {
    for step in 2 * SIDE..3 * SIDE {
        // SAFETY: a prefetch reads nothing and may point anywhere; SSE is part of x86-64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(step * b_step).cast());
        }
    }
}
