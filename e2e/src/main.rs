//! The cluster on one machine, from the command line.

fn main() {}
