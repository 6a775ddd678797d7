//! Do all ranks hold the same bits? If not, who is the odd one.

use std::collections::BTreeMap;

use looptrain_proto::Digest;

/// What a comparison of digests over the ranks says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All are equal.
    Unanimous(Digest),
    /// These ranks do not hold what is to be trusted.
    Odd {
        /// Ranks, ascending; never all of them.
        ranks: Vec<usize>,
        /// What they should hold.
        trusted: Digest,
    },
    /// Nobody can say who is right.
    Split,
}

/// Compares one digest a rank, in rank order. When they are not equal, a digest known from
/// before is right if any rank holds it, otherwise the one that more than half of them hold.
pub(super) fn compare(digests: &[Digest], known: Option<Digest>) -> Verdict {
    let mut votes: BTreeMap<[u8; 32], usize> = BTreeMap::new();
    for digest in digests {
        *votes.entry(digest.0).or_default() += 1;
    }
    if let (1, Some(digest)) = (votes.len(), digests.first()) {
        return Verdict::Unanimous(*digest);
    }
    let majority = votes.iter().find(|(_, count)| **count * 2 > digests.len());
    let known = known.filter(|digest| votes.contains_key(&digest.0));
    match known.or(majority.map(|(digest, _)| Digest(*digest))) {
        Some(trusted) => {
            let odd = |(rank, digest): (usize, &Digest)| (*digest != trusted).then_some(rank);
            Verdict::Odd { ranks: digests.iter().enumerate().filter_map(odd).collect(), trusted }
        }
        None => Verdict::Split,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Digest = Digest([1; 32]);
    const B: Digest = Digest([2; 32]);

    #[test]
    fn equal_digests_are_unanimous_whatever_was_known() {
        assert_eq!(compare(&[A], None), Verdict::Unanimous(A));
        assert_eq!(compare(&[A, A, A], Some(B)), Verdict::Unanimous(A));
    }

    #[test]
    fn the_minority_is_the_odd_one() {
        assert_eq!(compare(&[A, B, A], None), Verdict::Odd { ranks: vec![1], trusted: A });
        let verdict = compare(&[B, A, A, B, B], None);
        assert_eq!(verdict, Verdict::Odd { ranks: vec![1, 2], trusted: B });
    }

    #[test]
    fn halves_cannot_say_who_is_right() {
        assert_eq!(compare(&[A, B], None), Verdict::Split);
        assert_eq!(compare(&[A, A, B, B], None), Verdict::Split);
    }

    #[test]
    fn what_is_known_from_before_outweighs_a_majority() {
        let verdict = compare(&[A, B, B], Some(A));
        assert_eq!(verdict, Verdict::Odd { ranks: vec![1, 2], trusted: A });
        assert_eq!(compare(&[A, B], Some(B)), Verdict::Odd { ranks: vec![0], trusted: B });
        assert_eq!(compare(&[A, B], Some(Digest([9; 32]))), Verdict::Split);
    }
}
