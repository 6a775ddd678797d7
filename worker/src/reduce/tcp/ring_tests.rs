#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use half::bf16;
use looptrain_proto::spec::Reduction;
use looptrain_proto::transport::{Credentials, Role};
use looptrain_proto::{Digest, Generation, Incarnation};
use proptest::prelude::*;

use super::super::PeerListener;
use super::*;
use crate::reduce::Arithmetic;
use crate::reduce::bucket::{Cut, Numbers};
use crate::testing::{authority, credentials};

/// Nothing here takes nearly this long, however busy the machine is.
const SOON: Duration = Duration::from_secs(45);

fn id(generation: u64) -> RingId {
    RingId { incarnation: Incarnation(1), generation: Generation(generation) }
}

async fn listeners(world: usize) -> (Vec<Peers>, Vec<Peer>) {
    with_credentials(world, None).await
}

/// Workers that speak TLS with each other.
async fn secured(world: usize) -> (Vec<Peers>, Vec<Peer>) {
    with_credentials(world, Some(credentials(&authority(), Role::Worker))).await
}

async fn with_credentials(
    world: usize,
    credentials: Option<Arc<Credentials>>,
) -> (Vec<Peers>, Vec<Peer>) {
    let (mut all, mut members) = (Vec::new(), Vec::new());
    for rank in 0..world {
        let listener = PeerListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let listener = listener.secured(credentials.clone());
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
    streamed(peers, members, generation, 2).await
}

async fn streamed(
    peers: &[Peers],
    members: &[Peer],
    generation: u64,
    streams: u32,
) -> Vec<Collective> {
    try_join_all(peers.iter().enumerate().map(|(rank, peers)| {
        Ring::form(peers, id(generation), Rank(rank as u32), members, streams, SOON)
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
        let reduced = ring.all_reduce(tag, integers(&values(rank, elements))).await;
        reduced.map(|reduced| reduced.sums.integers().to_vec())
    }))
    .await
    .unwrap()
}

#[tokio::test]
async fn within_tls_every_rank_gets_the_same_sum() {
    for world in 2..=4 {
        let (peers, members) = secured(world).await;
        let mut rings = form(&peers, &members, 1).await;
        for (tag, elements) in [0, 1, 3, 7, 1000, 98_765, 1 << 20].into_iter().enumerate() {
            for sums in reduce(&mut rings, tag as u64, elements).await {
                assert!(sums == expected(world, elements), "{world} ranks, {elements} values");
            }
        }
    }
}

#[tokio::test]
async fn within_tls_too_the_end_of_a_neighbour_is_noticed_at_once() {
    for gone in [1, 2] {
        let (peers, members) = secured(3).await;
        let mut rings = form(&peers, &members, 1).await;
        assert_eq!(reduce(&mut rings, 1, 1000).await.len(), 3);
        // In the middle of an operation, before this rank has anything to send, and between two.
        let (ready, buckets) = unbounded_channel();
        drop(rings.remove(gone));
        let waiting = rings[0].all_reduce_as_ready(2, buckets, || {});
        let error = tokio::time::timeout(SOON, waiting).await.unwrap().unwrap_err();
        assert!(error.to_string().contains(&format!("lost rank {gone}")), "{error}");
        drop(ready);
    }
}

#[tokio::test]
async fn who_has_no_certificate_of_a_worker_is_no_neighbour() {
    let authority = authority();
    let worker = credentials(&authority, Role::Worker);
    let (there, members) = with_credentials(1, Some(worker)).await;
    let stranger = credentials(&crate::testing::authority(), Role::Worker);
    for shown in [None, Some(credentials(&authority, Role::Operator)), Some(stranger)] {
        let (here, _) = with_credentials(1, shown).await;
        let short = Duration::from_millis(300);
        let refused = here[0].connect(id(1), 0, Rank(1), &members[0], short).await.unwrap_err();
        assert!(matches!(refused, PeerError::Connect { .. }), "{refused}");
        let fetched = here[0].connect_for_state(&members[0], SOON).await.unwrap_err();
        assert!(matches!(fetched, PeerError::Lost { .. }), "{fetched}");
    }
    let (peer, waited) = (members[0].clone(), Duration::from_millis(50));
    let from = Peer { rank: Rank(1), ..peer };
    assert!(there[0].accept(id(1), 0, &from, waited).await.is_err(), "nobody has come in");
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

/// Sums in so many buckets, of values of many magnitudes, so that the order of additions shows in
/// the last bits of fast ones; an element is a multiple of 2^-20.
fn bucketed(reduction: Reduction, rank: usize, elements: usize, buckets: usize) -> Sums {
    let arithmetic = Arithmetic::new(reduction, 40, 8);
    let mut sums = Sums::cut(Cut::with_buckets(arithmetic, elements, 2, buckets), None);
    sums.add(&gradient(rank, elements)).unwrap();
    sums.integers_mut().copy_from_slice(&[1 << 60, -(rank as i64)]);
    sums
}

fn gradient(rank: usize, elements: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7919 + rank * 104_729) % 16_384) as f32 - 8000.0;
    (0..elements).map(|i| value(i) * 2f32.powi(-((i + rank) as i32 % 20) - 6)).collect()
}

/// All ranks reduce such sums; what each has then.
async fn reduce_bucketed(
    rings: &mut [Collective],
    reduction: Reduction,
    elements: usize,
    buckets: usize,
) -> Vec<Sums> {
    try_join_all(rings.iter_mut().enumerate().map(|(rank, ring)| async move {
        let own = bucketed(reduction, rank, elements, buckets);
        ring.all_reduce(9, own).await.map(|reduced| reduced.sums)
    }))
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_streams_gives_all_ranks_the_same_bits_of_all_buckets() {
    for world in 1..=5 {
        for reduction in [Reduction::Exact, Reduction::Fast, Reduction::FastBf16] {
            for (elements, buckets) in [(7, 3), (50_001, 5), (50_001, 16)] {
                let mut all: Vec<Sums> = Vec::new();
                for streams in [1, 2, 3, 16] {
                    let (peers, members) = listeners(world).await;
                    let mut rings = streamed(&peers, &members, 1, streams).await;
                    // Twice over the same connections.
                    for _ in 0..2 {
                        let reduced =
                            reduce_bucketed(&mut rings, reduction, elements, buckets).await;
                        all.extend(reduced);
                    }
                }
                assert!(all.iter().all(|sums| *sums == all[0]), "{world} ranks");
                let mut whole = bucketed(reduction, 0, elements, buckets);
                for rank in 1..world {
                    whole.add(&gradient(rank, elements)).unwrap();
                    let integers = [1i64 << 60, -(rank as i64)];
                    let sums = whole.integers_mut().iter_mut().zip(integers);
                    sums.for_each(|(sum, value)| *sum = sum.wrapping_add(value));
                }
                if reduction == Reduction::Exact {
                    assert!(all[0] == whole, "{world} ranks");
                }
                let (mut found, mut expected) = (vec![0.0; elements], vec![0.0; elements]);
                all[0].mean(1.0, &mut found);
                whole.mean(1.0, &mut expected);
                // Of sums up to 625, with five roundings to multiples of 4.
                let error = if reduction == Reduction::FastBf16 { 10.0 } else { 1e-3 };
                let near = |(a, b): (&f32, &f32)| (a - b).abs() < error;
                assert!(found.iter().zip(&expected).all(near), "{world} ranks");
                assert_eq!(all[0].integers(), whole.integers());
            }
        }
    }
}

#[tokio::test]
async fn buckets_go_round_as_they_become_ready() {
    let (peers, members) = listeners(2).await;
    let mut rings = form(&peers, &members, 1).await;
    let [first, second] = rings.as_mut_slice() else { panic!() };
    let sums = |rank| bucketed(Reduction::Exact, rank, 10_001, 5);
    let (early, late) = (sums(0).all_ready(), sums(1).into_buckets());
    let (ready, buckets) = unbounded_channel();
    let told = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&told);
    let one = first.all_reduce_as_ready(3, early, move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let two = second.all_reduce_as_ready(3, buckets, || {});
    let give = async {
        for bucket in late {
            tokio::time::sleep(Duration::from_millis(10)).await;
            ready.send(bucket).unwrap();
        }
        // Who gives them may stay.
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let (one, two, ()) = tokio::join!(one, two, give);
    let (one, two) = (one.unwrap().unwrap(), two.unwrap().unwrap());
    assert!(one.sums == two.sums && one.sums.integers() == [1 << 61, -1]);
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn no_more_buckets_before_the_last_give_no_sums_and_end_it_for_the_others() {
    let (peers, members) = listeners(2).await;
    let mut rings = form(&peers, &members, 1).await;
    let mut second = rings.pop().unwrap();
    let sums = |rank| bucketed(Reduction::Exact, rank, 10_001, 5);
    let other = tokio::spawn(async move { second.all_reduce(1, sums(1)).await });
    let (ready, buckets) = unbounded_channel();
    sums(0).into_buckets().into_iter().take(3).for_each(|bucket| ready.send(bucket).unwrap());
    drop(ready);
    let mut first = rings.pop().unwrap();
    assert!(first.all_reduce_as_ready(1, buckets, || {}).await.unwrap().is_none());
    let error = tokio::time::timeout(SOON, other).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().contains("lost rank 0"), "{error}");
    assert!(matches!(first.all_reduce(2, sums(0)).await, Err(PeerError::Spent)));
    let (ready, buckets) = unbounded_channel();
    drop(ready);
    let mut alone = Collective::Alone;
    assert!(alone.all_reduce_as_ready(1, buckets, || {}).await.unwrap().is_none());
    assert!(alone.all_reduce(2, sums(0)).await.unwrap().sums == sums(0));
}

#[tokio::test]
async fn a_rank_that_has_no_bucket_yet_notices_that_a_neighbour_is_gone() {
    for gone in [1, 2] {
        let (peers, members) = listeners(3).await;
        let mut rings = form(&peers, &members, 1).await;
        let (ready, buckets) = unbounded_channel();
        drop(rings.remove(gone));
        let waiting = rings[0].all_reduce_as_ready(1, buckets, || {});
        let error = tokio::time::timeout(SOON, waiting).await.unwrap().unwrap_err();
        assert!(error.to_string().contains(&format!("lost rank {gone}")), "{error}");
        drop(ready);
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_the_operation_on_all_ranks_and_names_the_peer() {
    let (peers, members) = listeners(3).await;
    let mut rings = streamed(&peers, &members, 1, 3).await;
    let Collective::Tcp(ring) = &mut rings[0] else { panic!() };
    // The last of three streams to rank 1; the others go on.
    SockRef::from(ring.streams[2].next.tcp()).shutdown(std::net::Shutdown::Both).unwrap();
    let results = join_all(rings.into_iter().enumerate().map(|(rank, mut ring)| async move {
        ring.all_reduce(1, bucketed(Reduction::Fast, rank, 300_000, 6)).await
    }));
    let results = tokio::time::timeout(SOON, results).await.unwrap();
    let errors: Vec<String> = results.into_iter().map(|r| r.unwrap_err().to_string()).collect();
    assert!(errors[0].contains("lost rank"), "{}", errors[0]);
    assert!(errors[1].contains("lost rank"), "{}", errors[1]);
    assert!(errors[2].contains("lost rank"), "{}", errors[2]);
    assert!(errors[0].contains("rank 1") || errors[1].contains("rank 0"), "{errors:?}");
}

#[tokio::test]
async fn ranks_that_cut_their_sums_otherwise_are_told_the_bucket() {
    let (peers, members) = listeners(2).await;
    let mut rings = streamed(&peers, &members, 1, 1).await;
    let [first, second] = rings.as_mut_slice() else { panic!() };
    let sums = |buckets| bucketed(Reduction::Exact, 0, 8, buckets);
    let whole = sums(2);
    let mut missing = sums(2).into_buckets();
    let (ready, buckets) = unbounded_channel();
    ready.send(missing.remove(1)).unwrap();
    let results =
        tokio::join!(first.all_reduce(1, whole), second.all_reduce_as_ready(1, buckets, || {}));
    let text = results.0.unwrap_err().to_string();
    assert!(text.contains("reduces 6 integers in bucket 1 of step 1"), "{text}");
    assert!(text.contains("this worker reduces 4 integers in bucket 0 of step 1"), "{text}");
    assert!(results.1.is_err());
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
        ring.all_reduce(1, integers(&values(0, 500_000))).await
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
    let task = tokio::spawn(async move { waiting.all_reduce(1, integers(&[1, 2, 3])).await });
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
            tokio::spawn(async move { ring.all_reduce(1, integers(&values(0, 1_000_000))).await })
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
        let stuck = rings[0].all_reduce(1, integers(&[1, 2]));
        assert!(tokio::time::timeout(Duration::from_millis(20), stuck).await.is_err());
    }
    assert!(matches!(rings[0].all_reduce(1, integers(&[1, 2])).await, Err(PeerError::Spent)));
}

#[tokio::test]
async fn ranks_at_different_steps_are_told_so() {
    let (peers, members) = listeners(2).await;
    let mut rings = form(&peers, &members, 1).await;
    let [first, second] = rings.as_mut_slice() else { panic!() };
    let (one, two) = (integers(&[1, 2]), integers(&[1, 2]));
    let results = tokio::join!(first.all_reduce(1, one), second.all_reduce(2, two));
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
    let (exact, fast) = (sums(Reduction::Exact), sums(Reduction::Fast));
    let results = tokio::join!(first.all_reduce(1, exact), second.all_reduce(1, fast));
    let text = results.0.unwrap_err().to_string();
    assert!(text.contains("reduces 3 pairs of f32 and 1 integers of step 1"), "{text}");
    assert!(text.contains("this worker reduces 7 integers of step 1"), "{text}");
    assert!(results.1.is_err());
}

#[tokio::test]
async fn every_rank_gets_the_same_bits_of_a_fast_sum_and_the_exact_integers_beside_it() {
    fast_sums(Reduction::Fast, 1e-6).await;
    // Each addition rounds to eight bits.
    fast_sums(Reduction::FastBf16, 5.0 / 256.0).await;
}

/// With an error that is no larger than that share of the terms' magnitudes.
async fn fast_sums(reduction: Reduction, error: f64) {
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
            let single = Arithmetic::new(reduction, 40, world as u32);
            let reduced =
                try_join_all(rings.iter_mut().enumerate().map(|(rank, ring)| async move {
                    let mut sums = Sums::zeroed(single, elements, 3, None);
                    let values: Vec<f32> = (0..elements).map(|i| value(rank, i)).collect();
                    sums.add(&values).unwrap();
                    sums.integers_mut().copy_from_slice(&integers(rank));
                    ring.all_reduce(tag as u64, sums).await.map(|reduced| reduced.sums)
                }));
            let reduced = reduced.await.unwrap();
            let mut found = vec![0.0; elements];
            reduced[0].mean(1.0, &mut found);
            for (i, found) in found.iter().enumerate() {
                let terms = || (0..world).map(|rank| f64::from(value(rank, i)));
                let (expected, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                assert!((f64::from(*found) - expected).abs() <= error * size, "{i}");
            }
            let ranks = (0..world as i64).sum::<i64>();
            let expected = [(world as i64) << 60, -ranks, 3 * world as i64];
            assert_eq!(reduced[0].integers(), expected);
            assert!(reduced.iter().all(|sums| *sums == reduced[0]));
        }
    }
}

#[tokio::test]
async fn a_rank_that_is_no_member_forms_nothing() {
    let (peers, members) = listeners(2).await;
    let error = Ring::form(&peers[0], id(1), Rank(2), &members, 1, SOON).await.unwrap_err();
    assert!(matches!(error, PeerError::NoSuchRank { .. }));
    assert!(Ring::form(&peers[0], id(1), Rank(0), &[], 1, SOON).await.is_err());
}

/// Sockets that pass a few bytes at a time, so that words are torn at every place.
/// So many words at the front are those.
fn torn(world: usize, words: &[Vec<i64>], front: (Numbers, usize), grain: usize) -> Vec<Vec<i64>> {
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
                let whole = (sums.as_mut_slice(), front);
                let mut transfer = Transfer::new((rank, world), (1, 0), whole, &mut scratch);
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
        (elements, front) in (0usize..60).prop_flat_map(|all| (Just(all), 0..=all)),
        numbers in prop_oneof![Just(Numbers::Floats), Just(Numbers::Bf16)],
        grain in 1usize..40,
    ) {
        // Small whole numbers, whose sum is the same in any order as floats as well.
        let of = |a: usize, b: usize| -> i64 {
            let [a, b] = [a, b].map(|value| (value % 25) as f32);
            match numbers {
                Numbers::Bf16 => bytemuck::cast([a, b, -a, -b].map(|it| bf16::from_f32(it).to_bits())),
                _ => bytemuck::cast([a, b]),
            }
        };
        let words: Vec<Vec<i64>> = (0..world)
            .map(|rank| {
                let mut words = values(rank, elements);
                (0..front).for_each(|word| words[word] = of(word, rank));
                words
            })
            .collect();
        let mut expected = expected(world, elements);
        for (word, sum) in expected[..front].iter_mut().enumerate() {
            let (word, ranks) = ((word % 25) as f32 * world as f32, (0..world).sum::<usize>() as f32);
            *sum = match numbers {
                Numbers::Bf16 => {
                    bytemuck::cast([word, ranks, -word, -ranks].map(|it| bf16::from_f32(it).to_bits()))
                }
                _ => bytemuck::cast([word, ranks]),
            };
        }
        for sums in torn(world, &words, (numbers, front), grain) {
            prop_assert_eq!(&sums, &expected);
        }
    }
}
