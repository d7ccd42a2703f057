//! The operations of a forward pass as launches of kernels and products, in the driver's stream.
//!
//! Addresses come from the device's world and from the step's layout; the first error stops the pass.

use crate::device::{Buffer, DeviceError, Ops, Rows, Vector, Weight};

use super::driver::{Arguments, Driver, Launch, Product, ProductShape};
use super::kernel;
use super::plan::{Layout, Plan};
use super::world::{Area, World};

/// One pass.
pub(super) struct Pass<'a, D: Driver> {
    driver: &'a mut D,
    world: &'a World,
    plan: &'a Plan,
    layout: Layout,
    result: Result<(), DeviceError>,
}

impl<'a, D: Driver> Pass<'a, D> {
    /// Runs `forward`, whose step lies in the world's input as `plan` says.
    pub(super) fn run(
        driver: &'a mut D,
        world: &'a World,
        plan: &'a Plan,
        forward: &mut dyn FnMut(&mut dyn Ops),
    ) -> Result<(), DeviceError> {
        let mut pass = Self {
            driver,
            world,
            plan,
            layout: plan.shape.layout(),
            result: Ok(()),
        };
        forward(&mut pass);
        pass.result
    }

    fn area(&self, buffer: Buffer) -> Area {
        self.world.buffers[buffer.0 as usize]
    }

    fn n_rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.plan.shape.tokens,
            Rows::Logits => self.plan.shape.logits,
        }
    }

    /// Address of one of the step's arrays.
    fn input(&self, offset: usize) -> u64 {
        self.world.input + offset as u64
    }

    fn launch<A: Arguments>(&mut self, name: &'static str, launch: Launch, args: &A) {
        if self.result.is_err() || launch.grid.contains(&0) {
            return;
        }
        // SAFETY: every caller below takes addresses from the world and the layout, whose areas have room for the
        // largest step; rows are at most what the areas have; Step has checked every token's place and every block.
        self.result = unsafe { self.driver.launch(name, launch, args) };
    }

    fn norm(
        &mut self,
        out: Buffer,
        residual: Option<Buffer>,
        x: Buffer,
        weight: Vector,
        epsilon: f32,
    ) {
        let (out, x) = (self.area(out), self.area(x));
        let residual = residual.map(|buffer| self.area(buffer));
        let weight = self.world.vectors[weight.0 as usize];
        assert!(
            out.cols == x.cols && weight.len == x.cols && residual.is_none_or(|r| r.cols == x.cols),
            "a norm of another width"
        );
        let args = kernel::RmsNormArgs {
            out: out.address,
            residual: residual.map_or(0, |area| area.address),
            x: x.address,
            weight: weight.binary32,
            cols: x.cols as u32,
            chunks: (x.stride / 8) as u32,
            out_stride: out.stride as u32,
            residual_stride: residual.map_or(0, |area| area.stride) as u32,
            x_stride: x.stride as u32,
            epsilon,
        };
        self.launch("rms_norm", kernel::rms_norm(self.n_rows(x.rows)), &args);
    }
}

impl<D: Driver> Ops for Pass<'_, D> {
    fn embed(&mut self, out: Buffer, table: Weight) {
        let (out, table) = (self.area(out), self.world.weights[table.0 as usize]);
        assert_eq!(out.cols, table.cols, "an embedding of another width");
        let args = kernel::EmbedArgs {
            out: out.address,
            table: table.address,
            tokens: self.input(self.layout.tokens),
            previous: self.world.drawn.tokens,
            chunks: (table.stride / 8) as u32,
            out_stride: out.stride as u32,
            table_stride: table.stride as u32,
            unused: 0,
        };
        self.launch("embed", kernel::move_rows(self.n_rows(out.rows)), &args);
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
        let (out, x) = (self.area(out), self.area(x));
        let weight = self.world.weights[weight.0 as usize];
        assert!(
            x.cols == weight.cols && out.cols == weight.rows && out.rows == x.rows,
            "a product of another width"
        );
        assert!(bias.is_none() || !out.wide, "logits have no bias");
        let rows = self.n_rows(x.rows);
        if self.result.is_err() || rows == 0 {
            return;
        }
        let product = Product {
            out: out.address,
            x: x.address,
            weight: weight.address,
            bias: bias.map(|bias| self.world.vectors[bias.0 as usize].bfloat16),
            shape: ProductShape {
                rows,
                inner: weight.stride,
                cols: weight.rows,
                x_stride: x.stride,
                weight_stride: weight.stride,
                out_stride: out.stride,
                wide: out.wide,
                biased: bias.is_some(),
            },
        };
        // SAFETY: the areas have room for the padded rows of the largest step, and the widths were just checked.
        self.result = unsafe { self.driver.product(&product) };
    }

    fn rope_append(&mut self, qkv: Buffer, layer: usize) {
        let qkv = self.area(qkv);
        let args = kernel::RopeAppendArgs {
            cache: self.world.kv_cache(layer),
            qkv: qkv.address,
            positions: self.input(self.layout.positions),
            rows: self.input(self.layout.rows),
            inverse_frequencies: self.world.inverse_frequencies,
            n_heads: self.world.config.attention.n_heads as u32,
            stride: qkv.stride as u32,
            scale: self.world.config.rope.scale,
            unused: 0,
        };
        let head_dim = self.world.head_dim.elements();
        self.launch(
            "rope_append",
            kernel::rope_append(self.n_rows(qkv.rows), head_dim),
            &args,
        );
    }

    fn attention(&mut self, out: Buffer, qkv: Buffer, layer: usize, scale: f32) {
        let (out, qkv) = (self.area(out), self.area(qkv));
        let shape = &self.world.config.attention;
        let (n_heads, n_kv_heads) = (shape.n_heads as u32, shape.n_kv_heads as u32);
        let head_dim = self.world.head_dim;
        let cache = self.world.kv_cache(layer);
        let scale_log2 = scale * std::f32::consts::LOG2_E;
        let prefill = kernel::PagedPrefillArgs {
            cache,
            out: out.address,
            qkv: qkv.address,
            tiles: self.input(self.layout.tiles),
            out_stride: out.stride as u32,
            qkv_stride: qkv.stride as u32,
            n_heads,
            scale_log2,
        };
        let n_tiles = self.plan.shape.tiles;
        self.launch(
            head_dim.prefill(),
            kernel::paged_prefill(n_tiles, n_kv_heads, head_dim),
            &prefill,
        );
        for wave in &self.plan.waves {
            let at = |layout: usize, first: usize| self.input(layout + first * 16);
            let decode = kernel::PagedDecodeArgs {
                cache,
                out: out.address,
                qkv: qkv.address,
                items: at(self.layout.items, wave.items.start),
                sequences: at(self.layout.sequences, wave.sequences.start),
                partial_out: self.world.partial_out,
                partial_softmax: self.world.partial_softmax,
                out_stride: out.stride as u32,
                qkv_stride: qkv.stride as u32,
                n_heads,
                scale_log2,
            };
            let (name, launch) = kernel::paged_decode(
                wave.items.len(),
                n_heads,
                n_kv_heads,
                head_dim,
                self.driver.n_multiprocessors(),
            );
            self.launch(name, launch, &decode);
            if self.plan.shape.partitions > 1 {
                let launch = kernel::merge_partitions(
                    wave.sequences.len(),
                    self.plan.shape.partitions,
                    n_heads,
                    head_dim,
                );
                self.launch("merge_partitions", launch, &decode);
            }
        }
    }

    fn swiglu(&mut self, out: Buffer, gate_up: Buffer) {
        let (out, gate_up) = (self.area(out), self.area(gate_up));
        assert_eq!(gate_up.cols, 2 * out.cols, "gates and ups");
        let args = kernel::SwigluArgs {
            out: out.address,
            gate_up: gate_up.address,
            n: out.cols as u32,
            out_stride: out.stride as u32,
            in_stride: gate_up.stride as u32,
            unused: 0,
        };
        self.launch(
            "swiglu",
            kernel::swiglu(self.n_rows(out.rows), out.cols),
            &args,
        );
    }

    fn gather_logits_rows(&mut self, out: Buffer, x: Buffer) {
        let (out, x) = (self.area(out), self.area(x));
        assert_eq!(out.cols, x.cols, "rows of another width");
        let args = kernel::GatherRowsArgs {
            out: out.address,
            x: x.address,
            index: self.input(self.layout.index),
            chunks: (x.stride / 8) as u32,
            out_stride: out.stride as u32,
            x_stride: x.stride as u32,
            unused: 0,
        };
        self.launch(
            "gather_rows",
            kernel::move_rows(self.n_rows(out.rows)),
            &args,
        );
    }

    fn all_reduce(&mut self, _x: Buffer) {}

    fn sample(&mut self, logits: Buffer) {
        let area = self.area(logits);
        assert!(area.wide, "logits are binary32");
        let drawn = self.world.drawn;
        let args = kernel::SampleArgs {
            logits: area.address,
            rows: self.input(self.layout.samples),
            tokens: drawn.tokens,
            logprobs: drawn.logprobs,
            top_ids: drawn.top_ids,
            top_logprobs: drawn.top_logprobs,
            vocabulary: area.cols as u32,
            stride: area.stride as u32,
        };
        self.launch("sample", kernel::sample(self.n_rows(Rows::Logits)), &args);
    }
}
