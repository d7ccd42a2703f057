//! The operations of a forward pass as launches of kernels and products, in the driver's stream.
//!
//! Addresses come from the device's buffers and from the step's layout; the first error stops the pass.

mod attention;
mod experts;

use crate::device::{
    Activation, Buffer, DeviceError, Experts, HeadNorms, Logits, Ops, Rows, Vector, Weight,
};
use crate::shape::{LayerId, Model};

use super::buffers::{ActivationBuffer, DeviceBuffers, Matrix};
use super::driver::{Driver, Gemm, GemmOutput, GemmShape};
use super::kernel::{self, Arguments, In, Launch, Out};
use super::model::ModelState;

/// One pass of one model.
pub(super) struct Pass<'a, D: Driver> {
    driver: &'a mut D,
    buffers: &'a DeviceBuffers,
    number: Model,
    model: &'a ModelState,
    result: Result<(), DeviceError>,
}

impl<'a, D: Driver> Pass<'a, D> {
    /// Runs `forward`, whose step was planned and lies in the model's input.
    pub(super) fn run(
        driver: &'a mut D,
        buffers: &'a DeviceBuffers,
        (number, model): (Model, &'a ModelState),
        forward: &dyn Fn(&mut dyn Ops),
    ) -> Result<(), DeviceError> {
        let mut pass = Self {
            driver,
            buffers,
            number,
            model,
            result: Ok(()),
        };
        forward(&mut pass);
        pass.result
    }

    fn activations(&self, buffer: Buffer) -> ActivationBuffer {
        let found = self.buffers.activations[buffer.0 as usize];
        assert_eq!(found.model, self.number, "a buffer of another model");
        found
    }

    fn weight(&self, weight: Weight) -> Matrix {
        self.buffers.weights[weight.0 as usize]
    }

    /// Rows of a buffer in this step, padding included.
    fn n_rows(&self, rows: Rows) -> usize {
        let shape = self.model.plan.shape();
        match rows {
            Rows::Tokens => shape.tokens,
            Rows::Logits => shape.logits,
        }
    }

    /// Address of one of the step's arrays.
    fn input<T>(&self, offset: usize) -> In<T> {
        (self.model.buffers.input + offset as u64).into()
    }

    /// Address of the positions, by input token.
    fn positions(&self) -> In<u32> {
        self.input(self.model.plan.layout().positions)
    }

    fn launch<A: Arguments>(&mut self, launch: Launch<A>, args: &A) {
        if self.result.is_err() {
            return;
        }
        // SAFETY: what lies on the device as an index was written by Plan, from a step whose every token, row, position
        // and block Step has checked against the model's shape, by which the buffers were allocated; padding is inert or
        // index 0; or by `sample` (a token of the vocabulary), or by `route_experts` and `group_by_expert` (an expert, a
        // pair of the step). Every operation checks the widths of its buffers.
        self.result = unsafe { self.driver.launch(launch, args) };
    }

    fn gemm(&mut self, gemm: &Gemm) {
        if self.result.is_ok() && gemm.shape.rows > 0 {
            self.result = self.driver.gemm(gemm);
        }
    }

    fn norm(
        &mut self,
        out: Buffer,
        residual: Option<Buffer>,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        let (out, x) = (self.activations(out), self.activations(x));
        let residual = residual.map(|buffer| self.activations(buffer));
        let weight = self.buffers.vectors[weight.0 as usize];
        let fits = |r: ActivationBuffer| r.cols == x.cols && r.rows == x.rows;
        assert!(
            fits(out) && weight.len == x.cols && residual.is_none_or(fits),
            "a norm of another width"
        );
        let args = kernel::RmsNormArgs {
            out: out.address.into(),
            residual: residual.map_or(Out::NULL, |buffer| buffer.address.into()),
            x: x.address.into(),
            weight: weight.f32.into(),
            cols: x.cols as u32,
            chunks: (x.stride / 8) as u32,
            out_stride: out.stride as u32,
            residual_stride: residual.map_or(0, |buffer| buffer.stride) as u32,
            x_stride: x.stride as u32,
            epsilon,
        };
        self.launch(kernel::rms_norm(self.n_rows(x.rows)), &args);
    }

    /// `activation(gate) * up` of `rows` rows.
    fn gate(
        &mut self,
        rows: usize,
        out: (u64, usize),
        gate_up: (u64, usize),
        n: usize,
        activation: Activation,
    ) {
        let args = kernel::GatedActivationArgs {
            out: out.0.into(),
            gate_up: gate_up.0.into(),
            n: n as u32,
            out_stride: out.1 as u32,
            in_stride: gate_up.1 as u32,
            activation: match activation {
                Activation::Silu => kernel::SILU,
                Activation::GeluTanh => kernel::GELU_TANH,
            },
        };
        self.launch(kernel::gated_activation(rows, n), &args);
    }
}

impl<D: Driver> Ops for Pass<'_, D> {
    fn embed(&mut self, out: Buffer, table: Weight, scale: f32) {
        let (out, table) = (self.activations(out), self.weight(table));
        assert!(
            out.cols == table.cols
                && out.rows == Rows::Tokens
                && table.rows >= self.model.shape.vocab_size,
            "an embedding of another width"
        );
        let args = kernel::EmbedArgs {
            out: out.address.into(),
            table: table.address.into(),
            tokens: self.input(self.model.plan.layout().tokens),
            previous: self.model.buffers.sampled.tokens.into(),
            chunks: (table.stride / 8) as u32,
            out_stride: out.stride as u32,
            table_stride: table.stride as u32,
            scale,
        };
        self.launch(kernel::embed(self.n_rows(out.rows)), &args);
    }

    fn rms_norm(&mut self, out: Buffer, x: Buffer, weight: Vector, epsilon: f32) {
        self.norm(out, None, x, weight, epsilon);
    }

    fn add_rms_norm(
        &mut self,
        out: Buffer,
        residual: Buffer,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        self.norm(out, Some(residual), x, weight, epsilon);
    }

    fn matmul(&mut self, out: Buffer, x: Buffer, weight: Weight, bias: Option<Vector>) {
        let (out, x, weight) = (
            self.activations(out),
            self.activations(x),
            self.weight(weight),
        );
        let bias = bias.map(|bias| self.buffers.vectors[bias.0 as usize]);
        assert!(
            x.cols == weight.cols
                && out.cols == weight.rows
                && out.rows == x.rows
                && bias.is_none_or(|bias| bias.len == out.cols),
            "a product of another width"
        );
        let gemm = Gemm {
            out: out.address,
            x: x.address,
            weight: weight.address,
            bias: bias.map(|bias| bias.bf16),
            shape: GemmShape {
                rows: self.n_rows(x.rows),
                inner: weight.stride,
                cols: weight.rows,
                x_stride: x.stride,
                weight_stride: weight.stride,
                out_stride: out.stride,
                out: match bias {
                    Some(_) => GemmOutput::BiasedBf16,
                    None => GemmOutput::Bf16,
                },
            },
        };
        self.gemm(&gemm);
    }

    fn rope_append(&mut self, qkv: Buffer, layer: LayerId, norms: Option<HeadNorms>) {
        self.append(self.activations(qkv), layer, norms);
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: LayerId) {
        self.attend(self.activations(out), self.activations(qkv), layer);
    }

    fn gated_activation(&mut self, out: Buffer, gate_up: Buffer, activation: Activation) {
        let (out, gate_up) = (self.activations(out), self.activations(gate_up));
        assert!(
            gate_up.cols == 2 * out.cols && gate_up.rows == out.rows,
            "gates and ups"
        );
        let (to, from) = ((out.address, out.stride), (gate_up.address, gate_up.stride));
        self.gate(self.n_rows(out.rows), to, from, out.cols, activation);
    }

    fn experts(&mut self, out: Buffer, x: Buffer, router: Buffer, experts: Experts) {
        let (out, x, router) = (
            self.activations(out),
            self.activations(x),
            self.activations(router),
        );
        let experts = self.buffers.experts[experts.0 as usize];
        assert_eq!(experts.model, self.number, "experts of another model");
        self.mix(out, x, router, &experts);
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        let (out, x) = (self.activations(out), self.activations(x));
        assert!(
            out.cols == x.cols && out.rows == Rows::Logits && x.rows == Rows::Tokens,
            "rows of another width"
        );
        let args = kernel::GatherRowsArgs {
            out: out.address.into(),
            x: x.address.into(),
            index: self.input(self.model.plan.layout().index),
            chunks: (x.stride / 8) as u32,
            out_stride: out.stride as u32,
            x_stride: x.stride as u32,
            unused: 0,
        };
        self.launch(kernel::gather_rows(self.n_rows(out.rows)), &args);
    }

    fn logits(&mut self, out: Logits, x: Buffer, weight: Weight) {
        let out = self.buffers.logits[out.0 as usize];
        let (x, weight) = (self.activations(x), self.weight(weight));
        assert_eq!(out.model, self.number, "logits of another model");
        assert!(
            x.cols == weight.cols && out.cols == weight.rows && x.rows == Rows::Logits,
            "logits of another width"
        );
        let gemm = Gemm {
            out: out.address,
            x: x.address,
            weight: weight.address,
            bias: None,
            shape: GemmShape {
                rows: self.n_rows(Rows::Logits),
                inner: weight.stride,
                cols: weight.rows,
                x_stride: x.stride,
                weight_stride: weight.stride,
                out_stride: out.stride,
                out: GemmOutput::F32,
            },
        };
        self.gemm(&gemm);
    }

    fn all_reduce(&mut self, _x: Buffer) {}
}
