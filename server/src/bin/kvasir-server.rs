//! The model server of each pod.

fn main() {}
