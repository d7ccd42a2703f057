//! By what objects of one kind are told apart.

use kube::{Resource, ResourceExt};

/// Namespace and name.
pub type Key = (String, String);

/// Namespace and name of an object.
pub fn key_of<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}
