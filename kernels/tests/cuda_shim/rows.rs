//! The operations that work row by row, and those that move rows, blocks and table entries.

use crate::shim::{Noise, address, assert_near, bf16, launch, value};
use kvasir_kernels::cuda::kernel::{
    self, CopyBlocksArgs, EmbedArgs, GELU_TANH, GatedActivationArgs, GatherRowsArgs, Out,
    RmsNormArgs, SILU, UpdateTablesArgs,
};

/// One rounding to bfloat16 is at most 2^-8 of the value; the rest covers f32 sums of a few thousand terms.
const ROUNDED: f64 = 1.001 / 256.0;

/// Rows of `cols` values, padded with zeros to a multiple of 8.
fn padded(noise: &mut Noise, rows: usize, cols: usize) -> Vec<u16> {
    let stride = cols.next_multiple_of(8);
    let mut out = vec![0; rows * stride];
    for row in out.chunks_mut(stride) {
        row[..cols].copy_from_slice(&noise.bf16s(cols));
    }
    out
}

#[test]
fn embed_takes_known_and_sampled_tokens() {
    let mut noise = Noise(1);
    for (cols, scale) in [(1_usize, 1.0), (8, 10.0), (100, 1.0), (1032, 0.375)] {
        let stride = cols.next_multiple_of(8);
        let table = padded(&mut noise, 7, cols);
        let tokens = vec![0_u32, 6, 1 << 31 | 1, 3];
        let previous = vec![4_u32, 5];
        let mut out = vec![0xffff_u16; tokens.len() * stride];
        let args = EmbedArgs {
            out: address(out.as_mut_ptr()),
            table: address(table.as_ptr()),
            tokens: address(tokens.as_ptr()),
            previous: address(previous.as_ptr()),
            chunks: stride as u32 / 8,
            out_stride: stride as u32,
            table_stride: stride as u32,
            scale,
        };
        // SAFETY: every vector holds what the fields above say.
        unsafe { launch(kernel::embed(tokens.len()), 1, &args) };
        let want: Vec<u16> = [0, 6, 5, 3]
            .iter()
            .flat_map(|&t| &table[t * stride..][..stride])
            .map(|&x| bf16(value(x) as f32 * scale))
            .collect();
        assert_eq!(out, want, "{cols} columns");
    }
}

#[test]
fn gather_takes_rows_by_index() {
    let x = padded(&mut Noise(2), 5, 1100);
    let stride = x.len() / 5;
    let index = vec![4_u32, 0, 4];
    let mut out = vec![0xffff_u16; index.len() * stride];
    let args = GatherRowsArgs {
        out: address(out.as_mut_ptr()),
        x: address(x.as_ptr()),
        index: address(index.as_ptr()),
        chunks: stride as u32 / 8,
        out_stride: stride as u32,
        x_stride: stride as u32,
        unused: 0,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::gather_rows(index.len()), 1, &args) };
    let want: Vec<u16> = index
        .iter()
        .flat_map(|&i| &x[i as usize * stride..][..stride])
        .copied()
        .collect();
    assert_eq!(out, want);
}

/// Gathers into too little memory: the sanitizer must end the process.
pub(crate) fn overrun() {
    let x = [0_u16; 64];
    let index = [0_u32, 0];
    let mut out = vec![0_u16; 64 + 56];
    let args = GatherRowsArgs {
        out: address(out.as_mut_ptr()),
        x: address(x.as_ptr()),
        index: address(index.as_ptr()),
        chunks: 8,
        out_stride: 64,
        x_stride: 64,
        unused: 0,
    };
    // SAFETY: none: 16 bytes are written past `out`. Only called where the sanitizer stops them.
    unsafe { launch(kernel::gather_rows(2), 1, &args) };
}

#[test]
fn blocks_are_copied_in_every_place() {
    let (places, blocks, block) = (3, 4, 264);
    let before = Noise(3).bf16s(places * blocks * block);
    let mut cache = before.clone();
    let pairs = vec![0_u32, 3, 2, 1];
    let args = CopyBlocksArgs {
        cache: address(cache.as_mut_ptr()),
        pairs: address(pairs.as_ptr()),
        chunks_per_place: (blocks * block / 8) as u64,
        chunks_per_block: block as u32 / 8,
        unused: 0,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::copy_blocks(2, places), 1, &args) };
    for (i, &element) in cache.iter().enumerate() {
        let (place, at, within) = (i / block / blocks, i / block % blocks, i % block);
        let from = [0, 2, 2, 0][at];
        assert_eq!(element, before[(place * blocks + from) * block + within]);
    }
}

#[test]
fn table_entries_are_scattered() {
    let mut tables = vec![7_u32; 300];
    let changes: Vec<u32> = (0..130).flat_map(|i| [299 - 2 * i, i]).collect();
    let args = UpdateTablesArgs {
        tables: address(tables.as_mut_ptr()),
        changes: address(changes.as_ptr()),
        n: 130,
        unused: 0,
    };
    // SAFETY: every vector holds what the fields above say.
    unsafe { launch(kernel::update_tables(130), 1, &args) };
    for (i, &entry) in tables.iter().enumerate() {
        let changed = i % 2 == 1 && i >= 299 - 2 * 129;
        assert_eq!(entry, if changed { (299 - i as u32) / 2 } else { 7 });
    }
}

#[test]
fn gated_activations_are_close() {
    let mut noise = Noise(4);
    let activations = [SILU, GELU_TANH];
    for (n, activation) in [1, 8, 13, 1032, 1035]
        .iter()
        .flat_map(|&n| activations.map(|a| (n, a)))
    {
        let (rows, in_stride, out_stride) = (
            3,
            (2 * n as usize).next_multiple_of(8),
            (n as usize).next_multiple_of(8),
        );
        let gate_up: Vec<u16> = (0..rows * in_stride)
            .map(|_| bf16(noise.unit() * 20.0))
            .collect();
        let mut out = vec![0_u16; rows * out_stride];
        let args = GatedActivationArgs {
            out: address(out.as_mut_ptr()),
            gate_up: address(gate_up.as_ptr()),
            n,
            out_stride: out_stride as u32,
            in_stride: in_stride as u32,
            activation,
        };
        // SAFETY: every vector holds what the fields above say.
        unsafe { launch(kernel::gated_activation(rows, n as usize), 1, &args) };
        for (row, out) in gate_up.chunks(in_stride).zip(out.chunks(out_stride)) {
            let want: Vec<f64> = (0..n as usize)
                .map(|i| {
                    let (gate, up) = (value(row[i]), value(row[n as usize + i]));
                    let inner = (2.0 / std::f64::consts::PI).sqrt();
                    let gated = match activation {
                        SILU => gate / (1.0 + (-gate).exp()),
                        _ => gate / 2.0 * (1.0 + (inner * (gate + 0.044715 * gate.powi(3))).tanh()),
                    };
                    gated * up
                })
                .collect();
            // What is left of 1 + tanh far below zero is noise of f32.
            assert_near("gated activation", &out[..n as usize], &want, |want| {
                want.abs() * ROUNDED + if activation == SILU { 1e-30 } else { 1e-4 }
            });
        }
    }
}

#[test]
fn rms_norm_is_close_with_and_without_the_addition() {
    let mut noise = Noise(5);
    for (cols, add, seed) in [
        (1, true, 1),
        (8, false, 2),
        (100, true, 3),
        (2056, false, 4),
        (4100, true, 5),
    ] {
        let (rows, stride) = (2, (cols as usize).next_multiple_of(8));
        let x = padded(&mut noise, rows, cols as usize);
        let before = padded(&mut noise, rows, cols as usize);
        let mut residual = before.clone();
        let mut weight = vec![0.0_f32; stride];
        weight[..cols as usize].fill_with(|| noise.unit());
        let mut out = vec![0xffff_u16; rows * stride];
        let args = RmsNormArgs {
            out: address(out.as_mut_ptr()),
            residual: if add {
                address(residual.as_mut_ptr())
            } else {
                Out::NULL
            },
            x: address(x.as_ptr()),
            weight: address(weight.as_ptr()),
            cols,
            chunks: stride as u32 / 8,
            out_stride: stride as u32,
            residual_stride: stride as u32,
            x_stride: stride as u32,
            epsilon: 1e-5,
        };
        // SAFETY: every vector holds what the fields above say.
        unsafe { launch(kernel::rms_norm(rows), seed, &args) };
        let summed: Vec<u16> = if add {
            x.iter()
                .zip(&before)
                .map(|(&a, &b)| bf16((value(a) + value(b)) as f32))
                .collect()
        } else {
            assert_eq!(residual, before, "nothing is added");
            x.clone()
        };
        if add {
            assert_eq!(residual, summed, "{cols} columns: the residual");
        }
        let mut want = Vec::new();
        for row in summed.chunks(stride) {
            let squares: f64 = row.iter().map(|&v| value(v) * value(v)).sum();
            let inverse = 1.0 / (squares / f64::from(cols) + 1e-5).sqrt();
            want.extend(
                row.iter()
                    .zip(&weight)
                    .map(|(&v, &w)| value(v) * inverse * f64::from(w)),
            );
        }
        assert_near("rms_norm", &out, &want, |want| want.abs() * ROUNDED);
    }
}
