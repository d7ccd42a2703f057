//! The operations of a forward pass on the CPU: which views an operation reads and writes, and how its rows are cut
//! into tasks.

use super::CpuState;
use super::attention::Attention;
use super::experts::ExpertsGemm;
use super::gemm::Gemm;
use super::rows::RowsView;
use super::weights::PackedWeight;
use crate::device::{Activation, Buffer, Experts, HeadNorms, Logits, Ops, Vector, Weight};
use crate::sampling::sample_row;
use crate::shape::LayerId;
use crate::step::{DeviceOutput, LogitsRow, Sampled, StepInput};
use std::sync::{Mutex, PoisonError};

/// Elements above which element-wise work is worth all threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

impl CpuState {
    /// The rows of a buffer that this step has.
    fn view(&self, buffer: Buffer) -> RowsView {
        self.view_of((self.current, self.buffers.get(self.current, buffer.0)))
    }

    fn weight(&self, weight: Weight) -> &PackedWeight {
        self.weights.get(self.current, weight.0)
    }

    fn vector(&self, vector: Vector) -> &[f32] {
        self.vectors.get(self.current, vector.0)
    }

    /// Takes a step's input over: tables, tokens, angles, copies.
    pub(super) fn begin(&mut self, input: &StepInput) {
        self.current = input.model;
        self.models[self.current.0 as usize].begin(input);
        let allocated = self
            .allocated
            .as_mut()
            .expect("the KV cache is allocated before the first step");
        for &(from, to) in &input.copies {
            allocated.cache.copy_page(from, to);
        }
    }

    /// Samples from the logits of the step.
    pub(super) fn sample(&mut self, logits: Logits, requests: &[LogitsRow]) -> DeviceOutput {
        self.models[self.current.0 as usize]
            .step
            .check_requests(requests);
        let rows = self.logits_view(logits);
        let sampled: Vec<Mutex<Sampled>> = requests.iter().map(|_| Mutex::default()).collect();
        self.pool.run(requests.len(), &|l, thread| {
            let mut scratch = self.allocated().sampling[thread]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // SAFETY: nobody writes the logits.
            let of_row = sample_row(unsafe { rows.row(l) }, &requests[l], &mut scratch);
            *sampled[l].lock().unwrap_or_else(PoisonError::into_inner) = of_row;
        });
        let sampled = sampled
            .into_iter()
            .map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner));
        let output = DeviceOutput {
            sampled: sampled.collect(),
        };
        self.models[self.current.0 as usize].step.end(&output);
        output
    }

    fn logits_view(&self, logits: Logits) -> RowsView {
        self.view_of((self.current, self.logits.get(self.current, logits.0)))
    }

    /// Runs `work` for each of `n_rows` rows of `cols` elements, on all threads if that is worth it.
    fn for_rows(&self, n_rows: usize, cols: usize, work: impl Fn(&Self, usize) + Sync) {
        if n_rows * cols < PARALLEL_ELEMENTS {
            (0..n_rows).for_each(|row| work(self, row));
            return;
        }
        self.pool.run(n_rows, &|row, _| work(self, row));
    }

    fn gemm(&self) -> Gemm<'_> {
        Gemm {
            pool: &self.pool,
            simd: self.simd,
            tile: self.isa.weight_tile(self.numerics.weights),
            precision: self.numerics.weights,
            packed: &self.allocated().packed,
        }
    }
}

fn distinct(out: Buffer, x: Buffer) {
    assert_ne!(out, x, "an operation's output is also its input");
}

impl Ops for CpuState {
    fn embed(&mut self, out: Buffer, table: Weight, scale: f32) {
        let (out, table) = (self.view(out), self.weight(table));
        assert_eq!(out.cols, table.cols, "an embedding of another width");
        self.for_rows(out.n_rows, out.cols, |state, t| {
            // SAFETY: row `t` is this task's alone.
            let row = unsafe { out.row_mut(t) };
            table.read_row(state.model().step.tokens[t] as usize, row);
            if scale != 1.0 {
                state.simd.scale(row, scale);
            }
        });
    }

    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, epsilon: f32) {
        distinct(out, x);
        let (out, x, weight) = (self.view(out), self.view(x), self.vector(weight));
        assert!(
            out.cols == x.cols && weight.len() == x.cols,
            "a norm of other widths"
        );
        self.for_rows(out.n_rows, out.cols, |state, r| {
            // SAFETY: row `r` of `out` is this task's alone, and nobody writes `x`, another buffer.
            let (out, x) = unsafe { (out.row_mut(r), x.row(r)) };
            state.simd.rms_norm(out, x, weight, epsilon);
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
        let weight = self.vector(weight);
        let widths = [out.cols, residual.cols, weight.len()];
        assert!(
            widths.iter().all(|&width| width == x.cols),
            "a norm of other widths"
        );
        self.for_rows(out.n_rows, out.cols, |state, r| {
            // SAFETY: row `r` of three different buffers, this task's alone.
            let (out, residual, x) = unsafe { (out.row_mut(r), residual.row_mut(r), x.row(r)) };
            state.simd.add(residual, x);
            state.simd.rms_norm(out, residual, weight, epsilon);
        });
    }

    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>) {
        distinct(out, x);
        let bias = bias.map(|bias| self.vector(bias));
        let (out, x) = (self.view(out), self.view(x));
        self.gemm().matmul(out, x, self.weight(weight), bias);
    }

    fn rope_append(&mut self, qkv: Buffer, layer: LayerId, norms: Option<HeadNorms>) {
        let (qkv, model) = (self.view(qkv), self.model());
        let (layer, _) = model.layer(layer);
        assert_eq!(
            qkv.cols,
            layer.qkv_cols(),
            "queries, keys and values of other widths"
        );
        let (n_heads, n_kv_heads) = (layer.shape.n_heads, layer.cache.n_kv_heads);
        let head_dim = layer.cache.head_dim;
        let norms = norms.map(|norms| {
            let weights = [self.vector(norms.query), self.vector(norms.key)];
            assert!(
                weights.iter().all(|weight| weight.len() == head_dim),
                "a norm of heads of another size"
            );
            (weights, norms.epsilon)
        });
        let table = layer
            .shape
            .rope
            .map(|rope| &model.rope_tables[rope.0 as usize]);
        self.for_rows(qkv.n_rows, qkv.cols, |state, t| {
            // SAFETY: row `t` is this task's alone.
            let row = unsafe { qkv.row_mut(t) };
            let heads = row.chunks_mut(head_dim).take(n_heads + n_kv_heads);
            for (h, head) in heads.enumerate() {
                if let Some(([query, key], epsilon)) = norms {
                    let weight = if h < n_heads { query } else { key };
                    state.simd.rms_norm_in_place(head, weight, epsilon);
                }
                if let Some(table) = table {
                    let (cos, sin) = table.of(t);
                    let (low, rest) = head.split_at_mut(cos.len());
                    state.simd.rotate(low, &mut rest[..cos.len()], cos, sin);
                }
            }
            let (step, cache) = (&state.model().step, &state.allocated().cache);
            let (block, slot) = step.slot(layer.group, step.rows[t], step.positions[t]);
            let is_last = t + 1 == step.tokens.len() || step.rows[t + 1] != step.rows[t];
            let (keys, values) = row[n_heads * head_dim..].split_at(n_kv_heads * head_dim);
            let keys = keys.chunks(head_dim).zip(values.chunks(head_dim));
            for (head, (key, value)) in keys.enumerate() {
                // SAFETY: a slot belongs to one token of the step, and the slot after a span's last token to none;
                // attention, which reads, is another operation.
                unsafe { cache.append(&layer.layout, (block, slot, head), key, value, is_last) };
            }
        });
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: LayerId) {
        distinct(out, qkv);
        let (out, queries) = (self.view(out), self.view(qkv));
        let (model, allocated) = (self.model(), self.allocated());
        let (layer, tiles) = model.layer(layer);
        assert_eq!(
            out.cols,
            layer.shape.n_heads * layer.cache.head_dim,
            "the output of attention has another width"
        );
        assert_eq!(
            queries.cols,
            layer.qkv_cols(),
            "queries, keys and values of other widths"
        );
        let precision = self.numerics.kv_cache;
        let attention = Attention {
            layer,
            cache: &allocated.cache,
            step: &model.step,
            tiles,
            scratch: &allocated.scratch,
            simd: self.simd,
            tile: self.isa.tile(precision),
            precision,
            queries,
            out,
        };
        attention.run(&self.pool);
    }

    fn gated_activation(&mut self, out: Buffer, gate_up: Buffer, activation: Activation) {
        distinct(out, gate_up);
        let (out, gate_up) = (self.view(out), self.view(gate_up));
        assert_eq!(2 * out.cols, gate_up.cols, "gate and up of another width");
        self.for_rows(out.n_rows, gate_up.cols, |state, r| {
            // SAFETY: row `r` of `out` is this task's alone, and nobody writes `gate_up`, another buffer.
            let (out, gate_up) = unsafe { (out.row_mut(r), gate_up.row(r)) };
            let (gate, up) = gate_up.split_at(out.len());
            state.simd.gated(activation, out, gate, up);
        });
    }

    fn experts(&mut self, out: Buffer, x: Buffer, router: Buffer, experts: Experts) {
        distinct(out, x);
        distinct(out, router);
        let (out, x, router) = (self.view(out), self.view(x), self.view(router));
        let shape = *self.experts.get(self.current, experts.0);
        let hidden = self.weight(shape.gate_up).cols;
        assert_eq!([x.cols, out.cols], [hidden; 2], "experts of other widths");
        assert_eq!(router.cols, shape.n_experts, "a router of another width");
        let allocated = self
            .allocated
            .as_mut()
            .expect("the KV cache is allocated before the first step");
        allocated.experts.routing.route(router, &shape);
        let workspace = &self.allocated().experts;
        let products = workspace.products.view(x.n_rows * shape.top_k);
        let products_of_experts = ExpertsGemm {
            gemm: self.gemm(),
            shape,
            gate_up: self.weight(shape.gate_up),
            down: self.weight(shape.down),
        };
        products_of_experts.run(out, x, &workspace.routing, products);
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        distinct(out, x);
        let (out, x) = (self.view(out), self.view(x));
        assert_eq!(out.cols, x.cols, "rows of another width");
        for (l, &token) in self.model().step.logits.iter().enumerate() {
            // SAFETY: two buffers, and one thread.
            unsafe { out.row_mut(l).copy_from_slice(x.row(token as usize)) };
        }
    }

    fn logits(&mut self, out: Logits, x: Buffer, weight: Weight) {
        let (out, x) = (self.logits_view(out), self.view(x));
        self.gemm().matmul(out, x, self.weight(weight), None);
    }

    fn all_reduce(&mut self, _x: Buffer) {}
}
