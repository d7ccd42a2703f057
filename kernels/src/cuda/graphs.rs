//! Which shapes of steps were seen, and the graphs of those that came again. It knows no launches and no driver.

use std::collections::HashMap;

use super::plan::Shape;

/// Graphs that are kept; beyond that the one that was not used for the longest time goes.
const MAX_GRAPHS: usize = 96;

/// The shapes that were seen.
pub(super) struct Graphs<G> {
    seen: HashMap<Shape, (u64, Option<G>)>,
    clock: u64,
}

impl<G> Graphs<G> {
    /// None seen yet.
    pub(super) fn new() -> Self {
        Self {
            seen: HashMap::new(),
            clock: 0,
        }
    }

    /// The shape's graph, where it was captured.
    pub(super) fn find(&mut self, shape: Shape) -> Option<&G> {
        self.clock += 1;
        let (used, graph) = self.seen.get_mut(&shape)?;
        *used = self.clock;
        graph.as_ref()
    }

    /// Notes the shape where it is new.
    pub(super) fn seen_before(&mut self, shape: Shape) -> bool {
        let clock = self.clock;
        let mut new = false;
        self.seen.entry(shape).or_insert_with(|| {
            new = true;
            (clock, None)
        });
        !new
    }

    /// Keeps the graph that was captured for a shape.
    pub(super) fn keep(&mut self, shape: Shape, graph: G) -> &G {
        let n_graphs = self
            .seen
            .values()
            .filter(|(_, graph)| graph.is_some())
            .count();
        if n_graphs >= MAX_GRAPHS {
            let captured = self.seen.iter().filter(|(_, (_, graph))| graph.is_some());
            if let Some(oldest) = captured.min_by_key(|(_, (used, _))| *used).map(|(s, _)| *s) {
                self.seen.remove(&oldest);
            }
        }
        let entry = self.seen.entry(shape).or_insert((self.clock, None));
        entry.1.insert(graph)
    }
}
