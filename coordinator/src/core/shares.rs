//! Who gets what: a range cut into one contiguous share a rank. Base and remainder, a total
//! function for any number of ranks; the mapping never changes a result.

use std::ops::Range;

/// Rank `rank`'s share of `0..total` among `world` ranks: shares are contiguous in rank order,
/// cover the range, and differ in length by at most one. Shares are empty when there are more
/// ranks than items.
pub(crate) fn share(total: u64, rank: usize, world: usize) -> Range<u64> {
    let (rank, world) = (rank as u64, world.max(1) as u64);
    let (base, remainder) = (total / world, total % world);
    let begin = rank * base + rank.min(remainder);
    begin..begin + base + u64::from(rank < remainder)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_cover_the_range_once_and_are_even(total in 0u64..5000, world in 1usize..300) {
            let mut next = 0;
            for rank in 0..world {
                let share = share(total, rank, world);
                prop_assert_eq!(share.start, next);
                let (length, even) = (share.end - share.start, total / world as u64);
                prop_assert!(length == even || length == even + 1);
                next = share.end;
            }
            prop_assert_eq!(next, total);
        }
    }
}
