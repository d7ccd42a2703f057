//! The KV cache: pages of one size for the cache groups of all models, and how keys and values lie in them, so that both
//! are the `B` of a tile product.
//!
//! A page holds a block of each cache of one group, cache after cache; in a cache's part KV head follows KV head: first
//! the keys as `[pair of dimensions][slot]`, so that a step along a head's dimension meets 16 slots; then the values as
//! `[pair of slots][dimension]`, so that a step along the slots meets 16 dimensions. Slots (of keys) and dimensions (of
//! values) are padded to 16. A page lies in one piece: copying it is one copy, and memory is touched page by page.
//!
//! A packed pair of bf16 values spans two slots. The second may never have been written for this sequence, and what an
//! earlier one left there could be infinite, which times a probability of zero is NaN: the last token of a span
//! clears its neighbour.

use super::mapping::Mapping;
use super::simd::bf16_bits;
use super::tile::{LANES, elements_per_pair};
use crate::device::DeviceError;
use crate::shape::{CacheId, CacheShape, ModelShape, Precision};
use crate::step::BlockId;

/// Where a cache's block lies in a page, and the sizes of its parts in packed pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheLayout {
    precision: Precision,
    n_kv_heads: usize,
    /// The first pair of the cache in its group's pages.
    start: usize,
    /// Pairs of a key.
    pub(crate) key_pairs: usize,
    /// Slots of a block as keys have them, padded.
    pub(crate) key_slots: usize,
    /// Pairs of a block's slots.
    pub(crate) slot_pairs: usize,
    /// Dimensions of a value, padded.
    pub(crate) value_dims: usize,
}

impl CacheLayout {
    /// The layout of a model's cache.
    pub(crate) fn new(model: &ModelShape, cache: CacheId, precision: Precision) -> Self {
        let (group, place) = model.place_of(cache);
        let alone = |cache: CacheId| {
            let shape = model.caches[cache.0 as usize];
            Self::at_start(shape, model.block_size, precision)
        };
        let before = &model.groups[group].caches[..place];
        Self {
            start: before.iter().map(|&id| alone(id).block_pairs()).sum(),
            ..alone(cache)
        }
    }

    fn at_start(shape: CacheShape, block_size: usize, precision: Precision) -> Self {
        let per_pair = elements_per_pair(precision);
        Self {
            precision,
            n_kv_heads: shape.n_kv_heads,
            start: 0,
            key_pairs: shape.head_dim.div_ceil(per_pair),
            key_slots: block_size.next_multiple_of(LANES),
            slot_pairs: block_size.div_ceil(per_pair),
            value_dims: shape.head_dim.next_multiple_of(LANES),
        }
    }

    fn head_pairs(&self) -> usize {
        self.key_pairs * self.key_slots + self.slot_pairs * self.value_dims
    }

    /// Pairs of a block of this cache.
    fn block_pairs(&self) -> usize {
        self.n_kv_heads * self.head_pairs()
    }
}

/// Bytes of a page that holds a block of any group of the model.
pub(crate) fn page_bytes(model: &ModelShape, precision: Precision) -> usize {
    let ends = (0..model.caches.len() as u32).map(|cache| {
        let layout = CacheLayout::new(model, CacheId(cache), precision);
        layout.start + layout.block_pairs()
    });
    ends.max().unwrap_or(0) * size_of::<u32>()
}

/// The pages.
#[derive(Debug)]
pub(crate) struct KvCache {
    page_pairs: usize,
    n_pages: usize,
    memory: Mapping,
}

impl KvCache {
    /// `n_pages` pages; the system gives them memory when they are first written.
    pub(crate) fn new(page_bytes: usize, n_pages: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            page_pairs: page_bytes / size_of::<u32>(),
            n_pages,
            memory: Mapping::new("the KV cache", n_pages * page_bytes)?,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The keys of a head in a block, `[key_pairs][key_slots]` pairs.
    pub(crate) fn keys(&self, layout: &CacheLayout, block: usize, head: usize) -> *mut u32 {
        assert!(
            block < self.n_pages
                && head < layout.n_kv_heads
                && layout.start + layout.block_pairs() <= self.page_pairs,
            "outside the KV cache"
        );
        let offset = block * self.page_pairs + layout.start + head * layout.head_pairs();
        // SAFETY: the cache's part ends within the page, and the page within the memory.
        unsafe { self.memory.as_ptr::<u32>().add(offset) }
    }

    /// The values of a head in a block, `[slot_pairs][value_dims]` pairs.
    pub(crate) fn values(&self, layout: &CacheLayout, block: usize, head: usize) -> *mut u32 {
        // SAFETY: a head's values follow its keys.
        unsafe {
            self.keys(layout, block, head)
                .add(layout.key_pairs * layout.key_slots)
        }
    }

    /// Writes a token's key and value, and clears the slot that shares a pair with it if `is_last` of its span.
    ///
    /// # Safety
    /// Nobody reads this head of this block meanwhile, and nobody else writes this slot, or with `is_last` the next.
    pub(crate) unsafe fn append(
        &self,
        layout: &CacheLayout,
        (block, slot, head): (usize, usize, usize),
        key: &[f32],
        value: &[f32],
        is_last: bool,
    ) {
        let (keys, values) = (
            self.keys(layout, block, head),
            self.values(layout, block, head),
        );
        assert!(
            slot < layout.slot_pairs * elements_per_pair(layout.precision)
                && slot < layout.key_slots
                && key.len() == value.len()
        );
        assert!(
            key.len() <= layout.value_dims
                && key.len().div_ceil(elements_per_pair(layout.precision)) <= layout.key_pairs
        );
        // SAFETY: pairs `[d / per_pair][slot]` of the keys and `[slot / per_pair][d]` of the values are in the parts
        // by the assertions; halves of a pair are written as their own 16 bits, so that tasks on neighbouring slots
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
                        let pair = values.add(((slot / 2) * layout.value_dims + d) * 2);
                        *pair.add(slot % 2) = bf16_bits(*value) as u16;
                        if clear_next {
                            *pair.add(1) = 0;
                        }
                    }
                }
            }
        }
    }

    /// Copies a page.
    pub(crate) fn copy_page(&mut self, from: BlockId, to: BlockId) {
        let page = |block: BlockId| {
            assert!((block.0 as usize) < self.n_pages, "outside the KV cache");
            // SAFETY: the page lies in the memory by the assertion.
            unsafe {
                self.memory
                    .as_ptr::<u32>()
                    .add(block.0 as usize * self.page_pairs)
            }
        };
        // SAFETY: two pages of `page_pairs` pairs; `&mut self` keeps everybody else away, and `copy` allows both to be
        // the same.
        unsafe { std::ptr::copy(page(from), page(to), self.page_pairs) };
    }
}
