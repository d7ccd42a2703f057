//! The operations on the paged cache.

use std::f32::consts::LOG2_E;
use std::num::NonZeroU32;

use crate::device::{HeadNorms, Rows};
use crate::shape::{AttentionShape, CacheShape, LayerId};

use super::super::buffers::ActivationBuffer;
use super::super::driver::Driver;
use super::super::kernel::{
    self, HeadDim, In, KvCache, NO_WINDOW, PagedDecodeArgs, PagedPrefillArgs, PrefillKind,
    SplitKvSequence, SplitKvTile,
};
use super::super::plan::LayerLists;
use super::Pass;

/// A layer as its kernels need it.
struct Layer {
    attention: AttentionShape,
    cache: CacheShape,
    head_dim: HeadDim,
    pages: KvCache,
}

impl<D: Driver> Pass<'_, D> {
    fn layer(&self, layer: LayerId) -> Layer {
        let shape = &self.model.shape;
        let attention = shape.layers[layer.0 as usize];
        let cache = shape.cache_of(layer);
        let (group, _) = shape.place_of(attention.cache);
        let limits = &shape.limits;
        let table = group * limits.max_sequences * limits.max_blocks_per_sequence;
        let paged = &self.buffers.cache;
        let pages = KvCache {
            layer: paged.first_page(shape, attention.cache).into(),
            tables: (self.model.buffers.tables + table as u64 * 4).into(),
            table_width: limits.max_blocks_per_sequence as u32,
            block_size: shape.block_size as u32,
            block_size_magic: KvCache::magic(shape.block_size as u32),
            page_rows: (paged.layout.page_stride() / (2 * cache.head_dim as u64)) as u32,
            n_kv_heads: cache.n_kv_heads as u32,
            head_dim: cache.head_dim as u32,
        };
        Layer {
            attention,
            cache,
            head_dim: HeadDim::new(cache.head_dim).expect("check() allowed this head size"),
            pages,
        }
    }

    fn assert_qkv(&self, qkv: ActivationBuffer, layer: &Layer) {
        let heads = layer.attention.n_heads + 2 * layer.cache.n_kv_heads;
        assert!(
            qkv.cols == heads * layer.cache.head_dim && qkv.rows == Rows::Tokens,
            "queries, keys and values of another width"
        );
    }

    /// Norms, rotary embedding, append.
    pub(super) fn append(
        &mut self,
        qkv: ActivationBuffer,
        layer: LayerId,
        norms: Option<HeadNorms>,
    ) {
        let layer = self.layer(layer);
        self.assert_qkv(qkv, &layer);
        let norm = |of: fn(&HeadNorms) -> crate::device::Vector| {
            norms.map_or(In::NULL, |norms| {
                let vector = self.buffers.vectors[of(&norms).0 as usize];
                assert_eq!(
                    vector.len, layer.cache.head_dim,
                    "a norm of heads of another size"
                );
                vector.f32.into()
            })
        };
        let rope = layer.attention.rope;
        let rope = rope.map(|rope| self.model.buffers.ropes[rope.0 as usize]);
        let args = kernel::RopeAppendArgs {
            cache: layer.pages,
            qkv: qkv.address.into(),
            positions: self.positions(),
            rows: self.input(self.model.plan.layout().rows),
            inverse_frequencies: rope.map_or(In::NULL, |rope| rope.inverse_frequencies.into()),
            query_norm: norm(|norms| norms.query),
            key_norm: norm(|norms| norms.key),
            n_heads: layer.attention.n_heads as u32,
            stride: qkv.stride as u32,
            n_frequencies: rope.map_or(0, |rope| rope.n as u32),
            scale: rope.map_or(1.0, |rope| rope.scale),
            epsilon: norms.map_or(0.0, |norms| norms.epsilon),
            unused: 0,
        };
        let n_tokens = self.n_rows(Rows::Tokens);
        self.launch(
            kernel::rope_append(n_tokens, layer.head_dim.elements()),
            &args,
        );
    }

    /// Prefill chunks, then decoded tokens: both use the workspace.
    pub(super) fn attend(&mut self, out: ActivationBuffer, qkv: ActivationBuffer, layer: LayerId) {
        let lists = self.model.plan.lists_of(layer.0 as usize);
        let layer = self.layer(layer);
        self.assert_qkv(qkv, &layer);
        let width = layer.attention.n_heads * layer.cache.head_dim;
        assert!(
            out.cols == width && out.rows == Rows::Tokens,
            "attention of another width"
        );
        let scale = layer.attention.scale;
        let (scale_log2, tanh_scale) = match layer.attention.soft_cap {
            Some(cap) => (cap * LOG2_E, scale / cap),
            None => (scale * LOG2_E, 0.0),
        };
        let at = self.model.plan.layout().prefills[lists.prefill];
        let shape = self.model.plan.shape().prefills[lists.prefill];
        let prefill = PagedPrefillArgs {
            cache: layer.pages,
            out: out.address.into(),
            qkv: qkv.address.into(),
            tiles: self.input(at.tiles),
            partial_out: self.model.buffers.partial_out.into(),
            partial_softmax: self.model.buffers.partial_softmax.into(),
            out_stride: out.stride as u32,
            qkv_stride: qkv.stride as u32,
            n_heads: layer.attention.n_heads as u32,
            window: layer.cache.window.map_or(NO_WINDOW, NonZeroU32::get),
            scale_log2,
            tanh_scale,
        };
        let kind = match (layer.cache.window, layer.attention.soft_cap) {
            (None, None) => PrefillKind::Causal,
            _ => PrefillKind::Local,
        };
        let n_kv_heads = layer.cache.n_kv_heads as u32;
        self.launch(
            kernel::paged_prefill(shape.tiles, n_kv_heads, layer.head_dim, kind),
            &prefill,
        );
        let decode = PagedDecodeArgs {
            sequences: self.input(at.sequences),
            ..PagedDecodeArgs::like(&prefill)
        };
        let combine =
            kernel::combine_split_kv(shape.sequences, shape.most, prefill.n_heads, layer.head_dim);
        self.launch(combine, &decode);
        self.decode(&layer, lists, decode);
    }

    /// The decoded tokens of a layer, chunk of the workspace after chunk; `args` lacks what belongs to a chunk.
    fn decode(&mut self, layer: &Layer, lists: LayerLists, args: PagedDecodeArgs) {
        let model = self.model;
        let at = model.plan.layout().splits[lists.split];
        let most = model.plan.shape().splits[lists.split].most;
        let (n_heads, n_kv_heads) = (args.n_heads, layer.pages.n_kv_heads);
        for chunk in model.plan.chunks(lists.split) {
            let tiles = at.tiles + chunk.tiles.start * size_of::<SplitKvTile>();
            let sequences = at.sequences + chunk.sequences.start * size_of::<SplitKvSequence>();
            let args = PagedDecodeArgs {
                tiles: self.input(tiles),
                sequences: self.input(sequences),
                ..args
            };
            let n_multiprocessors = self.driver.n_multiprocessors();
            let n_tiles = chunk.tiles.len();
            self.launch(
                kernel::paged_decode(
                    n_tiles,
                    n_heads,
                    n_kv_heads,
                    layer.head_dim,
                    n_multiprocessors,
                ),
                &args,
            );
            if most > 1 {
                let n = chunk.sequences.len();
                let combine = kernel::combine_split_kv(n, most, n_heads, layer.head_dim);
                self.launch(combine, &args);
            }
        }
    }
}
