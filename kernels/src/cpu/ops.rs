//! The operations of a forward pass on the CPU: which views an operation reads and writes, and how its rows are cut
//! into tasks.

use super::attention::{Attention, cut_tiles};
use super::matmul::Products;
use super::rows::RowsView;
use super::{Pass, Running};
use crate::device::{AttentionShape, Buffer, Ops, Rows, StepInput, StepOutput, Vector, Weight};
use crate::sampling::sample_row;
use std::mem;
use std::sync::{Mutex, PoisonError};

/// Elements above which element-wise work is worth all threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

impl Pass {
    /// The rows of a buffer that this step has.
    pub(super) fn view(&self, buffer: Buffer) -> RowsView {
        let activations = &self.buffers[buffer.0 as usize];
        activations.view(match activations.rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Logits => self.step.logits.len(),
        })
    }

    /// Takes a step's input over: copies, tables, tokens, angles.
    pub(super) fn begin(&mut self, input: &StepInput) {
        let running = self
            .running
            .as_mut()
            .expect("the KV cache is allocated before the first step");
        for &(from, to) in &input.copies {
            self.step.check_copy((from, to));
            running.cache.copy_block(from, to);
        }
        self.step.begin(input);
        cut_tiles(&self.step, &self.plan, &mut self.tiles);
        self.cos.clear();
        self.sin.clear();
        let rope = &self.config.rope;
        for &position in &self.step.positions {
            for &frequency in &rope.inverse_frequencies {
                // The angle is rounded to f32, as the models were trained; its sine is then taken exactly.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                self.cos.push(cos as f32 * rope.scale);
                self.sin.push(sin as f32 * rope.scale);
            }
        }
        self.output.clear();
    }

    /// What the step gave.
    pub(super) fn end(&mut self) -> StepOutput {
        let sampled = self
            .output
            .drain(..)
            .map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner));
        let output = StepOutput {
            sampled: sampled.collect(),
        };
        self.step.end(&output);
        output
    }

    /// Runs `work` for each of `n_rows` rows of `cols` elements, on all threads if that is worth it.
    fn for_rows(&self, n_rows: usize, cols: usize, work: impl Fn(&Self, usize) + Sync) {
        if n_rows * cols < PARALLEL_ELEMENTS {
            (0..n_rows).for_each(|row| work(self, row));
            return;
        }
        self.pool.run(n_rows, &|row, _| work(self, row));
    }

    fn running(&self) -> &Running {
        self.running
            .as_ref()
            .expect("the KV cache is allocated before the first step")
    }
}

fn distinct(out: Buffer, x: Buffer) {
    assert_ne!(out, x, "an operation's output is also its input");
}

impl Ops for Pass {
    fn embed(&mut self, out: Buffer, table: Weight) {
        let (out, table) = (self.view(out), &self.weights[table.0 as usize]);
        assert_eq!(out.cols, table.cols, "an embedding of another width");
        self.for_rows(out.n_rows, out.cols, |pass, t| {
            // SAFETY: row `t` is this task's alone.
            table.read_row(pass.step.tokens[t] as usize, unsafe { out.row_mut(t) });
        });
    }

    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, epsilon: f32) {
        distinct(out, x);
        let (out, x, weight) = (
            self.view(out),
            self.view(x),
            &self.vectors[weight.0 as usize],
        );
        assert!(
            out.cols == x.cols && weight.len() == x.cols,
            "a norm of other widths"
        );
        self.for_rows(out.n_rows, out.cols, |pass, r| {
            // SAFETY: row `r` of `out` is this task's alone, and nobody writes `x`, another buffer.
            let (out, x) = unsafe { (out.row_mut(r), x.row(r)) };
            pass.lanes.rms_norm(out, x, weight, epsilon);
        });
    }

    fn add_rms_norm(
        &mut self,
        out: Buffer,
        residual: Buffer,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        distinct(out, x);
        distinct(out, residual);
        distinct(residual, x);
        let (out, residual, x) = (self.view(out), self.view(residual), self.view(x));
        let weight = &self.vectors[weight.0 as usize];
        let widths = [out.cols, residual.cols, weight.len()];
        assert!(
            widths.iter().all(|&width| width == x.cols),
            "a norm of other widths"
        );
        self.for_rows(out.n_rows, out.cols, |pass, r| {
            // SAFETY: row `r` of three different buffers, this task's alone.
            let (out, residual, x) = unsafe { (out.row_mut(r), residual.row_mut(r), x.row(r)) };
            pass.lanes.add(residual, x);
            pass.lanes.rms_norm(out, residual, weight, epsilon);
        });
    }

    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>) {
        distinct(out, x);
        let products = Products {
            pool: &self.pool,
            lanes: self.lanes,
            tile: self.isa.weight_tile(self.config.precision),
            precision: self.config.precision,
            factors: &self.running().factors,
        };
        let bias = bias.map(|bias| &self.vectors[bias.0 as usize][..]);
        products.matmul(
            self.view(out),
            self.view(x),
            &self.weights[weight.0 as usize],
            bias,
        );
    }

    fn rope_append(&mut self, qkv: Buffer, layer: usize) {
        let AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.config.attention;
        let qkv = self.view(qkv);
        assert_eq!(
            qkv.cols,
            (n_heads + 2 * n_kv_heads) * head_dim,
            "queries, keys and values of other widths"
        );
        let half = head_dim / 2;
        self.for_rows(qkv.n_rows, qkv.cols, |pass, t| {
            // SAFETY: row `t` is this task's alone.
            let row = unsafe { qkv.row_mut(t) };
            let (cos, sin) = (&pass.cos[t * half..][..half], &pass.sin[t * half..][..half]);
            for head in row.chunks_mut(head_dim).take(n_heads + n_kv_heads) {
                let (low, high) = head.split_at_mut(half);
                pass.lanes.rotate(low, high, cos, sin);
            }
            let (step, cache) = (&pass.step, &pass.running().cache);
            let (block, slot) = step.slot(step.rows[t], step.positions[t]);
            let is_last = t + 1 == step.tokens.len() || step.rows[t + 1] != step.rows[t];
            let (keys, values) = row[n_heads * head_dim..].split_at(n_kv_heads * head_dim);
            for (head, (key, value)) in keys
                .chunks(head_dim)
                .zip(values.chunks(head_dim))
                .enumerate()
            {
                // SAFETY: a slot belongs to one token of the step, and the slot after a span's last token to none;
                // attention, which reads, is another operation.
                unsafe { cache.append((layer, block, head), slot, key, value, is_last) };
            }
        });
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: usize, scale: f32) {
        distinct(out, qkv);
        let AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.config.attention;
        let (out, queries, running) = (self.view(out), self.view(qkv), self.running());
        assert_eq!(
            out.cols,
            n_heads * head_dim,
            "the output of attention has another width"
        );
        assert_eq!(
            queries.cols,
            (n_heads + 2 * n_kv_heads) * head_dim,
            "queries, keys and values of other widths"
        );
        let attention = Attention {
            plan: &self.plan,
            layout: self.layout,
            cache: &running.cache,
            step: &self.step,
            tiles: &self.tiles,
            scratch: &running.scratch,
            lanes: self.lanes,
            tile: self.isa.tile(self.config.precision),
            precision: self.config.precision,
            layer,
            scale,
            queries,
            out,
        };
        attention.run(&self.pool);
    }

    fn swiglu(&mut self, out: Buffer, gate_up: Buffer) {
        distinct(out, gate_up);
        let (out, gate_up) = (self.view(out), self.view(gate_up));
        assert_eq!(2 * out.cols, gate_up.cols, "gate and up of another width");
        self.for_rows(out.n_rows, gate_up.cols, |pass, r| {
            // SAFETY: row `r` of `out` is this task's alone, and nobody writes `gate_up`, another buffer.
            let (out, gate_up) = unsafe { (out.row_mut(r), gate_up.row(r)) };
            let (gate, up) = gate_up.split_at(out.len());
            pass.lanes.swiglu(out, gate, up);
        });
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        distinct(out, x);
        let (out, x) = (self.view(out), self.view(x));
        for (l, row) in self.step.logits.iter().enumerate() {
            // SAFETY: two buffers, and one thread.
            unsafe { out.row_mut(l).copy_from_slice(x.row(row.token as usize)) };
        }
    }

    fn all_reduce(&mut self, _x: Buffer) {}

    fn sample(&mut self, logits: Buffer) {
        let logits = self.view(logits);
        let mut output = mem::take(&mut self.output);
        output.resize_with(logits.n_rows, Mutex::default);
        self.pool.run(logits.n_rows, &|l, thread| {
            let mut scratch = self.running().sampling[thread]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // SAFETY: nobody writes the logits.
            let sampled = sample_row(unsafe { logits.row(l) }, &self.step.logits[l], &mut scratch);
            *output[l].lock().unwrap_or_else(PoisonError::into_inner) = sampled;
        });
        self.output = output;
    }
}
