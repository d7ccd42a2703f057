//! What kernels, products and copies may touch: every address is held against the driver's allocations before it is used.

use std::collections::BTreeMap;

use super::interface::{In, Out};

/// The memory that a driver has allocated: what kernels, products and copies may touch.
#[derive(Debug, Default)]
pub struct Allocations(BTreeMap<u64, u64>);

impl Allocations {
    /// Takes a new one in. It lives as long as its driver.
    pub fn add(&mut self, address: u64, bytes: u64) {
        self.0.insert(address, bytes);
    }

    /// Asserts that all of `address..address + bytes` is in one allocation. No bytes are anywhere.
    pub fn assert_within(&self, what: &str, address: u64, bytes: u64) {
        let within = |(&start, &size): (&u64, &u64)| address - start + bytes <= size;
        let found = self.0.range(..=address).next_back();
        assert!(
            bytes == 0 || found.is_some_and(within),
            "{what}: {bytes} bytes at {address:#x} are not in the device's memory"
        );
    }
}

/// What the arguments of a launch are held against, for [`Arguments::check`](super::kernel::Arguments::check).
#[derive(Debug)]
pub struct Bounds<'a> {
    /// The kernel's name.
    pub(super) what: &'static str,
    pub(super) memory: &'a Allocations,
}

impl Bounds<'_> {
    /// The kernel reads `n` elements.
    pub fn reads<T>(&self, from: In<T>, n: u64) {
        self.memory
            .assert_within(self.what, from.address(), n * size_of::<T>() as u64);
    }

    /// The kernel writes (and may read) `n` elements.
    pub fn writes<T>(&self, to: Out<T>, n: u64) {
        self.memory
            .assert_within(self.what, to.address(), n * size_of::<T>() as u64);
    }
}
