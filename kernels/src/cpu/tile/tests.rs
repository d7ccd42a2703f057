//! Every kernel against f64, at edge shapes, and cut up in every way against itself.

use super::*;
use proptest::prelude::*;

struct Case {
    n_rows: usize,
    n_vectors: usize,
    n_steps: usize,
    a: Vec<u32>,
    b: Vec<u32>,
    c: Vec<f32>,
}

fn bits(precision: Precision, value: f32) -> u32 {
    match precision {
        Precision::F32 => value.to_bits(),
        Precision::BF16 => u32::from(half::bf16::from_f32(value).to_bits()),
    }
}

impl Case {
    fn new(precision: Precision, n_rows: usize, n_vectors: usize, n_steps: usize) -> Self {
        let mut state = (n_rows * 31 + n_vectors * 7 + n_steps) as u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let mut pair = || match precision {
            Precision::F32 => bits(precision, next()),
            Precision::BF16 => bits(precision, next()) | bits(precision, next()) << 16,
        };
        let a = (0..n_rows * n_steps).map(|_| pair()).collect();
        let b = (0..n_vectors * n_steps * LANES).map(|_| pair()).collect();
        let c = (0..n_rows * n_vectors * LANES)
            .map(|i| (i % 5) as f32)
            .collect();
        Self {
            n_rows,
            n_vectors,
            n_steps,
            a,
            b,
            c,
        }
    }

    fn tile(&mut self) -> Tile {
        Tile {
            a: self.a.as_ptr(),
            a_row: self.n_steps,
            b: self.b.as_ptr(),
            b_step: LANES,
            b_vector: self.n_steps * LANES,
            c: self.c.as_mut_ptr(),
            c_row: self.n_vectors * LANES,
            n_rows: self.n_rows,
            n_vectors: self.n_vectors,
            n_steps: self.n_steps,
        }
    }

    fn exact(&self, precision: Precision, r: usize, column: usize) -> f64 {
        let elements = |pair: u32| match precision {
            Precision::F32 => vec![f64::from(f32::from_bits(pair))],
            Precision::BF16 => vec![
                f64::from(f32::from_bits(pair << 16)),
                f64::from(f32::from_bits(pair & !0xffff)),
            ],
        };
        let mut sum = f64::from(self.c[r * self.n_vectors * LANES + column]);
        for s in 0..self.n_steps {
            let b = self.b[((column / LANES) * self.n_steps + s) * LANES + column % LANES];
            sum += elements(self.a[r * self.n_steps + s])
                .iter()
                .zip(elements(b))
                .map(|(a, b)| a * b)
                .sum::<f64>();
        }
        sum
    }
}

fn run(kernel: TileFn, case: &mut Case) {
    let tile = case.tile();
    // SAFETY: the case's vectors cover its tile, and the kernel is one that this machine has.
    unsafe { kernel(&tile) };
}

#[test]
fn every_kernel_agrees_with_f64() {
    for precision in [Precision::BF16, Precision::F32] {
        for isa in Isa::available(Numerics::uniform(precision)) {
            for n_rows in (0..=26).chain([33, 47]) {
                for (n_vectors, n_steps) in [
                    (1, 16),
                    (2, 32),
                    (3, 48),
                    (5, 16),
                    (8, 16),
                    (11, 64),
                    (1, 0),
                ] {
                    for (kernel, n_steps) in [
                        (isa.weight_tile(precision), n_steps),
                        (isa.tile(precision), n_steps),
                        (isa.tile(precision), n_steps / 2 + 1),
                    ] {
                        let mut case = Case::new(precision, n_rows, n_vectors, n_steps);
                        let exact: Vec<f64> = (0..n_rows * n_vectors * LANES)
                            .map(|i| {
                                case.exact(
                                    precision,
                                    i / (n_vectors * LANES),
                                    i % (n_vectors * LANES),
                                )
                            })
                            .collect();
                        run(kernel, &mut case);
                        for (got, want) in case.c.iter().zip(exact) {
                            // Gemm are exact in bf16; up to 130 additions of magnitude below 16 round by 2^-24 each.
                            let tolerance = 130.0 * 16.0 * 2f64.powi(-24);
                            assert!(
                                (f64::from(*got) - want).abs() < tolerance,
                                "{isa:?} {precision:?} {n_rows}x{n_vectors}x{n_steps}: {got}, want {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn cutting_a_tile_changes_no_bit(
        n_rows in 1usize..40, n_vectors in 1usize..12, sixteenths in 1usize..6,
        row in 0usize..40, vector in 0usize..12, cut in 0usize..6,
    ) {
        let (row, vector, cut) = (row % n_rows, vector % n_vectors, 16 * (cut % sixteenths));
        for precision in [Precision::BF16, Precision::F32] {
            for isa in Isa::available(Numerics::uniform(precision)) {
                for kernel in [isa.weight_tile(precision), isa.tile(precision)] {
                    let mut whole = Case::new(precision, n_rows, n_vectors, 16 * sixteenths);
                    let mut parts = Case::new(precision, n_rows, n_vectors, 16 * sixteenths);
                    run(kernel, &mut whole);
                    // One element's row and vector alone, and its inner dimension in two calls.
                    let tile = parts.tile();
                    for (first, n_steps) in [(0, cut), (cut, 16 * sixteenths - cut)] {
                        // SAFETY: a part of a tile that the case's vectors cover.
                        unsafe {
                            kernel(&Tile {
                                a: tile.a.add(row * tile.a_row + first),
                                b: tile.b.add(vector * tile.b_vector + first * tile.b_step),
                                c: tile.c.add(row * tile.c_row + vector * LANES),
                                n_rows: 1, n_vectors: 1, n_steps, ..tile
                            });
                        }
                    }
                    let at = row * n_vectors * LANES + vector * LANES;
                    let bits = |c: &[f32]| c[at..at + LANES].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(&whole.c), bits(&parts.c), "{:?} {:?}", isa, precision);
                }
            }
        }
    }
}
