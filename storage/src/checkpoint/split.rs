//! Who saves what: a pure function, so that ranks need not talk about it.

use std::ops::Range;

/// Splits tensors of the given sizes (bytes), in their order, into `parts` consecutive ranges of
/// about equal size. There are always `parts` ranges; some are empty when tensors are few. No part
/// exceeds an equal share by more than its last tensor.
///
/// # Panics
/// When `parts` is 0.
#[must_use]
pub fn split_tensors(sizes: &[u64], parts: usize) -> Vec<Range<usize>> {
    assert!(parts > 0, "state is split over at least one part");
    let total: u128 = sizes.iter().map(|&size| u128::from(size)).sum();
    let mut ranges = Vec::with_capacity(parts);
    let (mut next, mut before) = (0, 0_u128);
    for part in 1..=parts {
        let start = next;
        // A tensor belongs to the part in whose share of the bytes its middle lies.
        let end = total * part as u128 / parts as u128;
        while next < sizes.len() && (part == parts || before + u128::from(sizes[next]) / 2 < end) {
            before += u128::from(sizes[next]);
            next += 1;
        }
        ranges.push(start..next);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_tensor_is_in_one_part_and_no_part_is_much_above_its_share(
            sizes in prop::collection::vec(0_u64..1000, 0..60), parts in 1_usize..12,
        ) {
            let ranges = split_tensors(&sizes, parts);
            prop_assert_eq!(ranges.len(), parts);
            let mut next = 0;
            let share = sizes.iter().sum::<u64>() / parts as u64;
            let largest = sizes.iter().max().copied().unwrap_or(0);
            for range in ranges {
                prop_assert_eq!(range.start, next);
                next = range.end;
                let bytes: u64 = sizes[range].iter().sum();
                prop_assert!(bytes <= share + largest + 1, "{bytes} of {share} and {largest}");
            }
            prop_assert_eq!(next, sizes.len());
        }
    }

    #[test]
    fn equal_tensors_are_dealt_evenly() {
        assert_eq!(split_tensors(&[4; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(split_tensors(&[4; 2], 4).iter().filter(|range| !range.is_empty()).count(), 2);
    }
}
