//! Who gets what: a range cut into one contiguous share a rank, evenly or by measured speed; total
//! functions for any number of ranks. The mapping never changes a result.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
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

/// How many of `total` slots each rank gets, given how many it computes per second: such that the
/// last rank is done as early as can be. Every rank gets at least one when there are enough, so that
/// its speed goes on being measured. Equal speeds give the shares of [`share`].
pub(super) fn by_speed(total: u32, speeds: &[f64]) -> Vec<u32> {
    let least = u32::from(total as usize >= speeds.len());
    let mut counts = vec![least; speeds.len()];
    let done = |rank: usize, count: u32| Done { seconds: f64::from(count) / speeds[rank], rank };
    // The rank that would be done first with one slot more takes it.
    let mut next: BinaryHeap<Reverse<Done>> =
        (0..speeds.len()).map(|rank| Reverse(done(rank, least + 1))).collect();
    for _ in 0..total - least * speeds.len() as u32 {
        let Some(mut first) = next.peek_mut() else { break };
        let rank = first.0.rank;
        counts[rank] += 1;
        first.0 = done(rank, counts[rank] + 1);
    }
    counts
}

/// When the last rank is done.
pub(super) fn makespan(counts: &[u32], speeds: &[f64]) -> f64 {
    counts.iter().zip(speeds).map(|(count, speed)| f64::from(*count) / speed).fold(0.0, f64::max)
}

/// Contiguous ranges of these lengths, in rank order.
pub(super) fn ranges(counts: &[u32]) -> Vec<Range<u32>> {
    let mut begin = 0;
    let range = |count: &u32| {
        let range = begin..begin + count;
        begin = range.end;
        range
    };
    counts.iter().map(range).collect()
}

/// When a rank would be done; ordered by time, then rank.
#[derive(Clone, Copy, Debug)]
struct Done {
    seconds: f64,
    rank: usize,
}

impl Ord for Done {
    fn cmp(&self, other: &Self) -> Ordering {
        self.seconds.total_cmp(&other.seconds).then(self.rank.cmp(&other.rank))
    }
}

impl PartialOrd for Done {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Done {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Done {}

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

    proptest! {
        #[test]
        fn shares_by_speed_give_out_every_slot_and_no_move_of_one_would_end_earlier(
            total in 0u32..300,
            speeds in prop::collection::vec(0.01f64..100.0, 1..20),
        ) {
            let counts = by_speed(total, &speeds);
            prop_assert_eq!(counts.iter().sum::<u32>(), total);
            let enough = total as usize >= speeds.len();
            prop_assert!(!enough || counts.iter().all(|count| *count > 0));
            let end = makespan(&counts, &speeds);
            for from in (0..speeds.len()).filter(|from| counts[*from] > u32::from(enough)) {
                for to in 0..speeds.len() {
                    let mut moved = counts.clone();
                    moved[from] -= 1;
                    moved[to] += 1;
                    prop_assert!(makespan(&moved, &speeds) >= end * (1.0 - 1e-12));
                }
            }
            let ranges = ranges(&counts);
            prop_assert_eq!(ranges.first().map(|range| range.start), Some(0));
            prop_assert_eq!(ranges.last().map(|range| range.end), Some(total));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        }

        #[test]
        fn equal_speeds_give_even_shares(total in 0u32..300, world in 1usize..20) {
            let even: Vec<u32> = (0..world)
                .map(|rank| share(u64::from(total), rank, world))
                .map(|range| (range.end - range.start) as u32)
                .collect();
            prop_assert_eq!(by_speed(total, &vec![3.0; world]), even);
        }
    }

    #[test]
    fn a_rank_of_half_the_speed_gets_half_as_much() {
        assert_eq!(by_speed(9, &[2.0, 1.0]), [6, 3]);
        assert_eq!(by_speed(10, &[1.0, 1.0, 0.5]), [4, 4, 2]);
        assert_eq!(by_speed(8, &[1.0, 0.001]), [7, 1]);
        assert_eq!(by_speed(2, &[1.0, 3.0, 2.0]), [0, 1, 1]);
    }
}
