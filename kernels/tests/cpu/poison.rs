//! Fills blocks with NaN through the contract: what is read though nobody wrote it shows in every result.

use kvasir_kernels::device::*;
use kvasir_kernels::shape::{LayerId, Model};
use kvasir_kernels::step::*;
use kvasir_kernels::stored::*;

use crate::layer::{Shape, VOCABULARY};

/// A model of the same shape whose keys and values are not numbers.
pub(crate) struct Poison {
    model: Model,
    table: Weight,
    qkv: Buffer,
    shape: Shape,
}

impl Poison {
    /// Adds it to a device.
    pub(crate) fn add(device: &mut dyn Device, shape: &Shape) -> Self {
        let cols = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
        let model = device.add_model(&shape.model_shape()).unwrap();
        let bytes = f32::NAN.to_le_bytes().repeat(VOCABULARY * cols);
        let table = TensorView {
            dtype: Dtype::F32,
            shape: [VOCABULARY, cols],
            bytes: &bytes,
        };
        Self {
            model,
            table: device.prepare_weight(&[table.into()]).unwrap(),
            qkv: device.plan_buffer(Rows::Tokens, cols).unwrap(),
            shape: *shape,
        }
    }

    /// Spoils blocks in each way that a group uses them.
    pub(crate) fn spoil(&self, device: &mut dyn Device, blocks: &[BlockId]) {
        let (model, block_size) = (self.shape.model_shape(), self.shape.block_size);
        for blocks in blocks.chunks(model.limits.max_tokens / block_size) {
            let n_tokens = (blocks.len() * block_size) as u32;
            let update = |group| TableUpdate {
                group,
                row: TableRow(0),
                first: 0,
                blocks: blocks.to_vec(),
            };
            let input = StepInput {
                model: self.model,
                table_updates: (0..model.groups.len() as u32).map(update).collect(),
                tokens: vec![TokenInput::Id(0); n_tokens as usize],
                spans: vec![Span {
                    row: TableRow(0),
                    first_token: 0,
                    n_tokens,
                    first_position: 0,
                }],
                ..StepInput::default()
            };
            let forward = |ops: &mut dyn Ops| {
                ops.embed(self.qkv, self.table, 1.0);
                for layer in 0..model.layers.len() as u32 {
                    ops.rope_append(self.qkv, LayerId(layer), None);
                }
            };
            let ticket = device.submit(&input, &forward).unwrap();
            device.collect(ticket).unwrap();
        }
    }
}
