//! Fixed point: gradients as 64-bit integers, whose sum is the same in any order.
//!
//! A value `x` enters the sum as `round(x * 2^bits)`, rounded to the nearest even integer. What
//! could make the sum over all slots of a step wrap is refused, together with NaN and infinity: an
//! error names the element, and nothing ever wraps. So any number of slots may be added by any
//! number of ranks in any grouping, and every bit of the sum is the same.

use looptrain_proto::MAX_SLOTS;

use super::range::{OutOfRange, add_within};

/// An encoded value is at most 2^50 in magnitude, where [`ROUNDER`] still rounds exactly, and at
/// most so large that all slots together stay within 2^62.
fn limit_bits(slots: u32) -> i32 {
    50.min(62 - slots.max(1).next_power_of_two().trailing_zeros() as i32)
}

/// 1.5 * 2^52. Between 2^52 and 2^53 neighbouring doubles are one apart, so adding this constant
/// rounds (to nearest even) to an integer, which then stands in the low bits: the conversion is one
/// addition and one integer subtraction, which every vector unit has.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// The conversion between floating point and fixed point of a number of fraction bits, for sums
/// over a number of slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedPoint {
    scale: f64,
    limit: f32,
}

impl FixedPoint {
    /// Values are rounded to multiples of 2^-`fraction_bits` (the spec allows 16 to 52) and may
    /// reach 2^(50 - `fraction_bits`), less when `slots` is above 2^12.
    ///
    /// # Panics
    /// When there are more than [`MAX_SLOTS`] slots, which no valid spec has.
    #[must_use]
    pub fn new(fraction_bits: u32, slots: u32) -> Self {
        debug_assert!(fraction_bits <= 64, "the scale and the limit must be exact in f32");
        assert!(slots <= MAX_SLOTS, "{slots} slots are too many for a sum");
        let bits = fraction_bits.min(64) as i32;
        Self { scale: 2f64.powi(bits), limit: 2f32.powi(limit_bits(slots) - bits) }
    }

    /// The largest magnitude that can be encoded.
    #[must_use]
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// What a value is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Adds each value to the accumulator's element of the same index.
    ///
    /// # Errors
    /// Names the first value that is not finite or beyond [`FixedPoint::limit`]; what stood before
    /// it may have been added, so the accumulator is to be thrown away.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn encode_add(&self, acc: &mut [i64], values: &[f32]) -> Result<(), OutOfRange> {
        let scale = self.scale;
        add_within(self.limit, acc, values, |acc, values| {
            for (sum, value) in acc.iter_mut().zip(values) {
                let rounded = f64::from(*value) * scale + ROUNDER;
                *sum = sum.wrapping_add(integer_of(rounded));
            }
        })
    }

    /// One statistic as an integer; `None` if it is not finite or too large.
    #[must_use]
    pub fn encode(&self, value: f64) -> Option<i64> {
        (value.abs() <= f64::from(self.limit)).then(|| integer_of(value * self.scale + ROUNDER))
    }

    /// The values of a sum, divided by `divisor`: `acc / 2^bits / divisor`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn decode(&self, acc: &[i64], divisor: f64, out: &mut [f32]) {
        assert_eq!(acc.len(), out.len(), "an accumulator has one element per value");
        for (value, sum) in out.iter_mut().zip(acc) {
            *value = self.decode_one(*sum, divisor) as f32;
        }
    }

    /// As [`FixedPoint::decode`], for one statistic.
    #[must_use]
    pub fn decode_one(&self, sum: i64, divisor: f64) -> f64 {
        // The scale is a power of two, so the first division is exact.
        sum as f64 / self.scale / divisor
    }
}

/// The integer that adding [`ROUNDER`] left in a double.
fn integer_of(rounded: f64) -> i64 {
    (rounded.to_bits() as i64).wrapping_sub(ROUNDER.to_bits() as i64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(bits: u32, values: &[f32]) -> Vec<i64> {
        let mut acc = vec![0; values.len()];
        FixedPoint::new(bits, 24).encode_add(&mut acc, values).unwrap();
        acc
    }

    #[test]
    fn halves_round_to_the_even_neighbour() {
        assert_eq!(encoded(0, &[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), [0, 2, 2, 0, -2, -2]);
        assert_eq!(encoded(1, &[0.25, 0.75, -0.25]), [0, 2, 0]);
    }

    #[test]
    fn the_largest_value_fits_as_often_as_there_may_be_slots() {
        for bits in [0, 16, 40, 52] {
            for slots in [1, 3, 1 << 12, 5000, MAX_SLOTS] {
                let fixed = FixedPoint::new(bits, slots);
                let mut sum = [0, 0];
                fixed.encode_add(&mut sum, &[fixed.limit(), -fixed.limit()]).unwrap();
                assert!(sum[0] >= 1 << 46 && sum[1] == -sum[0], "{sum:?}");
                assert!(sum[0].checked_mul(i64::from(slots)).is_some());
            }
        }
    }

    #[test]
    fn what_is_too_large_or_no_number_is_named() {
        let fixed = FixedPoint::new(40, 24);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1024.1, -1024.1, f32::MAX] {
            for index in [0, 1023, 1024, 2999] {
                let mut values = vec![1.0; 3000];
                values[index] = bad;
                let error = fixed.encode_add(&mut vec![0; 3000], &values).unwrap_err();
                assert_eq!(error.index, index);
                assert_eq!(error.value.to_bits(), bad.to_bits());
            }
        }
    }

    #[test]
    fn a_statistic_that_is_no_number_has_no_encoding() {
        let fixed = FixedPoint::new(32, 24);
        assert_eq!(fixed.encode(f64::NAN), None);
        assert_eq!(fixed.encode(f64::INFINITY), None);
        assert_eq!(fixed.encode(262_145.0), None);
        assert_eq!(fixed.encode(-1.5), Some(-3 << 31));
    }

    #[test]
    fn subnormal_values_round_to_zero() {
        assert_eq!(encoded(52, &[f32::from_bits(1), -f32::from_bits(1)]), [0, 0]);
    }

    proptest! {
        #[test]
        fn any_order_and_any_grouping_give_the_same_sum(
            slots in prop::collection::vec(prop::collection::vec(-60f32..60.0, 5), 1..24),
            order in any::<prop::sample::Index>(),
            ranks in 1usize..6,
            seed in any::<u64>(),
        ) {
            let fixed = FixedPoint::new(40, 24);
            let mut straight = vec![0i64; 5];
            for slot in &slots {
                fixed.encode_add(&mut straight, slot).unwrap();
            }
            let mut shuffled = slots.clone();
            shuffled.rotate_left(order.index(slots.len()));
            let mut parts = vec![vec![0i64; 5]; ranks];
            let mut state = seed;
            for slot in &shuffled {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                fixed.encode_add(&mut parts[(state >> 33) as usize % ranks], slot).unwrap();
            }
            let mut grouped = vec![0i64; 5];
            for part in parts.iter().rev() {
                grouped.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            prop_assert_eq!(straight, grouped);
        }

        #[test]
        fn a_value_comes_back_within_half_a_unit(value in -60f32..60.0) {
            let fixed = FixedPoint::new(40, 24);
            let sum = encoded(40, &[value])[0];
            let back = fixed.decode_one(sum, 1.0);
            prop_assert!((back - f64::from(value)).abs() <= 0.5 / 2f64.powi(40));
            let mut out = [0f32];
            fixed.decode(&[sum * 3], 3.0, &mut out);
            prop_assert!((f64::from(out[0]) - f64::from(value)).abs() <= 1e-6 * f64::from(value.abs()) + 1e-12);
        }

        #[test]
        fn the_fast_rounding_is_the_rounding_of_the_standard_library(
            bits in 16u32..=52,
            share in -1f32..=1.0,
        ) {
            let fixed = FixedPoint::new(bits, 24);
            let value = share * fixed.limit();
            let expected = (f64::from(value) * 2f64.powi(bits as i32)).round_ties_even() as i64;
            prop_assert_eq!(encoded(bits, &[value])[0], expected);
            prop_assert_eq!(fixed.encode(f64::from(value)), Some(expected));
        }
    }
}
