//! What the models on the device own, by handle: a handle serves only the model that it was made for.

use crate::shape::Model;

/// Items of one kind, of all models.
#[derive(Debug)]
pub(crate) struct HandleTable<T> {
    items: Vec<(Model, T)>,
}

impl<T> Default for HandleTable<T> {
    fn default() -> Self {
        Self { items: Vec::new() }
    }
}

impl<T> HandleTable<T> {
    /// Keeps an item of `model` and gives its handle.
    pub(crate) fn push(&mut self, model: Model, item: T) -> u32 {
        self.items.push((model, item));
        self.items.len() as u32 - 1
    }

    /// The item of a handle of `model`.
    pub(crate) fn get(&self, model: Model, handle: u32) -> &T {
        let (owner, item) = &self.items[handle as usize];
        assert_eq!(*owner, model, "a handle of another model");
        item
    }

    /// The item of a handle, whoever owns it, and its owner.
    pub(crate) fn with_owner(&self, handle: u32) -> (Model, &T) {
        let (owner, item) = &self.items[handle as usize];
        (*owner, item)
    }

    /// All items and their owners.
    pub(crate) fn iter_with_owner(&self) -> impl Iterator<Item = (Model, &T)> {
        self.items.iter().map(|(owner, item)| (*owner, item))
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter().map(|(_, item)| item)
    }
}
