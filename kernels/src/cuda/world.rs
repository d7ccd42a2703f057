//! Where everything lies on the device: weights, buffers, the step's input, the cache. Addresses and shapes only.

use crate::device::{DeviceConfig, Rows};

use super::kernel::{HeadDim, KvCache};

/// Where everything lies that operations name; addresses never change once the model is built.
pub(super) struct World {
    pub(super) config: DeviceConfig,
    pub(super) head_dim: HeadDim,
    pub(super) weights: Vec<Matrix>,
    pub(super) vectors: Vec<DeviceVector>,
    pub(super) buffers: Vec<Area>,
    pub(super) input: u64,
    pub(super) tables: u64,
    pub(super) inverse_frequencies: u64,
    pub(super) partial_out: u64,
    pub(super) partial_softmax: u64,
    pub(super) partial_items: usize,
    pub(super) drawn: Drawn,
    pub(super) cache: u64,
    pub(super) n_blocks: u32,
}

/// A weight: `[rows, stride]`, bfloat16, zeros from column `cols` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub(super) address: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

/// A vector, zeros from its length to a multiple of 8.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceVector {
    pub(super) binary32: u64,
    pub(super) bfloat16: u64,
    pub(super) len: usize,
}

/// An activation buffer: `[rows, stride]`, bfloat16 or (`wide`) binary32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) address: u64,
    pub(super) rows: Rows,
    pub(super) cols: usize,
    pub(super) stride: usize,
    pub(super) wide: bool,
}

/// What `sample` writes, one array after another: `[L]`, `[L]`, `[L][MAX_TOP]`, `[L][MAX_TOP]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn {
    pub(super) tokens: u64,
    pub(super) logprobs: u64,
    pub(super) top_ids: u64,
    pub(super) top_logprobs: u64,
    pub(super) rows: usize,
}

impl World {
    /// Logits of a row; 0 before they are planned.
    pub(super) fn vocabulary(&self) -> usize {
        let logits = self.buffers.iter().find(|area| area.wide);
        logits.map_or(0, |area| area.cols)
    }

    /// The cache of one layer, as kernels name it.
    pub(super) fn kv_cache(&self, layer: usize) -> KvCache {
        let shape = &self.config.attention;
        let block = 2 * shape.n_kv_heads * shape.block_size * shape.head_dim * 2;
        KvCache {
            layer: self.cache + (layer * block * self.n_blocks as usize) as u64,
            tables: self.tables,
            table_width: self.config.limits.max_blocks_per_sequence as u32,
            block_size: shape.block_size as u32,
            block_size_magic: KvCache::magic(shape.block_size as u32),
            n_kv_heads: shape.n_kv_heads as u32,
            head_dim: shape.head_dim as u32,
            unused: 0,
        }
    }
}
