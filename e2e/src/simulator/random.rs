//! Random numbers that are the same on every machine and in every run: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The stream of this seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from 0 to 1, 1 excluded.
    pub(super) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The time until the next of events that come at `rate`.
    pub(super) fn exponential(&mut self, rate: f64) -> f64 {
        -(1.0 - self.uniform()).ln() / rate
    }

    /// A length of this mean, between a quarter of it and four times of it, most of them short.
    pub(super) fn length(&mut self, mean: f64) -> u32 {
        // The mean of an exponential that is cut so is about 0.97 of it.
        let length = self.exponential(1.0 / mean);
        length.clamp(mean / 4.0, mean * 4.0).max(1.0) as u32
    }
}
