//! Where everything lies on the device that operations name: addresses and shapes only, which never change once the models
//! are built.

use crate::device::{Activation, Rows};
use crate::shape::{CacheId, Model, ModelShape};

/// What handles name, of all models, and the cache.
#[derive(Debug, Default)]
pub(super) struct DeviceBuffers {
    pub(super) weights: Vec<Matrix>,
    pub(super) vectors: Vec<DeviceVector>,
    pub(super) activations: Vec<ActivationBuffer>,
    pub(super) logits: Vec<LogitsBuffer>,
    pub(super) experts: Vec<ExpertsBuffers>,
    pub(super) cache: PagedCache,
}

/// A weight: `[rows, stride]`, bfloat16, zeros from column `cols` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub(super) address: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

/// A vector, in both forms, zeros from its length to a multiple of 8.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceVector {
    pub(super) f32: u64,
    pub(super) bf16: u64,
    pub(super) len: usize,
}

/// An activation matrix: `[rows, stride]`, bfloat16, zeros from column `cols` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct ActivationBuffer {
    pub(super) model: Model,
    pub(super) address: u64,
    pub(super) rows: Rows,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

/// Logits: `[L, stride]`, f32.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogitsBuffer {
    pub(super) model: Model,
    pub(super) address: u64,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

/// Experts and their workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertsBuffers {
    pub(super) model: Model,
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    pub(super) shape: ExpertsSizes,
    pub(super) renormalize: bool,
    pub(super) activation: Activation,
    pub(super) workspace: ExpertsWorkspace,
}

/// What the workspace of experts is planned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExpertsSizes {
    pub(super) n_experts: usize,
    pub(super) top_k: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
}

/// Addresses of what the kernels of [`ExpertsBuffers`] hand to each other. A pair is a token and one of its experts.
/// Layers run one after another: all of equal sizes share it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertsWorkspace {
    /// `[pairs]`
    pub(super) chosen: u64,
    /// `[pairs]`
    pub(super) shares: u64,
    /// `[pairs]`: by expert.
    pub(super) pairs: u64,
    pub(super) tiles: u64,
    pub(super) n_tiles: u64,
    /// `[pairs, 2 * intermediate]`, by expert.
    pub(super) gate_up: u64,
    /// `[pairs, intermediate]`, by expert.
    pub(super) activated: u64,
    /// `[pairs, hidden]`
    pub(super) results: u64,
}

/// The paged cache of all models.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PagedCache {
    pub(super) address: u64,
    pub(super) n_blocks: u32,
    pub(super) layout: PageLayout,
}

/// How the pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageLayout {
    /// Every layer's share of a page has one size: the cache is `[place in the group][block][share]`.
    ByPlace { n_places: u64, share_bytes: u64 },
    /// `[block][page]`, in a page one layer of the group after another.
    ByPage { page_bytes: u64 },
}

impl Default for PageLayout {
    fn default() -> Self {
        Self::ByPage { page_bytes: 0 }
    }
}

/// Bytes of the keys and values of a block in one cache.
fn share_bytes(shape: &ModelShape, cache: CacheId) -> u64 {
    let elements = shape.caches[cache.0 as usize].elements_per_token() * shape.block_size;
    2 * elements as u64
}

impl PageLayout {
    /// The layout for all of some models.
    pub(super) fn of<'a>(shapes: impl Iterator<Item = &'a ModelShape> + Clone) -> Self {
        let shares = shapes.clone().flat_map(|shape| {
            let ids = (0..shape.caches.len() as u32).map(CacheId);
            ids.map(|id| share_bytes(shape, id))
        });
        let groups = shapes.clone().flat_map(|shape| &shape.groups);
        let n_places = groups.map(|group| group.caches.len()).max().unwrap_or(0);
        let (fewest, most) = (shares.clone().min(), shares.max());
        if let (Some(fewest), Some(most)) = (fewest, most)
            && fewest == most
        {
            return Self::ByPlace {
                n_places: n_places as u64,
                share_bytes: most,
            };
        }
        let pages = shapes.clone().flat_map(|shape| {
            let page = |ids: &[CacheId]| ids.iter().map(|&id| share_bytes(shape, id)).sum::<u64>();
            shape.groups.iter().map(move |group| page(&group.caches))
        });
        // Kernels count in heads: a page is a whole number of them, of every size.
        let heads = shapes.flat_map(|shape| shape.caches.iter().map(|c| 2 * c.head_dim as u64));
        let unit = heads.fold(1, least_common_multiple);
        Self::ByPage {
            page_bytes: pages.max().unwrap_or(0).next_multiple_of(unit),
        }
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> u64 {
        match self {
            Self::ByPlace {
                n_places,
                share_bytes,
            } => n_places * share_bytes,
            Self::ByPage { page_bytes } => page_bytes,
        }
    }

    /// Bytes from page to page of one cache.
    pub(super) fn page_stride(self) -> u64 {
        match self {
            Self::ByPlace { share_bytes, .. } => share_bytes,
            Self::ByPage { page_bytes } => page_bytes,
        }
    }
}

fn least_common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

impl PagedCache {
    /// The address of a cache's share of page 0.
    pub(super) fn first_page(&self, shape: &ModelShape, cache: CacheId) -> u64 {
        let (group, place) = shape.place_of(cache);
        let offset = match self.layout {
            PageLayout::ByPlace { share_bytes, .. } => {
                place as u64 * u64::from(self.n_blocks) * share_bytes
            }
            PageLayout::ByPage { .. } => shape.groups[group].caches[..place]
                .iter()
                .map(|&before| share_bytes(shape, before))
                .sum(),
        };
        self.address + offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{CacheShape, Limits, cache_groups};
    use std::num::NonZeroU32;

    fn shape(caches: Vec<CacheShape>) -> ModelShape {
        ModelShape {
            vocab_size: 2,
            max_positions: 16,
            block_size: 16,
            limits: Limits {
                max_tokens: 1,
                max_sequences: 1,
                max_logits_rows: 1,
                max_blocks_per_sequence: 1,
            },
            ropes: Vec::new(),
            groups: cache_groups(&caches),
            caches,
            layers: Vec::new(),
        }
    }

    fn cache(n_kv_heads: usize, head_dim: usize, window: Option<u32>) -> CacheShape {
        CacheShape {
            n_kv_heads,
            head_dim,
            window: window.and_then(NonZeroU32::new),
        }
    }

    #[test]
    fn equal_shares_lie_place_by_place_and_others_page_by_page() {
        let llama = shape(vec![cache(2, 64, None); 3]);
        let gemma = shape(vec![
            cache(2, 64, None),
            cache(2, 64, Some(8)),
            cache(2, 64, Some(8)),
        ]);
        let mixed = shape(vec![
            cache(1, 80, None),
            cache(2, 128, Some(8)),
            cache(1, 80, None),
            cache(1, 80, None),
        ]);
        let share = 2 * 2 * 64 * 16 * 2;
        for (why, shapes, want) in [
            (
                "one group of three",
                vec![&llama],
                PageLayout::ByPlace {
                    n_places: 3,
                    share_bytes: share,
                },
            ),
            (
                "three groups of one, beside a group of three",
                vec![&gemma, &llama],
                PageLayout::ByPlace {
                    n_places: 3,
                    share_bytes: share,
                },
            ),
        ] {
            assert_eq!(PageLayout::of(shapes.into_iter()), want, "{why}");
        }
        let layout = PageLayout::of([&mixed].into_iter());
        let PageLayout::ByPage { page_bytes } = layout else {
            panic!("shares of two sizes: {layout:?}");
        };
        assert!(page_bytes.is_multiple_of(160) && page_bytes.is_multiple_of(256));
        let cache = PagedCache {
            address: 1 << 20,
            n_blocks: 7,
            layout,
        };
        // What caches of a group hold of a page lies side by side, inside it.
        for group in &mixed.groups {
            let mut end = 1 << 20;
            for &id in &group.caches {
                assert_eq!(cache.first_page(&mixed, id), end);
                end += share_bytes(&mixed, id);
            }
            assert!(end <= (1 << 20) + page_bytes);
        }
    }
}
