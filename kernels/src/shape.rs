//! What a model tells a device about itself before it has weights there: attention layer by layer, KV caches and their
//! groups, the largest step. Checked once, for all devices, in words that a user understands.
//!
//! Pure: it knows no device and no memory. A device adds what it can't do as [`Capabilities`].

use std::num::NonZeroU32;

use crate::error::DeviceError;

/// A model on the device, in the order in which they were added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Model(pub u32);

/// What a number is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// bfloat16; numbers stored otherwise are rounded to the nearest.
    BF16,
    /// IEEE 754 binary32; numbers stored in fewer bits are widened exactly.
    F32,
}

impl Precision {
    /// The name that `--dtype` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
        }
    }
}

/// What weights, activations and the KV cache are kept in: three choices. Sums are always in f32, and so are
/// activations between operations where the device is a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Numerics {
    /// Prepared weights.
    pub weights: Precision,
    /// What is multiplied with weights.
    pub activations: Precision,
    /// Keys and values in the cache.
    pub kv_cache: Precision,
}

impl Numerics {
    /// The same for all three.
    pub const fn uniform(precision: Precision) -> Self {
        Self {
            weights: precision,
            activations: precision,
            kv_cache: precision,
        }
    }
}

/// Rotary position embedding: the angle of pair `i` (elements `i` and `i + n / 2` of a head, `n` twice the number of
/// frequencies) at position `p` is `p * inverse_frequencies[i]`, computed in f32 as Transformers does; sine and cosine
/// are multiplied by `scale`. Elements from `n` on stay as they are (partial rotary embedding).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// At most `[head_dim / 2]`, scaling (llama3, linear, yarn and the like) already applied.
    pub inverse_frequencies: Vec<f32>,
    /// The attention factor of some scalings; 1 otherwise.
    pub scale: f32,
}

/// Names a [`Rope`] of a model: an index into [`ModelShape::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RopeId(pub u32);

/// Names a KV cache of a model: an index into [`ModelShape::caches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheId(pub u32);

/// Names an attention layer of a model: an index into [`ModelShape::layers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerId(pub u32);

/// Keys and values of one layer, or of several that read the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Keys that a query sees, its own among them: position `p` sees those after `p - window`. `None`: all before it.
    pub window: Option<NonZeroU32>,
}

impl CacheShape {
    /// Elements of the keys and values of one token.
    pub const fn elements_per_token(&self) -> usize {
        2 * self.n_kv_heads * self.head_dim
    }

    /// The first position that a query at `position` sees.
    pub const fn first_visible(&self, position: u32) -> u32 {
        match self.window {
            Some(window) => (position + 1).saturating_sub(window.get()),
            None => 0,
        }
    }
}

/// One attention layer. Its queries, keys and values are one buffer `[T, (n_heads + 2 n_kv_heads) * head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Where its keys and values are.
    pub cache: CacheId,
    /// Query heads, a multiple of the cache's `n_kv_heads`.
    pub n_heads: usize,
    /// `None`: no position embedding.
    pub rope: Option<RopeId>,
    /// Scores are multiplied by it.
    pub scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`, after `scale` (Gemma 2).
    pub soft_cap: Option<f32>,
}

/// Layers whose keys and values of `block_size` tokens lie together in one page. All have the same shape and window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// As in [`CacheShape::window`].
    pub window: Option<NonZeroU32>,
    /// The caches that a page holds, in this order.
    pub caches: Vec<CacheId>,
}

/// The largest step that a device must be ready for; the workspace is planned from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Input tokens of a step, prefill and decode together.
    pub max_tokens: usize,
    /// Sequences in a step; also the rows of each group's block-table matrix.
    pub max_sequences: usize,
    /// Rows of logits of a step.
    pub max_logits_rows: usize,
    /// Blocks of the longest sequence.
    pub max_blocks_per_sequence: usize,
}

/// A model without its weights: what a device plans tables, caches and workspace from.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Positions are below this.
    pub max_positions: usize,
    /// Token slots in a block.
    pub block_size: usize,
    /// The largest step.
    pub limits: Limits,
    /// The rotary embeddings that layers name.
    pub ropes: Vec<Rope>,
    /// The KV caches that layers name.
    pub caches: Vec<CacheShape>,
    /// The attention layers.
    pub layers: Vec<AttentionShape>,
    /// Each cache in one group; see [`cache_groups`].
    pub groups: Vec<CacheGroup>,
}

/// What a device has operations for, beyond what every device must have.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The device's name in messages.
    pub device: &'static str,
    /// Head sizes, where not all even ones.
    pub head_dims: Option<&'static [usize]>,
    /// Block sizes, smallest and largest.
    pub block_sizes: (usize, usize),
}

impl ModelShape {
    /// The shape of a layer's cache.
    pub fn cache_of(&self, layer: LayerId) -> CacheShape {
        self.caches[self.layers[layer.0 as usize].cache.0 as usize]
    }

    /// The group of a cache, and the cache's place in it.
    pub fn place_of(&self, cache: CacheId) -> (usize, usize) {
        let found = self.groups.iter().enumerate().find_map(|(g, group)| {
            let index = group.caches.iter().position(|&other| other == cache)?;
            Some((g, index))
        });
        found.expect("check() made sure that each cache is in a group")
    }

    /// Elements of keys and values in the block of the largest group: what a page must hold.
    pub fn page_elements(&self) -> usize {
        let of_cache = |id: &CacheId| self.caches[id.0 as usize].elements_per_token();
        let groups = self.groups.iter();
        let tokens = groups.map(|group| group.caches.iter().map(of_cache).sum::<usize>());
        tokens.max().unwrap_or(0) * self.block_size
    }

    /// Refuses what no device can run, and what this one can't.
    pub fn check(&self, can: &Capabilities) -> Result<(), DeviceError> {
        let refuse = |what: String| {
            Err(DeviceError::Unsupported {
                device: can.device,
                what,
            })
        };
        let (smallest, largest) = can.block_sizes;
        if !(smallest..=largest).contains(&self.block_size) {
            return refuse(format!(
                "--block-size {}; {smallest} to {largest} tokens are",
                self.block_size
            ));
        }
        let grouped: Vec<CacheId> = self.groups.iter().flat_map(|g| g.caches.clone()).collect();
        for (i, cache) in self.caches.iter().enumerate() {
            let here = |id: &&CacheId| id.0 as usize == i;
            assert_eq!(
                grouped.iter().filter(here).count(),
                1,
                "a cache belongs to one group"
            );
            if cache.n_kv_heads == 0 || cache.head_dim == 0 || !cache.head_dim.is_multiple_of(2) {
                return refuse(format!(
                    "{} KV heads of {} elements; an even number of elements is",
                    cache.n_kv_heads, cache.head_dim
                ));
            }
            if let Some(head_dims) = can.head_dims
                && !head_dims.contains(&cache.head_dim)
            {
                return refuse(format!("head_dim {}; {head_dims:?} are", cache.head_dim));
            }
        }
        for layer in &self.layers {
            let Some(cache) = self.caches.get(layer.cache.0 as usize) else {
                return refuse(format!(
                    "a layer with cache {} of {}",
                    layer.cache.0,
                    self.caches.len()
                ));
            };
            if layer.n_heads == 0 || !layer.n_heads.is_multiple_of(cache.n_kv_heads) {
                return refuse(format!(
                    "{} query heads over {} KV heads; a multiple is",
                    layer.n_heads, cache.n_kv_heads
                ));
            }
            let Some(rope) = layer.rope else { continue };
            let Some(rope) = self.ropes.get(rope.0 as usize) else {
                return refuse(format!(
                    "rotary embedding {} of {}",
                    rope.0,
                    self.ropes.len()
                ));
            };
            if rope.inverse_frequencies.len() * 2 > cache.head_dim {
                return refuse(format!(
                    "{} rotary frequencies for a head of {}; at most half as many are",
                    rope.inverse_frequencies.len(),
                    cache.head_dim
                ));
            }
        }
        Ok(())
    }
}

/// The share of all pages that may be padding: of what a group with fewer layers than the others leaves empty.
const MOST_PADDING: f64 = 0.1;

/// Groups caches of equal shape and window, so that the blocks of each group fill a page of one size.
///
/// Candidates for the page are what 1, 2, ... caches of the kind with the fewest bytes take, as long as one block of
/// every kind fits. The largest page that leaves at most a tenth empty is taken, else the one that leaves the least: a
/// model of equal layers has one group, Gemma 3 12B (8 global and 40 local layers) has six groups of eight.
pub fn cache_groups(caches: &[CacheShape]) -> Vec<CacheGroup> {
    let mut kinds: Vec<(CacheShape, Vec<CacheId>)> = Vec::new();
    for (i, &cache) in caches.iter().enumerate() {
        let id = CacheId(i as u32);
        match kinds.iter_mut().find(|(shape, _)| *shape == cache) {
            Some((_, ids)) => ids.push(id),
            None => kinds.push((cache, vec![id])),
        }
    }
    let largest = caches.iter().map(CacheShape::elements_per_token).max();
    let used: usize = caches.iter().map(CacheShape::elements_per_token).sum();
    let fewest = kinds
        .iter()
        .min_by_key(|(shape, ids)| shape.elements_per_token() * ids.len());
    let (Some(largest), Some((unit, most))) = (largest, fewest) else {
        return Vec::new();
    };
    let per_page = |page: usize, shape: &CacheShape| page / shape.elements_per_token();
    let padding = |page: usize| {
        let pages: usize = kinds
            .iter()
            .map(|(shape, ids)| ids.len().div_ceil(per_page(page, shape)))
            .sum();
        1.0 - used as f64 / (pages * page) as f64
    };
    let candidates: Vec<usize> = (1..=most.len())
        .map(|n| n * unit.elements_per_token())
        .filter(|&page| page >= largest)
        .collect();
    let large_enough = candidates
        .iter()
        .rev()
        .find(|&&page| padding(page) <= MOST_PADDING);
    let least_padded = || {
        let rising = candidates.iter().rev();
        rising.min_by(|a, b| padding(**a).total_cmp(&padding(**b)))
    };
    let page = large_enough
        .or_else(least_padded)
        .copied()
        .unwrap_or(largest);
    let mut groups = Vec::new();
    for (shape, ids) in &kinds {
        groups.extend(ids.chunks(per_page(page, shape)).map(|ids| CacheGroup {
            window: shape.window,
            caches: ids.to_vec(),
        }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(window: Option<u32>, head_dim: usize) -> CacheShape {
        CacheShape {
            n_kv_heads: 4,
            head_dim,
            window: window.and_then(NonZeroU32::new),
        }
    }

    /// Every `period`-th layer is global, as in Gemma 3.
    fn mixed(n_layers: usize, period: usize) -> Vec<CacheShape> {
        (1..=n_layers)
            .map(|i| cache((i % period != 0).then_some(1024), 64))
            .collect()
    }

    #[test]
    fn layers_are_grouped_so_that_pages_are_full() {
        for (why, caches, want) in [
            ("a Llama has one group", mixed(32, 1), vec![32]),
            ("Gemma 3 12B", mixed(48, 6), vec![8; 6]),
            (
                "Gemma 3 4B: a page of five",
                mixed(34, 6),
                vec![5, 5, 5, 5, 5, 5, 4],
            ),
            ("every other layer", mixed(24, 2), vec![12, 12]),
            ("no cache at all", Vec::new(), Vec::new()),
            (
                "one global layer of twice the size",
                vec![cache(Some(8), 64), cache(Some(8), 64), cache(None, 128)],
                vec![2, 1],
            ),
        ] {
            let groups = cache_groups(&caches);
            let mut sizes: Vec<usize> = groups.iter().map(|group| group.caches.len()).collect();
            sizes.sort_by(|a, b| b.cmp(a));
            assert_eq!(sizes, want, "{why}");
            let mut ids: Vec<u32> = groups
                .iter()
                .flat_map(|g| &g.caches)
                .map(|id| id.0)
                .collect();
            ids.sort_unstable();
            let all: Vec<u32> = (0..caches.len() as u32).collect();
            assert_eq!(ids, all, "{why}: each cache is in one group");
        }
        let groups = cache_groups(&mixed(62, 6));
        assert!(
            groups.len() * 6 <= 66 + 6,
            "Gemma 3 27B: {} groups",
            groups.len()
        );
    }

    #[test]
    fn a_window_counts_the_query_itself() {
        let cache = cache(Some(3), 2);
        for (position, first) in [(0, 0), (2, 0), (3, 1), (100, 98)] {
            assert_eq!(cache.first_visible(position), first, "position {position}");
        }
    }
}
