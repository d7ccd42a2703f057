//! The CUDA device: weights, workspace, paged KV cache and block tables on a GPU, steps one ahead of the host.
//!
//! Generic over its [`Driver`]: [`gpu::Gpu`] runs the embedded cubins through libcuda and cuBLASLt, both found at run
//! time; [`shim::Shim`] runs the same kernels' source on the CPU. Activations, weights and the cache are bfloat16, sums
//! and logits binary32. A step that only decodes is captured into a graph the second time its shape is seen.
//!
//! Attention, norms and sampling give the same bits in every batch; products are cuBLASLt's, whose order of sums
//! depends on the number of rows: a crowd is equal to each request alone within their rounding, not to the bit.
//!
//! - [`driver`]: what is needed of a GPU.
//! - [`kernel`]: the kernels' names, arguments and launches.
//! - `plan`: pure: what of a step goes up, and where it lies.
//! - `pass`: the operations of a forward pass as launches.
//! - `world`: where everything lies; `graphs`: the shapes that came again.

pub mod driver;
#[cfg(feature = "cuda")]
pub mod gpu;
mod graphs;
pub mod kernel;
mod pass;
mod plan;
#[cfg(feature = "cuda-shim")]
pub mod shim;
mod world;

use std::collections::VecDeque;

use crate::device::{
    AttentionShape, Buffer, Device, DeviceConfig, DeviceError, Dtype, Memory, Ops, Precision, Rows,
    Sampled, StepInput, StepOutput, TensorView, Ticket, Vector, Weight,
};
use crate::step::Step;
use driver::{Driver, Pinned};
use graphs::Graphs;
use kernel::{HeadDim, MAX_TOP, PARTITION};
use pass::Pass;
pub use plan::sample_row;
use plan::{Plan, Shape, bucket_items, bucket_rows};
use world::{Area, DeviceVector, Drawn, Matrix, World};

/// Left free for what the driver allocates while it serves: modules, graphs, its own heap.
const RESERVE_BYTES: u64 = 512 << 20;
/// Partial results that have room at once, unless one sequence alone has more: 2M tokens of context.
const PARTIAL_ITEMS: usize = 8192;
/// Copies, and changes of the block tables, that go up along with a step; more take a trip of their own.
const EDITS: usize = 8192;

/// The device.
pub struct CudaDevice<D: Driver> {
    driver: D,
    world: World,
    step: Step,
    plan: Plan,
    graphs: Graphs<D::Graph>,
    slots: [Slot; 2],
    in_flight: VecDeque<InFlight<D::Event>>,
    next_ticket: u64,
    weight_bytes: u64,
    workspace_bytes: u64,
    cache_bytes: u64,
}

/// Host memory of one of the two steps that may be under way.
struct Slot {
    input: Pinned,
    output: Pinned,
}

struct InFlight<E> {
    ticket: u64,
    slot: usize,
    event: E,
    /// By row of logits: log-probabilities asked for.
    n_logprobs: Vec<Option<u8>>,
}

impl<D: Driver> CudaDevice<D> {
    /// A device without weights or cache.
    pub fn new(mut driver: D, config: DeviceConfig) -> Result<Self, DeviceError> {
        let head_dim = check(&config)?;
        let (limits, shape) = (config.limits, config.attention);
        let max_logits = bucket_rows(limits.max_logits_rows);
        let max_partitions =
            (limits.max_blocks_per_sequence * shape.block_size).div_ceil(PARTITION as usize);
        let group = shape.n_heads / shape.n_kv_heads;
        let largest = Shape {
            tokens: bucket_rows(limits.max_tokens),
            logits: max_logits,
            items: bucket_items(limits.max_sequences * max_partitions),
            sequences: bucket_rows(limits.max_sequences),
            tiles: limits.max_tokens * group / head_dim.prefill_rows() as usize
                + limits.max_sequences,
            partitions: max_partitions,
        };
        let input_bytes = largest.layout().end + 2 * EDITS * 8;
        let partial_items =
            (limits.max_sequences * max_partitions).min(PARTIAL_ITEMS.max(max_partitions));
        let output_bytes = max_logits * (8 + 8 * MAX_TOP);

        let mut bytes = 0;
        let mut allocate = |what, n: usize| {
            bytes += n as u64;
            driver.allocate(what, n)
        };
        let input = allocate("a step's input", input_bytes)?;
        let table_entries = limits.max_sequences * limits.max_blocks_per_sequence;
        let tables = allocate("the block tables", table_entries * 4)?;
        let inverse_frequencies = allocate("rotary frequencies", shape.head_dim * 2)?;
        let partials = partial_items * shape.n_heads;
        let partial_out = allocate("attention's partial results", partials * shape.head_dim * 4)?;
        let partial_softmax = allocate("attention's partial sums", partials * 8)?;
        let output = allocate("a step's output", output_bytes)?;
        let frequencies: &[u8] = bytemuck::cast_slice(&config.rope.inverse_frequencies);
        driver.upload(inverse_frequencies, 1, frequencies.len(), &|_, to| {
            to.copy_from_slice(frequencies);
        })?;
        let mut slot = || {
            Ok(Slot {
                input: driver.pinned(input_bytes)?,
                output: driver.pinned(output_bytes)?,
            })
        };
        let slots = [slot()?, slot()?];
        let after = |rows: usize| output + (max_logits * rows * 4) as u64;
        Ok(Self {
            world: World {
                head_dim,
                weights: Vec::new(),
                vectors: Vec::new(),
                buffers: Vec::new(),
                input,
                tables,
                inverse_frequencies,
                partial_out,
                partial_softmax,
                partial_items,
                drawn: Drawn {
                    tokens: output,
                    logprobs: after(1),
                    top_ids: after(2),
                    top_logprobs: after(2 + MAX_TOP),
                    rows: max_logits,
                },
                cache: 0,
                n_blocks: 0,
                config: config.clone(),
            },
            step: Step::deferred(&config),
            plan: Plan::default(),
            graphs: Graphs::new(),
            slots,
            in_flight: VecDeque::with_capacity(2),
            next_ticket: 0,
            weight_bytes: 0,
            workspace_bytes: bytes,
            cache_bytes: 0,
            driver,
        })
    }

    fn layer_bytes(&self) -> u64 {
        self.block_bytes() / self.world.config.attention.n_layers as u64
            * u64::from(self.world.n_blocks)
    }

    /// Uploads what the step brings, and applies its copies and changes of the block tables.
    fn send(&mut self, slot: usize, input: &StepInput) -> Result<(), DeviceError> {
        let width = self.world.config.limits.max_blocks_per_sequence;
        let copies: Vec<[u32; 2]> = input
            .copies
            .iter()
            .map(|&copy| {
                self.step.check_copy(copy);
                [copy.0.0, copy.1.0]
            })
            .collect();
        let changes: Vec<[u32; 2]> = input
            .table_updates
            .iter()
            .flat_map(|update| {
                let first = update.row.0 as usize * width + update.first as usize;
                (first as u32..)
                    .zip(&update.blocks)
                    .map(|(at, block)| [at, block.0])
            })
            .collect();
        let copies = self.send_excess(slot, &copies, Self::copy_blocks)?;
        let changes = self.send_excess(slot, &changes, Self::update_tables)?;

        let end = self.plan.shape.layout().end;
        let at_changes = end + copies.len() * 8;
        let bytes = at_changes + changes.len() * 8;
        let to = self.slots[slot].input.bytes_mut();
        self.plan.write(&self.step, to);
        to[end..at_changes].copy_from_slice(bytemuck::cast_slice(copies));
        to[at_changes..bytes].copy_from_slice(bytemuck::cast_slice(changes));
        self.driver
            .copy_in(self.world.input, &self.slots[slot].input, bytes)?;
        self.copy_blocks(self.world.input + end as u64, copies.len())?;
        self.update_tables(self.world.input + at_changes as u64, changes.len())
    }

    /// Applies all pairs but the last that fit along with a step, and waits for each trip.
    fn send_excess<'p>(
        &mut self,
        slot: usize,
        mut pairs: &'p [[u32; 2]],
        apply: fn(&mut Self, u64, usize) -> Result<(), DeviceError>,
    ) -> Result<&'p [[u32; 2]], DeviceError> {
        while pairs.len() > EDITS {
            let (now, rest) = pairs.split_at(EDITS);
            let bytes: &[u8] = bytemuck::cast_slice(now);
            self.slots[slot].input.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            self.driver
                .copy_in(self.world.input, &self.slots[slot].input, bytes.len())?;
            apply(self, self.world.input, now.len())?;
            let event = self.driver.mark()?;
            self.driver.wait(event)?;
            pairs = rest;
        }
        Ok(pairs)
    }

    fn copy_blocks(&mut self, pairs: u64, n: usize) -> Result<(), DeviceError> {
        if n == 0 {
            return Ok(());
        }
        let n_layers = self.world.config.attention.n_layers;
        let args = kernel::CopyBlocksArgs {
            cache: self.world.cache,
            pairs,
            chunks_per_layer: self.layer_bytes() / 16,
            chunks_per_block: (self.block_bytes() / n_layers as u64 / 16) as u32,
            unused: 0,
        };
        // SAFETY: `n` pairs lie there, and Step has checked that all of them are blocks of the cache.
        unsafe {
            self.driver
                .launch("copy_blocks", kernel::copy_blocks(n, n_layers), &args)
        }
    }

    fn update_tables(&mut self, changes: u64, n: usize) -> Result<(), DeviceError> {
        if n == 0 {
            return Ok(());
        }
        let args = kernel::UpdateTablesArgs {
            tables: self.world.tables,
            changes,
            n: n as u32,
            unused: 0,
        };
        // SAFETY: `n` changes lie there, and Step has checked that all of them are inside the tables.
        unsafe {
            self.driver
                .launch("update_tables", kernel::update_tables(n), &args)
        }
    }

    /// Runs the pass: launch by launch, or as a graph where its shape was seen before.
    fn run(&mut self, forward: &mut dyn FnMut(&mut dyn Ops)) -> Result<(), DeviceError> {
        let shape = self.plan.shape;
        if !shape.only_decodes() || self.plan.waves.len() != 1 {
            return Pass::run(&mut self.driver, &self.world, &self.plan, forward);
        }
        if let Some(graph) = self.graphs.find(shape) {
            return self.driver.replay(graph);
        }
        if !self.graphs.seen_before(shape) {
            return Pass::run(&mut self.driver, &self.world, &self.plan, forward);
        }
        self.driver.begin_capture()?;
        let recorded = Pass::run(&mut self.driver, &self.world, &self.plan, forward);
        let graph = self.driver.end_capture();
        recorded?;
        let graph = self.graphs.keep(shape, graph?);
        self.driver.replay(graph)
    }

    /// Starts the copies of what was drawn.
    fn fetch(&mut self, slot: usize) -> Result<(), DeviceError> {
        let rows = &self.step.logits;
        let drawn = self.world.drawn;
        let mut copy = |from: u64, words: usize| {
            let at = (from - drawn.tokens) as usize;
            self.driver
                .copy_out(&mut self.slots[slot].output, at, from, words * 4)
        };
        let n_top = rows.iter().filter_map(|row| row.n_logprobs).max();
        if !rows.is_empty() {
            copy(drawn.tokens, rows.len())?;
        }
        if n_top.is_some() {
            copy(drawn.logprobs, rows.len())?;
        }
        if n_top.is_some_and(|n| n > 0) {
            copy(drawn.top_ids, rows.len() * MAX_TOP)?;
            copy(drawn.top_logprobs, rows.len() * MAX_TOP)?;
        }
        Ok(())
    }
}

fn unsupported(what: String) -> DeviceError {
    DeviceError::Unsupported {
        device: "cuda",
        what,
    }
}

fn check(config: &DeviceConfig) -> Result<HeadDim, DeviceError> {
    let AttentionShape {
        n_heads,
        n_kv_heads,
        head_dim,
        block_size,
        ..
    } = config.attention;
    if config.precision == Precision::F32 {
        return Err(unsupported(
            "float32; use --dtype bfloat16, or --device cpu".to_owned(),
        ));
    }
    if n_kv_heads == 0 || n_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
        return Err(unsupported(format!(
            "{n_heads} query heads over {n_kv_heads} KV heads"
        )));
    }
    if !(8..=128).contains(&block_size) {
        return Err(unsupported(format!(
            "--block-size {block_size}; 8 to 128 tokens are"
        )));
    }
    if config.rope.inverse_frequencies.len() != head_dim / 2 {
        return Err(unsupported(format!(
            "{} rotary frequencies for a head of {head_dim}",
            config.rope.inverse_frequencies.len()
        )));
    }
    HeadDim::new(head_dim)
        .ok_or_else(|| unsupported(format!("head_dim {head_dim}; {:?} are", HeadDim::ALL)))
}

impl<D: Driver> Device for CudaDevice<D> {
    fn describe(&self) -> String {
        format!("cuda: {}", self.driver.describe())
    }

    fn depth(&self) -> usize {
        2
    }

    fn prepare_weight(&mut self, parts: &[TensorView<'_>]) -> Result<Weight, DeviceError> {
        let cols = parts.first().map_or(0, |part| part.shape[1]);
        assert!(
            parts.iter().all(|part| part.shape[1] == cols),
            "the parts of a weight differ in width"
        );
        let rows = parts.iter().map(|part| part.shape[0]).sum();
        let stride = cols.next_multiple_of(8);
        let row_bytes = stride * 2;
        let address = self.driver.allocate("a weight", rows * row_bytes)?;
        let mut to = address;
        for part in parts {
            let bytes_of_row = cols * part.dtype.bytes();
            self.driver.upload(to, part.shape[0], row_bytes, &|r, to| {
                let (values, padding) = to.split_at_mut(cols * 2);
                round(
                    part.dtype,
                    &part.bytes[r * bytes_of_row..][..bytes_of_row],
                    values,
                );
                padding.fill(0);
            })?;
            to += (part.shape[0] * row_bytes) as u64;
        }
        self.weight_bytes += (rows * row_bytes) as u64;
        self.world.weights.push(Matrix {
            address,
            rows,
            cols,
            stride,
        });
        Ok(Weight(self.world.weights.len() as u32 - 1))
    }

    fn prepare_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vector, DeviceError> {
        let mut values: Vec<f32> = parts
            .iter()
            .flat_map(|part| {
                let bytes = part.bytes.chunks_exact(part.dtype.bytes());
                bytes.map(|bytes| part.dtype.widen(bytes))
            })
            .collect();
        let len = values.len();
        values.resize(len.next_multiple_of(8), 0.0);
        let rounded: Vec<u16> = values
            .iter()
            .map(|&x| half::bf16::from_f32(x).to_bits())
            .collect();
        let mut send = |bytes: &[u8]| {
            let address = self.driver.allocate("a vector", bytes.len())?;
            let fill = |_, to: &mut [u8]| to.copy_from_slice(bytes);
            self.driver.upload(address, 1, bytes.len(), &fill)?;
            self.weight_bytes += bytes.len() as u64;
            Ok(address)
        };
        let vector = DeviceVector {
            binary32: send(bytemuck::cast_slice(&values))?,
            bfloat16: send(bytemuck::cast_slice(&rounded))?,
            len,
        };
        self.world.vectors.push(vector);
        Ok(Vector(self.world.vectors.len() as u32 - 1))
    }

    fn plan_buffer(&mut self, rows: Rows, cols: usize) -> Result<Buffer, DeviceError> {
        self.plan_area(rows, cols, false)
    }

    fn plan_logits(&mut self, vocabulary: usize) -> Result<Buffer, DeviceError> {
        if vocabulary > kernel::MAX_VOCABULARY {
            return Err(unsupported(format!(
                "a vocabulary of {vocabulary} tokens; {} are",
                kernel::MAX_VOCABULARY
            )));
        }
        self.plan_area(Rows::Logits, vocabulary, true)
    }

    fn memory(&self) -> Memory {
        // A driver that doesn't answer has failed; the first step says so.
        let found = self
            .driver
            .memory()
            .unwrap_or(driver::DeviceMemory { free: 0, total: 0 });
        let own = self.weight_bytes + self.workspace_bytes + self.cache_bytes;
        Memory {
            limit: self
                .world
                .config
                .memory_limit
                .map_or(found.total, |limit| limit.min(found.total)),
            weights: self.weight_bytes,
            workspace: self.workspace_bytes,
            other: (found.total - found.free).saturating_sub(own)
                + RESERVE_BYTES.min(found.total / 16),
        }
    }

    fn block_bytes(&self) -> u64 {
        let shape = &self.world.config.attention;
        (2 * shape.n_layers * shape.n_kv_heads * shape.block_size * shape.head_dim * 2) as u64
    }

    fn allocate_kv(&mut self, n_blocks: u32) -> Result<(), DeviceError> {
        self.world.n_blocks = n_blocks;
        if self.layer_bytes() / 16 > u64::from(u32::MAX) {
            return Err(unsupported(format!(
                "a KV cache of {} bytes a layer, 64 GiB at most; lower --num-gpu-blocks-override",
                self.layer_bytes()
            )));
        }
        let bytes = u64::from(n_blocks) * self.block_bytes();
        self.world.cache = self.driver.allocate("the KV cache", bytes as usize)?;
        self.cache_bytes = bytes;
        self.step.set_n_blocks(n_blocks);
        Ok(())
    }

    fn submit(
        &mut self,
        input: &StepInput,
        forward: &mut dyn FnMut(&mut dyn Ops),
    ) -> Result<Ticket, DeviceError> {
        assert!(
            self.in_flight.len() < self.depth(),
            "more steps under way than the device is deep"
        );
        self.step.begin(input);
        let shape = self.world.config.attention;
        let group = (shape.n_heads / shape.n_kv_heads) as u32;
        self.plan.make(
            &self.step,
            self.world.head_dim,
            group,
            self.world.partial_items,
        );
        let (ticket, slot) = (self.next_ticket, self.next_ticket as usize % 2);
        self.next_ticket += 1;
        self.send(slot, input)?;
        self.run(forward)?;
        self.fetch(slot)?;
        self.in_flight.push_back(InFlight {
            ticket,
            slot,
            event: self.driver.mark()?,
            n_logprobs: self.step.logits.iter().map(|row| row.n_logprobs).collect(),
        });
        Ok(Ticket(ticket))
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, DeviceError> {
        let step = self
            .in_flight
            .pop_front()
            .expect("a step was submitted before it is collected");
        assert_eq!(step.ticket, ticket.0, "the ticket of another step");
        self.driver.wait(step.event)?;
        let words: &[u32] = bytemuck::cast_slice(self.slots[step.slot].output.bytes());
        let n = self.world.drawn.rows;
        let top = |l: usize, n_top: usize| {
            let ids = &words[2 * n + l * MAX_TOP..][..n_top];
            let logprobs = &words[(2 + MAX_TOP) * n + l * MAX_TOP..][..n_top];
            ids.iter()
                .zip(logprobs)
                .map(|(&id, &bits)| (id, f32::from_bits(bits)))
                .collect()
        };
        let vocabulary = self.world.vocabulary();
        let sampled = step
            .n_logprobs
            .iter()
            .enumerate()
            .map(|(l, n_logprobs)| Sampled {
                token: words[l],
                logprob: n_logprobs.map(|_| f32::from_bits(words[n + l])),
                top: n_logprobs.map_or(Vec::new(), |n_top| {
                    top(l, usize::from(n_top).min(vocabulary))
                }),
            });
        Ok(StepOutput {
            sampled: sampled.collect(),
        })
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, DeviceError> {
        let area = self.world.buffers[buffer.0 as usize];
        let n_rows = match area.rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Logits => self.step.logits.len(),
        };
        let element = if area.wide { 4 } else { 2 };
        let mut host = self
            .driver
            .pinned((n_rows * area.stride * element).max(16))?;
        self.driver
            .copy_out(&mut host, 0, area.address, n_rows * area.stride * element)?;
        let event = self.driver.mark()?;
        self.driver.wait(event)?;
        let rows =
            host.bytes()[..n_rows * area.stride * element].chunks_exact(area.stride * element);
        let dtype = if area.wide { Dtype::F32 } else { Dtype::BF16 };
        Ok(rows
            .flat_map(|row| row.chunks_exact(element).take(area.cols))
            .map(|bytes| dtype.widen(bytes))
            .collect())
    }
}

impl<D: Driver> CudaDevice<D> {
    fn plan_area(&mut self, rows: Rows, cols: usize, wide: bool) -> Result<Buffer, DeviceError> {
        let limits = &self.world.config.limits;
        let n_rows = bucket_rows(match rows {
            Rows::Tokens => limits.max_tokens,
            Rows::Logits => limits.max_logits_rows,
        });
        let stride = cols.next_multiple_of(8);
        let bytes = n_rows * stride * if wide { 4 } else { 2 };
        let address = self.driver.allocate("an activation buffer", bytes)?;
        self.workspace_bytes += bytes as u64;
        self.world.buffers.push(Area {
            address,
            rows,
            cols,
            stride,
            wide,
        });
        Ok(Buffer(self.world.buffers.len() as u32 - 1))
    }
}

/// Elements as bfloat16.
fn round(dtype: Dtype, from: &[u8], to: &mut [u8]) {
    if dtype == Dtype::BF16 {
        return to.copy_from_slice(from);
    }
    for (from, to) in from.chunks_exact(dtype.bytes()).zip(to.chunks_exact_mut(2)) {
        to.copy_from_slice(&half::bf16::from_f32(dtype.widen(from)).to_le_bytes());
    }
}
