//! Which shapes of steps were seen, of which model, and the graphs of those that came again. It knows no launches and no
//! driver.

use std::collections::HashMap;

use crate::shape::Model;

use super::plan::StepShape;

/// Graphs that are kept, about 1 MB of host memory each; beyond that the one that was not used for the longest time goes.
const MAX_GRAPHS: usize = 96;
/// Shapes that are remembered, with a graph or without.
const MAX_SHAPES: usize = 4096;

/// The shapes that were seen.
#[derive(Debug)]
pub(super) struct Graphs<G> {
    seen: HashMap<(Model, StepShape), Seen<G>>,
    clock: u64,
}

#[derive(Debug)]
struct Seen<G> {
    last_used: u64,
    graph: Option<G>,
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
    pub(super) fn find(&mut self, key: &(Model, StepShape)) -> Option<&G> {
        self.clock += 1;
        let seen = self.seen.get_mut(key)?;
        seen.last_used = self.clock;
        seen.graph.as_ref()
    }

    /// Notes the shape where it is new.
    pub(super) fn seen_before(&mut self, key: &(Model, StepShape)) -> bool {
        if self.seen.contains_key(key) {
            return true;
        }
        if self.seen.len() >= MAX_SHAPES {
            self.forget_oldest(|_| true);
        }
        let new = Seen {
            last_used: self.clock,
            graph: None,
        };
        self.seen.insert(key.clone(), new);
        false
    }

    /// Keeps the graph that was captured for a shape.
    pub(super) fn keep(&mut self, key: &(Model, StepShape), graph: G) -> &G {
        let n_graphs = self.seen.values().filter(|s| s.graph.is_some()).count();
        if n_graphs >= MAX_GRAPHS {
            self.forget_oldest(|seen| seen.graph.is_some());
        }
        let entry = self.seen.entry(key.clone()).or_insert(Seen {
            last_used: self.clock,
            graph: None,
        });
        entry.graph.insert(graph)
    }

    /// Ends all graphs.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
    }

    fn forget_oldest(&mut self, of: impl Fn(&Seen<G>) -> bool) {
        let candidates = self.seen.iter().filter(|(_, seen)| of(seen));
        let oldest = candidates.min_by_key(|(_, seen)| seen.last_used);
        if let Some(key) = oldest.map(|(key, _)| key.clone()) {
            self.seen.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    fn key(tokens: usize) -> (Model, StepShape) {
        let shape = StepShape {
            tokens,
            ..StepShape::default()
        };
        (Model(0), shape)
    }

    #[test]
    fn shapes_and_graphs_are_bounded() {
        let (mut graphs, alive) = (Graphs::new(), Rc::new(()));
        for tokens in 0..3 * MAX_GRAPHS {
            assert!(graphs.find(&key(tokens)).is_none());
            assert!(!graphs.seen_before(&key(tokens)));
            graphs.keep(&key(tokens), Rc::clone(&alive));
            assert!(graphs.find(&key(tokens)).is_some());
            // The first is used all the time.
            assert!(graphs.find(&key(0)).is_some());
        }
        assert_eq!(Rc::strong_count(&alive) - 1, MAX_GRAPHS);
        for tokens in 0..2 * MAX_SHAPES {
            assert!(graphs.find(&key(1 << 20 | tokens)).is_none());
            graphs.seen_before(&key(1 << 20 | tokens));
        }
        assert!(graphs.seen.len() <= MAX_SHAPES);
        graphs.clear();
        assert_eq!(Rc::strong_count(&alive), 1);
    }

    #[test]
    fn a_model_has_graphs_of_its_own() {
        let mut graphs = Graphs::new();
        let (shape, other) = (key(4), (Model(1), key(4).1));
        assert!(!graphs.seen_before(&shape) && graphs.seen_before(&shape));
        graphs.keep(&shape, "of model 0");
        assert!(graphs.find(&other).is_none() && !graphs.seen_before(&other));
    }
}
