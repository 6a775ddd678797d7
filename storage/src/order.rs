//! The data order: a pure function from a position in a stage to a sequence of a dataset.
//!
//! Two steps, both without state, so that position 10^12 costs what position 0 costs and every
//! worker, today or after a restart, finds the same answer:
//!
//! 1. *Which part of the mixture.* One period of the mixture (as many positions as the weights sum
//!    to) is laid out once by Tijdeman's greedy rule for the chairman assignment problem: among the
//!    parts whose quota allows one more, take the one whose next deadline comes first. Over any
//!    prefix every part of k then stays within 1 - 1/(2k - 2) of a sequence of its exact share.
//!    (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980.) So a window of
//!    n positions, wherever it begins, has of every part
//!    - exactly its share when n is a period or a multiple of one,
//!    - its share within one sequence when n is one more or one less than that,
//!    - its share within 2 - 1/(k - 1) sequences for any n: within one of two parts, 1.5 of three,
//!      less than two of any number.
//!
//!    No order does so within one sequence for every n: for most weights of three parts, such as
//!    8 : 2 : 1, there is none (a test looks through all of them; in general this is Fraenkel's
//!    conjecture on balanced sequences).
//! 2. *Which sequence of the part.* The n-th draw from a part belongs to data epoch
//!    n / sequences; within an epoch a Feistel network keyed by (seed, stage, part, epoch) permutes
//!    the sequences. It works on the next even power of two; results outside are fed in again
//!    (cycle walking), which keeps it a bijection. At most 4 rounds of that are expected.
//!
//! Callers: the worker's feed, and the check of the audit. Changing anything here changes what
//! runs train on.

use looptrain_proto::Spec;

use crate::{Dataset, Split};

/// The order of one stage.
#[derive(Clone, Debug)]
pub struct Order {
    parts: Vec<Part>,
    /// Part of each position of a period, and how often that part came before in the period.
    period: Vec<(u32, u32)>,
}

#[derive(Clone, Debug)]
struct Part {
    sequences: u64,
    /// Draws per period.
    weight: u64,
    /// Key material of (seed, stage, part).
    key: [u8; 32],
}

/// One sequence of one part of a stage's mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceRef {
    /// Index into the mixture.
    pub part: usize,
    /// How many times the part had been read to its end before.
    pub epoch: u64,
    /// Index of the sequence in the part.
    pub sequence: u64,
}

impl Order {
    /// The order of stage `stage` over `parts`, each (weight, number of sequences).
    ///
    /// Memory and time grow with the sum of the weights in lowest terms, which the spec's
    /// validation keeps to 2^20.
    ///
    /// # Panics
    /// When there are no parts, or one has no weight or no sequences: the spec's validation and
    /// the check of the dataset against the sequence length exclude that.
    #[must_use]
    pub fn new(seed: u64, stage: usize, parts: &[(u32, u64)]) -> Self {
        assert!(!parts.is_empty(), "a mixture needs a part");
        assert!(
            parts.iter().all(|&(weight, sequences)| weight > 0 && sequences > 0),
            "every part of a mixture needs a weight and at least one sequence: {parts:?}"
        );
        let weights =
            reduce(&parts.iter().map(|&(weight, _)| u64::from(weight)).collect::<Vec<_>>());
        let parts = parts
            .iter()
            .zip(&weights)
            .enumerate()
            .map(|(part, (&(_, sequences), &weight))| {
                let mut hasher = blake3::Hasher::new_derive_key("looptrain data order v1");
                for number in [seed, stage as u64, part as u64] {
                    hasher.update(&number.to_le_bytes());
                }
                Part { sequences, weight, key: *hasher.finalize().as_bytes() }
            })
            .collect();
        Self { parts, period: lay_out(&weights) }
    }

    /// The order of stage `stage` of a run on `datasets`, which are those of the spec and fit it.
    ///
    /// # Panics
    /// As [`Order::new`].
    #[must_use]
    pub fn of_stage(spec: &Spec, stage: usize, datasets: &[Dataset]) -> Self {
        let length = spec.stages[stage].sequence_length;
        let part = |&(dataset, weight): &(usize, u32)| {
            (weight, datasets[dataset].sequences(Split::Train, length))
        };
        let parts: Vec<_> = spec.mixture(stage).iter().map(part).collect();
        Self::new(spec.run.seed, stage, &parts)
    }

    /// Positions after which the mixture repeats itself: the sum of its weights in lowest terms.
    /// Wherever a window begins, one of as many positions, or of a multiple, has of every part exactly
    /// its share.
    #[must_use]
    pub fn period(&self) -> u64 {
        self.period.len() as u64
    }

    /// The sequence at position `index` of the stage.
    #[must_use]
    pub fn at(&self, index: u64) -> SequenceRef {
        let length = self.period.len() as u64;
        let (part, before) = self.period[(index % length) as usize];
        let part = part as usize;
        let Part { sequences, weight, key } = &self.parts[part];
        let draw = (index / length) * weight + u64::from(before);
        let epoch = draw / sequences;
        let sequence = Permutation::new(key, epoch, *sequences).apply(draw % sequences);
        SequenceRef { part, epoch, sequence }
    }
}

/// The weights in lowest terms.
fn reduce(weights: &[u64]) -> Vec<u64> {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let divisor = weights.iter().copied().fold(0, gcd);
    weights.iter().map(|weight| weight / divisor).collect()
}

/// One period of the interleave: for each position its part and that part's draws before it.
fn lay_out(weights: &[u64]) -> Vec<(u32, u32)> {
    let total: u64 = weights.iter().sum();
    let mut drawn = vec![0_u64; weights.len()];
    // Tijdeman's bound for k parts is 1 - 1/s with s = 2k - 2. Everything below is multiplied out
    // by the denominators to stay in integers.
    let s = (2 * weights.len() as u64 - 2).max(1);
    (1..=total)
        .map(|position| {
            let next = (0..weights.len())
                // Eligible: share * position - drawn >= 1/s, so that one more draw is not too
                // early.
                .filter(|&part| s * weights[part] * position >= total * (s * drawn[part] + 1))
                // Earliest deadline: (drawn + 1 - 1/s) / share, compared crosswise.
                .min_by(|&a, &b| {
                    let deadline = |part: usize| s * drawn[part] + s - 1;
                    (deadline(a) * weights[b]).cmp(&(deadline(b) * weights[a]))
                })
                .expect("at every position some part is behind its share");
            let before = drawn[next];
            drawn[next] += 1;
            // Both fit: there are fewer parts, and draws of one, than the weights sum to.
            (next as u32, before as u32)
        })
        .collect()
}

/// A keyed bijection of `0..length`.
struct Permutation {
    keys: [u64; ROUNDS],
    /// Bits of each Feistel half.
    half: u32,
    length: u64,
}

const ROUNDS: usize = 6;

impl Permutation {
    fn new(part_key: &[u8; 32], epoch: u64, length: u64) -> Self {
        let mut bytes = [0; 8 * ROUNDS];
        let mut hasher = blake3::Hasher::new_keyed(part_key);
        hasher.update(&epoch.to_le_bytes()).finalize_xof().fill(&mut bytes);
        let mut keys = [0; ROUNDS];
        for (key, chunk) in keys.iter_mut().zip(bytes.chunks_exact(8)) {
            *key = chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        let bits = u64::BITS - (length - 1).leading_zeros();
        Self { keys, half: bits.div_ceil(2), length }
    }

    fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.length);
        let mut value = index;
        loop {
            value = self.feistel(value);
            if value < self.length {
                return value;
            }
        }
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half) - 1;
        let (mut left, mut right) = (value >> self.half, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half | right
    }
}

/// The finalizer of SplitMix64: every output bit depends on every input bit.
fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_epoch_holds_every_sequence_once(
            seed: u64, epoch in 0_u64..3, sequences in 1_u64..3000,
        ) {
            let order = Order::new(seed, 0, &[(1, sequences)]);
            let drawn: HashSet<u64> = (0..sequences)
                .map(|i| order.at(epoch * sequences + i))
                .inspect(|drawn| assert_eq!((drawn.part, drawn.epoch), (0, epoch)))
                .map(|drawn| drawn.sequence)
                .collect();
            prop_assert_eq!(drawn.len() as u64, sequences);
            prop_assert!(drawn.iter().all(|&sequence| sequence < sequences));
        }

        #[test]
        fn every_prefix_is_within_one_sequence_of_the_weights(
            weights in prop::collection::vec(1_u32..60, 1..8), start in 0_u64..1 << 40,
        ) {
            let parts: Vec<(u32, u64)> = weights.iter().map(|&weight| (weight, 1000)).collect();
            let order = Order::new(1, 0, &parts);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            // Prefixes that start at a multiple of the period see the same layout from any start.
            let start = start / total * total;
            let mut drawn = vec![0_u64; weights.len()];
            for n in 1..=2 * total {
                drawn[order.at(start + n - 1).part] += 1;
                for (part, &weight) in weights.iter().enumerate() {
                    let ahead = (drawn[part] * total) as i64 - (n * u64::from(weight)) as i64;
                    prop_assert!(ahead.unsigned_abs() <= total, "part {part} after {n}: {drawn:?}");
                }
            }
            for (part, &weight) in weights.iter().enumerate() {
                prop_assert_eq!(drawn[part], 2 * u64::from(weight), "exact over whole periods");
            }
        }

        #[test]
        fn a_window_of_whole_periods_has_exactly_the_weights_wherever_it_begins(
            weights in prop::collection::vec(1_u32..60, 1..8), start in 0_u64..1 << 40,
            periods in 1_u64..3,
        ) {
            let parts: Vec<(u32, u64)> = weights.iter().map(|&weight| (weight, 77)).collect();
            let order = Order::new(3, 0, &parts);
            let window = periods * order.period();
            let mut drawn = vec![0_u64; weights.len()];
            (start..start + window).for_each(|index| drawn[order.at(index).part] += 1);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            for (&drawn, &weight) in drawn.iter().zip(&weights) {
                prop_assert_eq!(drawn * total, u64::from(weight) * window);
            }
        }

        #[test]
        fn any_window_is_within_one_sequence_of_two_weights_and_within_two_less_a_part_of_more(
            weights in prop::collection::vec(1_u32..40, 2..6), start in 0_u64..1 << 40,
        ) {
            let parts: Vec<(u32, u64)> = weights.iter().map(|&weight| (weight, 1000)).collect();
            let order = Order::new(1, 0, &parts);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            // Both sides times k - 1, to stay in integers.
            let others = weights.len() as u64 - 1;
            let bound = (2 * others - 1) * total;
            // Windows from some places to all places within a period; what is beyond is exact.
            for begin in (start..start + total).step_by(7) {
                let mut drawn = vec![0_u64; weights.len()];
                for n in 1..=total {
                    drawn[order.at(begin + n - 1).part] += 1;
                    for (&drawn, &weight) in drawn.iter().zip(&weights) {
                        let off = (drawn * total).abs_diff(n * u64::from(weight));
                        prop_assert!(
                            others * off <= bound, "{n} from {begin}: off by {off} / {total}"
                        );
                    }
                }
            }
        }

        #[test]
        fn a_window_of_one_more_or_less_than_whole_periods_is_within_one_sequence_of_any_weights(
            weights in prop::collection::vec(1_u32..60, 1..8), start in 0_u64..1 << 40,
            periods in 1_u64..3, more: bool,
        ) {
            let parts: Vec<(u32, u64)> = weights.iter().map(|&weight| (weight, 77)).collect();
            let order = Order::new(3, 0, &parts);
            let window = periods * order.period() + 2 * u64::from(more) - 1;
            let mut drawn = vec![0_u64; weights.len()];
            (start..start + window).for_each(|index| drawn[order.at(index).part] += 1);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            for (&drawn, &weight) in drawn.iter().zip(&weights) {
                prop_assert!((drawn * total).abs_diff(u64::from(weight) * window) <= total);
            }
        }

        #[test]
        fn a_mixture_reads_each_part_in_its_own_epochs(
            seed: u64, weights in prop::collection::vec(1_u32..9, 2..4),
        ) {
            let parts: Vec<(u32, u64)> =
                weights.iter().enumerate().map(|(i, &weight)| (weight, 5 + 3 * i as u64)).collect();
            let order = Order::new(seed, 2, &parts);
            let mut seen = HashSet::new();
            let mut count = vec![0_u64; parts.len()];
            for index in 0..500 {
                let drawn = order.at(index);
                prop_assert!(seen.insert(drawn), "{drawn:?} came twice");
                prop_assert_eq!(drawn.epoch, count[drawn.part] / parts[drawn.part].1);
                count[drawn.part] += 1;
            }
        }
    }

    /// Whether any order of so many positions has every window within one sequence of the weights:
    /// goes through all of them, each as far as it holds.
    fn is_possible(weights: &[i64], positions: usize) -> bool {
        fn go_on(weights: &[i64], total: i64, drawn: &mut Vec<Vec<i64>>, left: usize) -> bool {
            let now = drawn[drawn.len() - 1].clone();
            left == 0
                || (0..weights.len()).any(|part| {
                    let mut next = now.clone();
                    next[part] += 1;
                    let holds = (1..).zip(drawn.iter().rev()).all(|(n, then)| {
                        let off = |part: usize| {
                            (total * (next[part] - then[part]) - n * weights[part]).abs()
                        };
                        (0..weights.len()).all(|part| off(part) <= total)
                    });
                    drawn.push(next);
                    let possible = holds && go_on(weights, total, drawn, left - 1);
                    drawn.pop();
                    possible
                })
        }
        let total = weights.iter().sum();
        go_on(weights, total, &mut vec![vec![0; weights.len()]], positions)
    }

    #[test]
    fn no_order_of_three_parts_in_general_keeps_every_window_within_one_sequence() {
        for weights in [[8, 2, 1], [7, 3, 1], [6, 4, 1], [6, 3, 2], [5, 4, 2]] {
            assert!(!is_possible(&weights, 44), "{weights:?}");
        }
        // Of some weights there is one, and of any two parts.
        assert!(is_possible(&[4, 2, 1], 44) && is_possible(&[8, 3], 44));
    }

    #[test]
    fn the_order_depends_on_seed_stage_part_and_epoch() {
        let draw = |seed, stage, skip| {
            let order = Order::new(seed, stage, &[(1, 1000)]);
            (skip..skip + 1000).map(|i| order.at(i).sequence).collect::<Vec<_>>()
        };
        let orders = [draw(1, 0, 0), draw(2, 0, 0), draw(1, 1, 0), draw(1, 0, 1000)];
        for (i, a) in orders.iter().enumerate() {
            for b in &orders[i + 1..] {
                let same = a.iter().zip(b).filter(|(a, b)| a == b).count();
                assert!(same < 20, "{same} of 1000 places agree");
            }
        }
        assert_eq!(draw(1, 0, 0), draw(1, 0, 0));
    }

    #[test]
    fn the_order_is_the_same_on_every_machine() {
        // Written down once; a change here changes what existing runs train on.
        let order = Order::new(7, 1, &[(3, 1_000_000), (1, 77)]);
        let drawn: Vec<_> = [0, 1, 2, 3, 1_000_000_000_000]
            .map(|i| order.at(i))
            .iter()
            .map(|drawn| (drawn.part, drawn.epoch, drawn.sequence))
            .collect();
        assert_eq!(
            drawn,
            [(0, 0, 321_050), (0, 0, 835_320), (1, 0, 42), (0, 0, 931_696), (0, 750_000, 364_385)]
        );
    }

    #[test]
    fn long_stretches_are_the_same_on_every_machine() {
        // Digests of (part, epoch, sequence) as 8 bytes each, lowest first: of mixtures of one, two
        // and four parts, small and large, from the beginning and from far away.
        let stretch = |seed, stage, parts: &[(u32, u64)], begin: u64| {
            let order = Order::new(seed, stage, parts);
            let mut hasher = blake3::Hasher::new();
            for drawn in (begin..begin + 10_000).map(|index| order.at(index)) {
                for number in [drawn.part as u64, drawn.epoch, drawn.sequence] {
                    hasher.update(&number.to_le_bytes());
                }
            }
            hasher.finalize().to_hex()[..16].to_owned()
        };
        let far = 1_000_000_000_000;
        let many = [(5, 1), (3, 900), (1, 1 << 40), (11, 123_457)];
        let found = [
            stretch(0, 0, &[(1, 1000)], 0),
            stretch(u64::MAX, 3, &[(1, u64::MAX >> 1)], far),
            stretch(7, 1, &[(3, 1_000_000), (1, 77)], 0),
            stretch(7, 1, &many, 0),
            stretch(7, 1, &many, far),
        ];
        assert_eq!(
            found,
            [
                "9a5a33ad39fdeb63",
                "b04188cd8d933ba3",
                "47811c87f217d84b",
                "40741adbfb408fe8",
                "d2c109711ddbe747",
            ]
        );
    }

    #[test]
    fn a_far_position_is_found_as_soon_as_a_near_one() {
        let order = Order::new(3, 0, &[(3, 1_000_003), (2, 5_000_011)]);
        let time = |begin: u64| {
            let start = std::time::Instant::now();
            let sum = (begin..begin + 20_000).map(|index| order.at(index).sequence).sum::<u64>();
            assert!(std::hint::black_box(sum) > 0);
            start.elapsed()
        };
        // By turns, and the best of each, for other programs take their time from either: as many
        // turns as it takes for both to have been left alone once.
        let (mut near, mut far) = (Duration::MAX, Duration::MAX);
        for _ in 0..500 {
            near = near.min(time(0));
            far = far.min(time(1_000_000_000_000));
            if far < 2 * near {
                return;
            }
        }
        panic!("{near:?} at 0, {far:?} at 10^12");
    }

    #[test]
    fn a_permutation_moves_neighbours_apart() {
        let order = Order::new(3, 0, &[(1, 100_000)]);
        let near = (0..10_000)
            .filter(|&i| order.at(i).sequence.abs_diff(order.at(i + 1).sequence) < 100)
            .count();
        assert!(near < 60, "{near} of 10000 neighbours stay within 100; about 20 by chance");
    }

    #[test]
    fn weights_count_in_lowest_terms() {
        assert_eq!(reduce(&[6_000_000_000, 3_000_000_000]), [2, 1]);
        let (small, large) = ([(2, 10), (1, 10)], [(1 << 19, 10), (1 << 18, 10)]);
        let (small, large) = (Order::new(1, 0, &small), Order::new(1, 0, &large));
        assert_eq!(large.period, small.period);
        assert!((0..100).all(|index| large.at(index) == small.at(index)));
    }
}
