//! What the device keeps of a model beside its weights: its shape and block tables, the plan of each attention layer,
//! and what is worked out once for a step and used by all layers.

use super::attention::{AttentionPlan, LayerPlan, QueryTile, cut_tiles};
use super::kv_cache::CacheLayout;
use crate::device::Rows;
use crate::shape::{AttentionShape, LayerId, ModelShape, Precision, Rope};
use crate::step::{Step, StepInput};

/// A model on the device.
#[derive(Debug)]
pub(crate) struct ModelState {
    pub(crate) shape: ModelShape,
    pub(crate) step: Step,
    pub(crate) layers: Vec<LayerPlan>,
    pub(crate) rope_tables: Vec<RopeTable>,
    query_tiles: Vec<QueryTiles>,
}

/// Cosines and sines of the step's tokens for one rotary embedding, `[tokens][frequencies]`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    n_frequencies: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    fn new(rope: &Rope, max_tokens: usize) -> Self {
        let n_frequencies = rope.inverse_frequencies.len();
        Self {
            n_frequencies,
            cos: Vec::with_capacity(max_tokens * n_frequencies),
            sin: Vec::with_capacity(max_tokens * n_frequencies),
        }
    }

    fn fill(&mut self, rope: &Rope, positions: &[u32]) {
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &frequency in &rope.inverse_frequencies {
                // The angle is rounded to f32, as the models were trained; its sine is then taken exactly.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                self.cos.push(cos as f32 * rope.scale);
                self.sin.push(sin as f32 * rope.scale);
            }
        }
    }

    /// A token's cosines and sines.
    pub(crate) fn of(&self, token: usize) -> (&[f32], &[f32]) {
        let first = token * self.n_frequencies;
        (
            &self.cos[first..][..self.n_frequencies],
            &self.sin[first..][..self.n_frequencies],
        )
    }
}

/// The step's tokens in tiles of one size.
#[derive(Debug)]
struct QueryTiles {
    tokens_per_tile: usize,
    tiles: Vec<QueryTile>,
}

impl ModelState {
    /// Plans a model whose shape was checked. KV caches are kept in `precision`.
    pub(crate) fn new(shape: &ModelShape, precision: Precision, n_threads: usize) -> Self {
        let plan = |layer: &AttentionShape| {
            let layout = CacheLayout::new(shape, layer.cache, precision);
            LayerPlan {
                shape: *layer,
                cache: shape.caches[layer.cache.0 as usize],
                group: shape.place_of(layer.cache).0,
                layout,
                attention: AttentionPlan::new(shape, layer, &layout, precision, n_threads),
            }
        };
        let layers: Vec<LayerPlan> = shape.layers.iter().map(plan).collect();
        let mut sizes: Vec<usize> = layers
            .iter()
            .map(|layer| layer.attention.tokens_per_tile)
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        let query_tiles = sizes.into_iter().map(|tokens_per_tile| QueryTiles {
            tokens_per_tile,
            tiles: Vec::with_capacity(shape.limits.max_tokens),
        });
        let ropes = shape.ropes.iter();
        Self {
            step: Step::new(shape),
            layers,
            rope_tables: ropes
                .map(|rope| RopeTable::new(rope, shape.limits.max_tokens))
                .collect(),
            query_tiles: query_tiles.collect(),
            shape: shape.clone(),
        }
    }

    /// Takes a step's input over.
    pub(crate) fn begin(&mut self, input: &StepInput) {
        self.step.begin(input);
        for QueryTiles {
            tokens_per_tile,
            tiles,
        } in &mut self.query_tiles
        {
            cut_tiles(&self.step, *tokens_per_tile, tiles);
        }
        for (table, rope) in self.rope_tables.iter_mut().zip(&self.shape.ropes) {
            table.fill(rope, &self.step.positions);
        }
    }

    /// Rows that buffers of the kind have in this step.
    pub(crate) fn n_rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.step.tokens.len(),
            Rows::Logits => self.step.logits.len(),
        }
    }

    /// Rows that buffers of the kind have at most.
    pub(crate) fn max_rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.shape.limits.max_tokens,
            Rows::Logits => self.shape.limits.max_logits_rows,
        }
    }

    /// The plan of a layer, and the step's tokens in tiles as it wants them.
    pub(crate) fn layer(&self, layer: LayerId) -> (&LayerPlan, &[QueryTile]) {
        let plan = &self.layers[layer.0 as usize];
        let tiles = self
            .query_tiles
            .iter()
            .find(|tiles| tiles.tokens_per_tile == plan.attention.tokens_per_tile)
            .expect("tiles of each layer's size were planned");
        (plan, &tiles.tiles)
    }
}
