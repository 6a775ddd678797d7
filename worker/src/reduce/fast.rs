//! Floating point: gradients are summed as they are, in half the bytes of fixed point.
//!
//! The last bits of such a sum depend on the order of its terms: on the number of ranks, their
//! slots and their threads. What is refused is what fixed point refuses as well: NaN, infinity, and
//! values so large that a sum over all slots could overflow, so that no reduced sum is ever other
//! than finite.

use super::range::{OutOfRange, add_within};

/// Sums over a number of slots in single precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SinglePrecision {
    limit: f32,
}

impl SinglePrecision {
    /// For sums over so many slots.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        // Half of each slot's share, which leaves room for what the additions round up.
        Self { limit: f32::MAX / 2.0 / slots.max(1) as f32 }
    }

    /// The largest magnitude that a slot's value may have.
    #[must_use]
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// Adds each value to the sum of the same index.
    ///
    /// # Errors
    /// Names the first value that is not finite or too large; what stood before it may have been
    /// added, so the sums are to be thrown away.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add(&self, sums: &mut [f32], values: &[f32]) -> Result<(), OutOfRange> {
        add_within(self.limit, sums, values, |sums, values| {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        })
    }

    /// The sums, divided by `divisor`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn divide(&self, sums: &[f32], divisor: f64, out: &mut [f32]) {
        assert_eq!(sums.len(), out.len(), "a sum has one element per value");
        let divisor = divisor as f32;
        out.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum / divisor);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::MAX_SLOTS;

    use super::*;

    #[test]
    fn the_largest_value_of_every_slot_gives_a_finite_sum() {
        for slots in [1, 3, 1000, MAX_SLOTS] {
            let single = SinglePrecision::new(slots);
            let mut sum = [0.0];
            for _ in 0..slots {
                single.add(&mut sum, &[single.limit]).unwrap();
            }
            assert!(sum[0] > f32::MAX / 4.0 && sum[0].is_finite(), "{slots} slots: {sum:?}");
        }
    }

    #[test]
    fn what_is_no_number_or_too_large_is_named_by_its_index() {
        let single = SinglePrecision::new(4);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::MAX / 4.0] {
            for index in [0, 1023, 1024, 2999] {
                let mut values = vec![1.0; 3000];
                values[index] = bad;
                let error = single.add(&mut vec![0.0; 3000], &values).unwrap_err();
                assert_eq!((error.index, error.value.to_bits()), (index, bad.to_bits()));
            }
        }
    }

    #[test]
    fn the_mean_is_the_sum_over_the_slots() {
        let (single, mut sums, mut means) = (SinglePrecision::new(2), [0.0; 3], [0.0; 3]);
        single.add(&mut sums, &[1.0, -2.0, 0.5]).unwrap();
        single.add(&mut sums, &[2.0, -2.0, 0.25]).unwrap();
        single.divide(&sums, 2.0, &mut means);
        assert_eq!(means, [1.5, -2.0, 0.375]);
    }
}
