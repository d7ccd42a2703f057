//! The KV cache: blocks of keys and values, laid out so that both are the `B` of a tile product.
//!
//! Layer by layer, block by block, KV head by KV head: first the keys as `[unit of dimensions][slot]`, so that a step
//! along a head's dimension meets 16 slots; then the values as `[unit of slots][dimension]`, so that a step along the
//! slots meets 16 dimensions. Slots (of keys) and dimensions (of values) are padded to 16.
//!
//! A unit of two bf16 values spans two slots. The second may never have been written for this sequence, and what an
//! earlier one left there could be infinite, which times a probability of zero is NaN: the last token of a span
//! clears its neighbour.

use super::lanes::bf16_bits;
use super::pages::Pages;
use super::tile::{LANES, elements_per_unit};
use crate::device::{AttentionShape, BlockId, DeviceError, Precision};

/// Sizes of the parts of a block, in units.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvLayout {
    precision: Precision,
    n_layers: usize,
    n_kv_heads: usize,
    /// Units of a key.
    pub(crate) key_units: usize,
    /// Slots of a block as keys have them, padded.
    pub(crate) key_slots: usize,
    /// Units of a block's slots.
    pub(crate) slot_units: usize,
    /// Dimensions of a value, padded.
    pub(crate) value_dims: usize,
}

impl KvLayout {
    pub(crate) fn new(shape: &AttentionShape, precision: Precision) -> Self {
        let per_unit = elements_per_unit(precision);
        Self {
            precision,
            n_layers: shape.n_layers,
            n_kv_heads: shape.n_kv_heads,
            key_units: shape.head_dim.div_ceil(per_unit),
            key_slots: shape.block_size.next_multiple_of(LANES),
            slot_units: shape.block_size.div_ceil(per_unit),
            value_dims: shape.head_dim.next_multiple_of(LANES),
        }
    }

    fn head_units(&self) -> usize {
        self.key_units * self.key_slots + self.slot_units * self.value_dims
    }

    fn layer_block_units(&self) -> usize {
        self.n_kv_heads * self.head_units()
    }

    /// Bytes of a block, all layers.
    pub(crate) fn block_bytes(&self) -> usize {
        self.n_layers * self.layer_block_units() * size_of::<u32>()
    }
}

/// The blocks.
#[derive(Debug)]
pub(crate) struct KvCache {
    layout: KvLayout,
    n_blocks: usize,
    pages: Pages,
}

impl KvCache {
    /// `n_blocks` blocks; the system gives them memory when they are first written.
    pub(crate) fn new(layout: KvLayout, n_blocks: usize) -> Result<Self, DeviceError> {
        let pages = Pages::new("the KV cache", n_blocks * layout.block_bytes())?;
        Ok(Self {
            layout,
            n_blocks,
            pages,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// The keys of a head in a block, `[key_units][key_slots]` units.
    pub(crate) fn keys(&self, layer: usize, block: usize, head: usize) -> *mut u32 {
        let layout = &self.layout;
        assert!(
            layer < layout.n_layers && block < self.n_blocks && head < layout.n_kv_heads,
            "outside the KV cache"
        );
        let offset = (layer * self.n_blocks + block) * layout.layer_block_units()
            + head * layout.head_units();
        // SAFETY: the indices are in range, so the offset is within the `n_blocks * block_bytes` mapped.
        unsafe { self.pages.as_ptr::<u32>().add(offset) }
    }

    /// The values of a head in a block, `[slot_units][value_dims]` units.
    pub(crate) fn values(&self, layer: usize, block: usize, head: usize) -> *mut u32 {
        // SAFETY: a head's values follow its keys.
        unsafe {
            self.keys(layer, block, head)
                .add(self.layout.key_units * self.layout.key_slots)
        }
    }

    /// Writes a token's key and value, and clears the slot that shares a unit with it if `is_last` of its span.
    ///
    /// # Safety
    /// Nobody reads this head of this block meanwhile, and nobody else writes this slot, or with `is_last` the next.
    pub(crate) unsafe fn append(
        &self,
        at: (usize, usize, usize),
        slot: usize,
        key: &[f32],
        value: &[f32],
        is_last: bool,
    ) {
        let (layer, block, head) = at;
        let (layout, keys, values) = (
            &self.layout,
            self.keys(layer, block, head),
            self.values(layer, block, head),
        );
        assert!(
            slot < layout.slot_units * elements_per_unit(layout.precision)
                && key.len() == value.len()
        );
        assert!(
            key.len() <= layout.value_dims
                && key.len().div_ceil(elements_per_unit(layout.precision)) <= layout.key_units
        );
        // SAFETY: units `[d / per_unit][slot]` of the keys and `[slot / per_unit][d]` of the values are in the parts
        // by the assertions; halves of a unit are written as their own 16 bits, so that tasks on neighbouring slots
        // touch different memory. Little endian, as x86 and AArch64 are: the first of a pair is the lower half.
        unsafe {
            match layout.precision {
                Precision::F32 => {
                    for (d, (key, value)) in key.iter().zip(value).enumerate() {
                        *keys.add(d * layout.key_slots + slot) = key.to_bits();
                        *values.add(slot * layout.value_dims + d) = value.to_bits();
                    }
                }
                Precision::BF16 => {
                    let (keys, values) = (keys.cast::<u16>(), values.cast::<u16>());
                    let clear_next = is_last && slot.is_multiple_of(2);
                    for (d, (key, value)) in key.iter().zip(value).enumerate() {
                        *keys.add(((d / 2) * layout.key_slots + slot) * 2 + d % 2) =
                            bf16_bits(*key) as u16;
                        let unit = values.add(((slot / 2) * layout.value_dims + d) * 2);
                        *unit.add(slot % 2) = bf16_bits(*value) as u16;
                        if clear_next {
                            *unit.add(1) = 0;
                        }
                    }
                }
            }
        }
    }

    /// Copies a block in every layer.
    pub(crate) fn copy_block(&mut self, from: BlockId, to: BlockId) {
        for layer in 0..self.layout.n_layers {
            let source = self.keys(layer, from.0 as usize, 0);
            let destination = self.keys(layer, to.0 as usize, 0);
            // SAFETY: a block of a layer is `layer_block_units` units from the first head's keys on; `&mut self`
            // keeps everybody else away, and `copy` allows both to be the same.
            unsafe { std::ptr::copy(source, destination, self.layout.layer_block_units()) };
        }
    }
}
