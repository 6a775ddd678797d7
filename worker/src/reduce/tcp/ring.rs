//! A formed ring: a connection from the rank before, one to the rank after.

use std::future::poll_fn;
use std::time::Duration;

use looptrain_proto::Rank;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::transfer::{Failure, Header, Transfer};
use super::{Peer, PeerError, Peers, RingId};
use crate::reduce::{Collective, Sums};

/// Words received at a time: 64 KiB, small enough to stay in a near cache between the read and the
/// addition.
const SCRATCH: usize = 1 << 13;

/// Bytes under way to a rank of the same machine, before the system doubles them. What is copied into
/// the system is then copied out again while it is still in a cache. The way to another machine
/// is as long as the system finds it to be, so there the system chooses.
const SEND_BUFFER_WITHIN_A_MACHINE: usize = 64 << 10;

/// This worker's place in a ring of two or more.
#[derive(Debug)]
pub struct Ring {
    rank: usize,
    world: usize,
    previous: Link,
    next: Link,
    scratch: Vec<i64>,
    /// Set while an operation runs: one that fails or is dropped leaves bytes behind.
    spent: bool,
}

#[derive(Debug)]
struct Link {
    peer: Peer,
    stream: TcpStream,
}

impl Ring {
    /// Forms the ring of one generation: connects to the rank after this one and waits for the
    /// rank before it. Older rings are given up by this call.
    ///
    /// # Errors
    /// Names the neighbour that could not be reached, refused, or did not come within the time.
    pub async fn form(
        peers: &Peers,
        id: RingId,
        rank: Rank,
        members: &[Peer],
        within: Duration,
    ) -> Result<Collective, PeerError> {
        let (own, world) = (rank.0 as usize, members.len());
        if own >= world {
            return Err(PeerError::NoSuchRank { rank, world });
        }
        peers.advance(id);
        if world == 1 {
            return Ok(Collective::Alone);
        }
        let (previous, next) = (&members[(own + world - 1) % world], &members[(own + 1) % world]);
        let (incoming, outgoing) = tokio::try_join!(
            peers.accept(id, previous, within),
            peers.connect(id, rank, next, within),
        )?;
        if is_within_this_machine(&outgoing) {
            // Without it the sum is the same, and takes longer.
            let _ = SockRef::from(&outgoing).set_send_buffer_size(SEND_BUFFER_WITHIN_A_MACHINE);
        }
        Ok(Collective::Tcp(Box::new(Self {
            rank: own,
            world,
            previous: Link { peer: previous.clone(), stream: incoming },
            next: Link { peer: next.clone(), stream: outgoing },
            scratch: vec![0; SCRATCH],
            spent: false,
        })))
    }

    pub(crate) fn world(&self) -> usize {
        self.world
    }

    /// See [`Collective::all_reduce_watched`].
    pub(crate) async fn all_reduce(
        &mut self,
        tag: u64,
        sums: &mut Sums,
        under_way: &(dyn Fn() + Sync),
    ) -> Result<Duration, PeerError> {
        if std::mem::replace(&mut self.spent, true) {
            return Err(PeerError::Spent);
        }
        let Self { rank, world, previous, next, scratch, .. } = self;
        let words = sums.words_mut();
        let mut transfer = Transfer::new(*rank, *world, tag, words, scratch).watched(under_way);
        let ours = transfer.header();
        poll_fn(|cx| transfer.poll(cx, &mut previous.stream, &mut next.stream)).await.map_err(
            |failure| match failure {
                Failure::Previous(error) => PeerError::Lost { peer: previous.peer.clone(), error },
                Failure::Next(error) => PeerError::Lost { peer: next.peer.clone(), error },
                Failure::Mismatch(theirs) => PeerError::Mismatch {
                    peer: previous.peer.clone(),
                    theirs: theirs.map_or_else(|| "something unknown".into(), describe),
                    ours: describe(ours),
                },
            },
        )?;
        let blocked = transfer.blocked();
        self.spent = false;
        Ok(blocked)
    }
}

/// Both ends have one address: packets do not leave the machine, whatever the address is.
fn is_within_this_machine(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(own), Ok(theirs)) => own.ip() == theirs.ip(),
        _ => false,
    }
}

fn describe(header: Header) -> String {
    let Header { tag, pairs, integers } = header;
    match pairs {
        0 => format!("{integers} integers of step {tag}"),
        _ => format!("{pairs} pairs of floats and {integers} integers of step {tag}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures::future::{join_all, try_join_all};
    use looptrain_proto::spec::Reduction;
    use looptrain_proto::{Digest, Generation, Incarnation};
    use proptest::prelude::*;

    use super::super::PeerListener;
    use super::*;
    use crate::reduce::Arithmetic;

    /// Nothing here takes nearly this long, however busy the machine is.
    const SOON: Duration = Duration::from_secs(45);

    fn id(generation: u64) -> RingId {
        RingId { incarnation: Incarnation(1), generation: Generation(generation) }
    }

    async fn listeners(world: usize) -> (Vec<Peers>, Vec<Peer>) {
        let (mut all, mut members) = (Vec::new(), Vec::new());
        for rank in 0..world {
            let listener = PeerListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
            members.push(Peer {
                rank: Rank(rank as u32),
                name: format!("w{rank}"),
                address: listener.address().to_string(),
            });
            all.push(listener.serve(Digest::of(b"run")).0);
        }
        (all, members)
    }

    async fn form(peers: &[Peers], members: &[Peer], generation: u64) -> Vec<Collective> {
        try_join_all(peers.iter().enumerate().map(|(rank, peers)| {
            Ring::form(peers, id(generation), Rank(rank as u32), members, SOON)
        }))
        .await
        .unwrap()
    }

    fn values(rank: usize, elements: usize) -> Vec<i64> {
        (0..elements as i64).map(|i| (i * 31 + 7) * (rank as i64 * 1_000_003 - 2_000_000)).collect()
    }

    fn expected(world: usize, elements: usize) -> Vec<i64> {
        let mut sums = vec![0; elements];
        for rank in 0..world {
            sums.iter_mut().zip(values(rank, elements)).for_each(|(sum, value)| *sum += value);
        }
        sums
    }

    /// Sums of integers alone.
    fn integers(values: &[i64]) -> Sums {
        let exact = Arithmetic::new(Reduction::Exact, 40, 1);
        let mut sums = Sums::zeroed(exact, 0, values.len(), None);
        sums.integers_mut().copy_from_slice(values);
        sums
    }

    async fn reduce(rings: &mut [Collective], tag: u64, elements: usize) -> Vec<Vec<i64>> {
        try_join_all(rings.iter_mut().enumerate().map(|(rank, ring)| async move {
            let mut sums = integers(&values(rank, elements));
            ring.all_reduce(tag, &mut sums).await.map(|_| sums.integers().to_vec())
        }))
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn every_rank_gets_the_sum_over_all_ranks() {
        for world in 1..=5 {
            let (peers, members) = listeners(world).await;
            let mut rings = form(&peers, &members, 1).await;
            for (tag, elements) in [0, 1, 2, 3, 4, 7, 1000, 98_765].into_iter().enumerate() {
                for sums in reduce(&mut rings, tag as u64, elements).await {
                    assert!(sums == expected(world, elements), "{world} ranks, {elements} values");
                }
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn buffers_larger_than_any_socket_pass() {
        let (peers, members) = listeners(3).await;
        let mut rings = form(&peers, &members, 1).await;
        let elements = 3_000_001;
        for sums in reduce(&mut rings, 1, elements).await {
            assert!(sums == expected(3, elements));
        }
    }

    #[tokio::test]
    async fn when_a_rank_is_gone_its_neighbours_fail_at_once_and_name_it() {
        let (peers, members) = listeners(4).await;
        let mut rings = form(&peers, &members, 1).await;
        drop(rings.remove(2));
        let results = join_all(rings.into_iter().map(|mut ring| async move {
            // Owned here, so that each failure closes the connections to the next neighbours.
            ring.all_reduce(1, &mut integers(&values(0, 500_000))).await
        }));
        // Without a word from rank 2 they would wait for ever.
        let results = tokio::time::timeout(SOON, results).await.unwrap();
        let errors: Vec<String> = results.into_iter().map(|r| r.unwrap_err().to_string()).collect();
        assert!(errors[1].contains("lost rank 2 (w2"), "{}", errors[1]);
        assert!(errors[2].contains("lost rank 2 (w2"), "{}", errors[2]);
    }

    #[tokio::test]
    async fn a_rank_that_waits_notices_that_the_next_one_is_gone() {
        let (peers, members) = listeners(3).await;
        let mut rings = form(&peers, &members, 1).await;
        // Rank 0 stays connected and idle; rank 2 leaves after rank 1 has sent what it had.
        let mut waiting = rings.remove(1);
        let task =
            tokio::spawn(async move { waiting.all_reduce(1, &mut integers(&[1, 2, 3])).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(rings.remove(1));
        let error = tokio::time::timeout(SOON, task).await.unwrap().unwrap().unwrap_err();
        assert!(error.to_string().contains("lost rank 2"), "{error}");
    }

    #[tokio::test]
    async fn an_abandoned_operation_frees_the_others_and_a_new_ring_forms() {
        let (peers, members) = listeners(3).await;
        let mut rings = form(&peers, &members, 1).await;
        let last = rings.pop().unwrap();
        let running: Vec<_> = rings
            .into_iter()
            .map(|mut ring| {
                tokio::spawn(async move {
                    ring.all_reduce(1, &mut integers(&values(0, 1_000_000))).await
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        running[0].abort();
        drop(last);
        let survivor = running.into_iter().nth(1).unwrap();
        assert!(tokio::time::timeout(SOON, survivor).await.unwrap().unwrap().is_err());
        let mut rings = form(&peers, &members, 2).await;
        assert!(reduce(&mut rings, 1, 10_001).await.iter().all(|s| *s == expected(3, 10_001)));
    }

    #[tokio::test]
    async fn a_spent_ring_is_not_used_again() {
        let (peers, members) = listeners(2).await;
        let mut rings = form(&peers, &members, 1).await;
        {
            let mut sums = integers(&[1, 2]);
            let stuck = rings[0].all_reduce(1, &mut sums);
            assert!(tokio::time::timeout(Duration::from_millis(20), stuck).await.is_err());
        }
        assert!(matches!(
            rings[0].all_reduce(1, &mut integers(&[1, 2])).await,
            Err(PeerError::Spent)
        ));
    }

    #[tokio::test]
    async fn ranks_at_different_steps_are_told_so() {
        let (peers, members) = listeners(2).await;
        let mut rings = form(&peers, &members, 1).await;
        let [first, second] = rings.as_mut_slice() else { panic!() };
        let (mut one, mut two) = (integers(&[1, 2]), integers(&[1, 2]));
        let results = tokio::join!(first.all_reduce(1, &mut one), second.all_reduce(2, &mut two));
        let text = results.0.unwrap_err().to_string();
        assert!(
            text.contains("2 integers of step 2") && text.contains("2 integers of step 1"),
            "{text}"
        );
        assert!(results.1.is_err());
    }

    #[tokio::test]
    async fn ranks_of_different_arithmetic_are_told_so() {
        let (peers, members) = listeners(2).await;
        let mut rings = form(&peers, &members, 1).await;
        let [first, second] = rings.as_mut_slice() else { panic!() };
        let sums = |reduction| Sums::zeroed(Arithmetic::new(reduction, 40, 1), 6, 1, None);
        let (mut exact, mut fast) = (sums(Reduction::Exact), sums(Reduction::Fast));
        let results =
            tokio::join!(first.all_reduce(1, &mut exact), second.all_reduce(1, &mut fast));
        let text = results.0.unwrap_err().to_string();
        assert!(text.contains("reduces 3 pairs of floats and 1 integers of step 1"), "{text}");
        assert!(text.contains("this worker reduces 7 integers of step 1"), "{text}");
        assert!(results.1.is_err());
    }

    #[tokio::test]
    async fn every_rank_gets_the_same_bits_of_a_fast_sum_and_the_exact_integers_beside_it() {
        for world in 2..=5 {
            let (peers, members) = listeners(world).await;
            let mut rings = form(&peers, &members, 1).await;
            for (tag, elements) in [0, 1, 2, 3, 10, 33_335].into_iter().enumerate() {
                // A large integer that floats would round.
                let integers = |rank: usize| [1i64 << 60, -(rank as i64), 3];
                // Of many magnitudes, so that the order of additions shows in the last bits.
                let value = |rank: usize, i: usize| {
                    ((i * 31 + rank * 7) as f32).sin() * 2f32.powi((i + rank) as i32 % 20)
                };
                let single = Arithmetic::new(Reduction::Fast, 40, world as u32);
                let reduced =
                    try_join_all(rings.iter_mut().enumerate().map(|(rank, ring)| async move {
                        let mut sums = Sums::zeroed(single, elements, 3, None);
                        let values: Vec<f32> = (0..elements).map(|i| value(rank, i)).collect();
                        sums.add(&values).unwrap();
                        sums.integers_mut().copy_from_slice(&integers(rank));
                        ring.all_reduce(tag as u64, &mut sums).await.map(|_| sums)
                    }));
                let reduced = reduced.await.unwrap();
                let mut found = vec![0.0; elements];
                reduced[0].mean(1.0, &mut found);
                for (i, found) in found.iter().enumerate() {
                    let terms = || (0..world).map(|rank| f64::from(value(rank, i)));
                    let (expected, size) =
                        (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    assert!((f64::from(*found) - expected).abs() <= 1e-6 * size, "{i}");
                }
                let ranks = (0..world as i64).sum::<i64>();
                let expected = [(world as i64) << 60, -ranks, 3 * world as i64];
                assert_eq!(reduced[0].integers(), expected);
                assert!(reduced.iter().all(|sums| sums.as_bytes() == reduced[0].as_bytes()));
            }
        }
    }

    #[tokio::test]
    async fn a_rank_that_is_no_member_forms_nothing() {
        let (peers, members) = listeners(2).await;
        let error = Ring::form(&peers[0], id(1), Rank(2), &members, SOON).await.unwrap_err();
        assert!(matches!(error, PeerError::NoSuchRank { .. }));
        assert!(Ring::form(&peers[0], id(1), Rank(0), &[], SOON).await.is_err());
    }

    /// Sockets that pass a few bytes at a time, so that words are torn at every place.
    /// The first `pairs` words are pairs of floats.
    fn torn(world: usize, words: &[Vec<i64>], pairs: usize, grain: usize) -> Vec<Vec<i64>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async move {
            let (mut outs, mut ins) = (Vec::new(), Vec::new());
            for _ in 0..world {
                let (out, into) = tokio::io::duplex(grain);
                outs.push(out);
                ins.push(into);
            }
            ins.rotate_right(1);
            join_all(outs.into_iter().zip(ins).enumerate().map(
                |(rank, (mut next, mut previous))| async move {
                    let (mut sums, mut scratch) = (words[rank].clone(), vec![0; 3]);
                    let whole = (sums.as_mut_slice(), pairs);
                    let mut transfer = Transfer::new(rank, world, 1, whole, &mut scratch);
                    poll_fn(|cx| transfer.poll(cx, &mut previous, &mut next)).await.unwrap();
                    sums
                },
            ))
            .await
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn torn_words_are_put_together(
            world in 2usize..6,
            (elements, pairs) in (0usize..60).prop_flat_map(|all| (Just(all), 0..=all)),
            grain in 1usize..40,
        ) {
            // Small whole numbers, whose sum is the same in any order as floats as well.
            let pair = |rank: usize, word: usize| [word as f32, (rank * word) as f32];
            let words: Vec<Vec<i64>> = (0..world)
                .map(|rank| {
                    let mut words = values(rank, elements);
                    (0..pairs).for_each(|word| words[word] = bytemuck::cast(pair(rank, word)));
                    words
                })
                .collect();
            let mut expected = expected(world, elements);
            for (word, sum) in expected[..pairs].iter_mut().enumerate() {
                let ranks: usize = (0..world).sum();
                *sum = bytemuck::cast([(world * word) as f32, (ranks * word) as f32]);
            }
            for sums in torn(world, &words, pairs, grain) {
                prop_assert_eq!(&sums, &expected);
            }
        }
    }
}
