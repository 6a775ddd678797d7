//! Floating point: gradients are summed as they are, in half the bytes of fixed point; or travel as bf16, in
//! a quarter of them.
//!
//! The last bits of such a sum depend on the order of its terms: on the number of ranks, their
//! slots and their threads. What is refused is what fixed point refuses as well: NaN, infinity, and
//! values so large that a sum over all slots could overflow, so that no reduced sum is ever other
//! than finite.

use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::range::{OutOfRange, add_within};

/// Floats that are converted while they are in the first-level cache.
const CHUNK: usize = 1024;

/// Sums over a number of slots in single precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SinglePrecision {
    limit: f32,
    narrows: bool,
}

impl SinglePrecision {
    /// For sums over so many slots.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        // Half of each slot's share, which leaves room for what the additions round up.
        Self { limit: f32::MAX / 2.0 / slots.max(1) as f32, narrows: false }
    }

    /// For sums that are rounded to bf16 when they leave a rank.
    #[must_use]
    pub fn narrowing(slots: u32) -> Self {
        // An addition rounds up by no more than it adds.
        Self { limit: f32::MAX / 4.0 / slots.max(1) as f32, narrows: true }
    }

    /// Whether the sums are rounded to bf16 when they leave a rank.
    #[must_use]
    pub fn narrows(&self) -> bool {
        self.narrows
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

/// Rounds floats to the nearest bf16, of two the even one: the first half of the memory has them then.
pub(super) fn narrow(memory: &mut [i64]) {
    let count = 2 * memory.len();
    let mut floats = [0f32; CHUNK];
    for start in (0..count).step_by(CHUNK) {
        let floats = &mut floats[..CHUNK.min(count - start)];
        let range = start..start + floats.len();
        floats.copy_from_slice(&bytemuck::cast_slice(memory)[range.clone()]);
        numbers_mut(memory)[range].convert_from_f32_slice(floats);
    }
    if !memory.len().is_multiple_of(2) {
        // The rest of the last word.
        numbers_mut(memory)[count..count + 2].fill(bf16::ZERO);
    }
}

/// Adds each bf16 to the sum of the same index, in single precision, and rounds what it comes to.
pub(super) fn add_bf16(sums: &mut [i64], values: &[i64]) {
    let (mut left, mut right) = ([0f32; CHUNK], [0f32; CHUNK]);
    let chunks = numbers_mut(sums).chunks_mut(CHUNK).zip(numbers(values).chunks(CHUNK));
    for (sums, values) in chunks {
        let (left, right) = (&mut left[..sums.len()], &mut right[..sums.len()]);
        sums.convert_to_f32_slice(left);
        values.convert_to_f32_slice(right);
        left.iter_mut().zip(&*right).for_each(|(sum, value)| *sum += value);
        sums.convert_from_f32_slice(left);
    }
}

/// The mean of sums that are bf16.
///
/// # Panics
/// When there are fewer sums than `out` has room for.
pub(super) fn divide_bf16(sums: &[i64], divisor: f64, out: &mut [f32]) {
    numbers(sums)[..out.len()].convert_to_f32_slice(out);
    let divisor = divisor as f32;
    out.iter_mut().for_each(|value| *value /= divisor);
}

fn numbers(words: &[i64]) -> &[bf16] {
    bytemuck::cast_slice::<_, u16>(words).reinterpret_cast()
}

fn numbers_mut(words: &mut [i64]) -> &mut [bf16] {
    bytemuck::cast_slice_mut::<_, u16>(words).reinterpret_cast_mut()
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
    fn the_largest_value_of_every_slot_gives_a_finite_sum_in_bf16() {
        for slots in [1, 3, 1000, MAX_SLOTS] {
            let single = SinglePrecision::narrowing(slots);
            let one = || {
                let mut word = [bytemuck::cast([single.limit(), -single.limit()])];
                narrow(&mut word);
                word
            };
            let mut sum = one();
            for _ in 1..slots {
                add_bf16(&mut sum, &one());
            }
            let mut found = [0.0; 2];
            divide_bf16(&sum, 1.0, &mut found);
            assert!(found.iter().all(|sum| sum.is_finite() && *sum != 0.0), "{slots}: {found:?}");
        }
    }

    #[test]
    fn floats_are_rounded_to_the_nearest_bf16_in_place_and_added_up_there() {
        // Ties go to the even one: of 8 bits, the last is 2^-7 between 1 and 2.
        let (tie, odd) = (1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8));
        let mut few: Vec<i64> = vec![bytemuck::cast([tie, odd]), bytemuck::cast([-0.1f32, 3e-40])];
        narrow(&mut few);
        let mut found = [0.0; 4];
        divide_bf16(&few, 1.0, &mut found);
        assert_eq!(found[..2], [1.0, 1.0 + 2f32.powi(-6)]);
        assert!((f64::from(found[2]) + 0.1).abs() < 0.1 / 256.0 && found[3] > 0.0);

        // More than are converted at a time.
        let floats: Vec<f32> = (0..5000).map(|i| ((i * 37 % 200) as f32 - 100.0) / 4.0).collect();
        let mut words: Vec<i64> = bytemuck::pod_collect_to_vec(&floats);
        narrow(&mut words);
        words.truncate(words.len() / 2);
        let twice = words.clone();
        add_bf16(&mut words, &twice);
        let mut mean = vec![0.0; 5000];
        divide_bf16(&words, 2.0, &mut mean);
        assert_eq!(mean, floats);
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
