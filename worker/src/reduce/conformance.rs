//! What every collective does, whatever carries the numbers: one suite for all of them.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use looptrain_proto::spec::Reduction;
use looptrain_proto::{Digest, Generation, Incarnation, Rank};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::bucket::Cut;
use super::tcp::{Peer, PeerListener, Peers, Ring, RingId};
use super::{Arithmetic, Bucket, Collective, PeerError, Sums};

/// Nothing here takes nearly this long, however busy the machine is.
pub(super) const SOON: Duration = Duration::from_secs(45);

/// Integers beside the sums.
pub(super) const INTEGERS: usize = 3;

/// What a rank gives, or gets.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Values {
    pub(super) gradient: Vec<f64>,
    pub(super) integers: Vec<i64>,
}

/// What a step reduces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) tag: u64,
    pub(super) reduction: Reduction,
    pub(super) elements: usize,
    pub(super) buckets: usize,
}

pub(super) const SHAPE: Shape =
    Shape { tag: 7, reduction: Reduction::Exact, elements: 4096, buckets: 2 };

impl Shape {
    pub(super) fn arithmetic(self) -> Arithmetic {
        Arithmetic::new(self.reduction, 40, 8)
    }

    /// Numbers that are exact in its arithmetic, as are their sums.
    pub(super) fn of_rank(self, rank: usize) -> Values {
        let (most, middle) = match self.reduction {
            Reduction::Exact | Reduction::Fast => (1009, 500.0),
            // So that the sums of four ranks fit in the eight bits of a bf16.
            Reduction::FastBf16 => (23, 11.0),
        };
        let value = |i: usize| (((i * 31 + 7) % most) as f64 * (rank as f64 + 1.0) - middle) / 16.0;
        Values {
            gradient: (0..self.elements).map(value).collect(),
            integers: vec![rank as i64 + 1, -7, i64::MAX / 9],
        }
    }

    pub(super) fn of_all(self, world: usize) -> Values {
        let all = (0..world).map(|rank| self.of_rank(rank));
        all.reduce(|mut sums, values| {
            sums.gradient.iter_mut().zip(values.gradient).for_each(|(sum, value)| *sum += value);
            sums.integers.iter_mut().zip(values.integers).for_each(|(sum, value)| *sum += value);
            sums
        })
        .unwrap()
    }
}

/// Workers that reduce over something.
pub(super) trait Fabric: Sized {
    /// What all of them need while they are there.
    type Ground;

    /// Whether ranks that disagree find the odd one among all; otherwise they know their neighbours.
    const FINDS_THE_ODD_ONE: bool;

    fn ground() -> Self::Ground;

    async fn of(ground: &Self::Ground, world: usize) -> Self;

    /// What each of the workers that are there comes to when all are told to form a generation.
    async fn try_form(
        &self,
        generation: u64,
        there: impl Fn(usize) -> bool,
        within: Duration,
    ) -> Vec<Result<Collective, String>>;

    /// A rank's numbers, in buckets.
    fn give(&self, rank: usize, shape: Shape) -> Vec<Bucket>;

    /// What came of the numbers that a rank has given last.
    fn take(&self, rank: usize, shape: Shape, sums: &Sums) -> Values;
}

pub(super) async fn form<F: Fabric>(fabric: &F, generation: u64) -> Vec<Collective> {
    let formed = fabric.try_form(generation, |_| true, SOON).await;
    formed.into_iter().map(Result::unwrap).collect()
}

/// Buckets that are all there.
pub(super) fn ready(buckets: Vec<Bucket>) -> UnboundedReceiver<Bucket> {
    let (sender, ready) = unbounded_channel();
    buckets.into_iter().for_each(|bucket| sender.send(bucket).unwrap());
    ready
}

/// A step of all ranks, whose buckets become ready one after the other; it has the sums of all.
pub(super) async fn reduces<F: Fabric>(fabric: &F, formed: &mut [Collective], shape: Shape) {
    let world = formed.len();
    let all = formed.iter_mut().enumerate().map(|(rank, collective)| async move {
        let (sender, ready) = unbounded_channel();
        let calls = Arc::new(AtomicUsize::new(0));
        let given = async {
            for bucket in fabric.give(rank, shape) {
                // As a backward pass does: some time after the other.
                tokio::time::sleep(Duration::from_millis(rank as u64)).await;
                sender.send(bucket).unwrap();
            }
            drop(sender);
        };
        let under_way = Arc::clone(&calls);
        let reduced = collective.all_reduce_as_ready(shape.tag, ready, move || {
            under_way.fetch_add(1, Ordering::Relaxed);
        });
        let ((), reduced) = tokio::join!(given, reduced);
        let sums = reduced.unwrap().expect("all buckets came").sums;
        assert_eq!(calls.load(Ordering::Relaxed), 1, "it is told once when numbers go out");
        let expected = shape.of_all(world);
        assert!(fabric.take(rank, shape, &sums) == expected, "{shape:?}, rank {rank} of {world}");
    });
    join_all(all).await;
}

pub(super) async fn all_ranks_get_the_sums_of_all<F: Fabric>() {
    let ground = F::ground();
    for world in 2..=4 {
        let fabric = F::of(&ground, world).await;
        let mut formed = form(&fabric, 1).await;
        let shapes = [(8, 1), (128, 1), (4096, 4), (70_000, 7)];
        for (tag, (elements, buckets)) in (1..).zip(shapes) {
            for reduction in [Reduction::Exact, Reduction::Fast, Reduction::FastBf16] {
                let shape = Shape { tag, reduction, elements, buckets };
                reduces(&fabric, &mut formed, shape).await;
            }
        }
    }
}

pub(super) async fn one_generation_after_the_other_reduces<F: Fabric>() {
    let ground = F::ground();
    let fabric = F::of(&ground, 3).await;
    for generation in 1..=5 {
        let mut formed = form(&fabric, generation).await;
        reduces(&fabric, &mut formed, SHAPE).await;
    }
}

pub(super) async fn an_all_reduce_that_is_dropped_in_the_middle_leaves_nothing_behind<F: Fabric>() {
    let ground = F::ground();
    let fabric = F::of(&ground, 2).await;
    let mut formed = form(&fabric, 1).await;
    // Rank 1 never has its last bucket.
    let (mine, mut theirs) = (fabric.give(0, SHAPE), fabric.give(1, SHAPE));
    theirs.pop();
    let (sender, waiting) = unbounded_channel();
    theirs.into_iter().for_each(|bucket| sender.send(bucket).unwrap());
    let under_way = Arc::new(tokio::sync::Notify::new());
    let note = Arc::clone(&under_way);
    let [first, second] = formed.as_mut_slice() else { panic!() };
    let both = async {
        tokio::join!(
            first.all_reduce_as_ready(SHAPE.tag, ready(mine), move || note.notify_one()),
            second.all_reduce_as_ready(SHAPE.tag, waiting, || {}),
        )
    };
    tokio::select! {
        ended = both => panic!("it waits for rank 1: {ended:?}"),
        () = under_way.notified() => {}
    }
    drop((formed, sender));
    let mut again = form(&fabric, 2).await;
    reduces(&fabric, &mut again, SHAPE).await;
}

pub(super) async fn a_peer_that_does_not_come_is_told_in_time<F: Fabric>() {
    let ground = F::ground();
    let fabric = F::of(&ground, 3).await;
    let short = Duration::from_secs(2);
    for absent in [2, 0] {
        let generation = 3 - absent as u64;
        let outcomes = fabric.try_form(generation, |rank| rank != absent, short).await;
        assert_eq!(outcomes.len(), 2);
        // In a ring the next rank may have all that it needs.
        assert!(outcomes.iter().any(Result::is_err));
    }
    let mut again = form(&fabric, 4).await;
    reduces(&fabric, &mut again, SHAPE).await;
}

pub(super) async fn a_generation_that_is_given_up_while_it_forms_is_forgotten<F: Fabric>() {
    let ground = F::ground();
    let fabric = F::of(&ground, 2).await;
    let alone = fabric.try_form(1, |rank| rank == 0, SOON);
    let waited = tokio::time::timeout(Duration::from_millis(300), alone).await;
    assert!(waited.is_err(), "it waits for rank 1");
    let mut again = form(&fabric, 2).await;
    reduces(&fabric, &mut again, SHAPE).await;
}

pub(super) async fn ranks_that_reduce_different_things_fail_and_the_odd_one_is_named<F: Fabric>() {
    let ground = F::ground();
    let fast = Shape { reduction: Reduction::Fast, ..SHAPE };
    for (most, odd) in [
        (SHAPE, Shape { tag: 8, ..SHAPE }),
        (SHAPE, Shape { elements: 4224, ..SHAPE }),
        (SHAPE, fast),
        (fast, Shape { reduction: Reduction::FastBf16, ..SHAPE }),
        (SHAPE, Shape { buckets: 3, ..SHAPE }),
    ] {
        let fabric = F::of(&ground, 3).await;
        let mut formed = form(&fabric, 1).await;
        let all = formed.iter_mut().enumerate().map(|(rank, collective)| {
            let shape = if rank == 1 { odd } else { most };
            let buckets = ready(fabric.give(rank, shape));
            async move {
                let error = collective.all_reduce_as_ready(shape.tag, buckets, || {}).await;
                let error = error.expect_err("they do not agree");
                let spent = collective.all_reduce_as_ready(9, unbounded_channel().1, || {}).await;
                assert!(matches!(spent, Err(PeerError::Spent)), "{spent:?}");
                // As the session does, so that the others do not wait.
                *collective = Collective::Alone;
                error
            }
        });
        let errors = tokio::time::timeout(SOON, join_all(all)).await.expect("nobody waits");
        let named = errors.iter().enumerate().any(|(rank, error)| {
            // Of two neighbours the odd one may be the first to see it, and ends what the others wait for.
            let by_the_odd_one = rank == 1 && !F::FINDS_THE_ODD_ONE;
            matches!(error, PeerError::Mismatch { peer, theirs, ours }
                if (by_the_odd_one || peer.rank == Rank(1)) && theirs != ours)
        });
        assert!(named, "{odd:?}: {errors:?}");
    }
}

/// The suite, for a fabric.
macro_rules! conforms {
    ($fabric:ty: $($test:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                crate::reduce::conformance::$test::<$fabric>().await;
            }
        )*
    };
    ($fabric:ty) => {
        crate::reduce::conformance::conforms!(
            $fabric: all_ranks_get_the_sums_of_all,
            one_generation_after_the_other_reduces,
            an_all_reduce_that_is_dropped_in_the_middle_leaves_nothing_behind,
            a_peer_that_does_not_come_is_told_in_time,
            a_generation_that_is_given_up_while_it_forms_is_forgotten,
            ranks_that_reduce_different_things_fail_and_the_odd_one_is_named,
        );
    };
}
pub(super) use conforms;

/// Rings over the loopback.
struct Rings {
    peers: Vec<Peers>,
    members: Vec<Peer>,
}

impl Fabric for Rings {
    type Ground = ();

    const FINDS_THE_ODD_ONE: bool = false;

    fn ground() {}

    async fn of((): &(), world: usize) -> Self {
        let (mut peers, mut members) = (Vec::new(), Vec::new());
        for rank in 0..world {
            let listener = PeerListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
            members.push(Peer {
                rank: Rank(rank as u32),
                name: format!("w{rank}"),
                address: listener.address().to_string(),
            });
            peers.push(listener.serve(Digest::of(b"run")).0);
        }
        Self { peers, members }
    }

    async fn try_form(
        &self,
        generation: u64,
        there: impl Fn(usize) -> bool,
        within: Duration,
    ) -> Vec<Result<Collective, String>> {
        let id = RingId { incarnation: Incarnation(1), generation: Generation(generation) };
        let present = self.peers.iter().enumerate().filter(|(rank, _)| there(*rank));
        join_all(present.map(|(rank, peers)| async move {
            let formed = Ring::form(peers, id, Rank(rank as u32), &self.members, 2, within).await;
            formed.map_err(|error| error.to_string())
        }))
        .await
    }

    fn give(&self, rank: usize, shape: Shape) -> Vec<Bucket> {
        let Shape { elements, buckets, .. } = shape;
        let cut = Cut::with_buckets(shape.arithmetic(), elements, INTEGERS, buckets);
        let mut sums = Sums::cut(cut, None);
        let Values { gradient, integers } = shape.of_rank(rank);
        let gradient: Vec<f32> = gradient.into_iter().map(|value| value as f32).collect();
        sums.add(&gradient).unwrap();
        sums.integers_mut().copy_from_slice(&integers);
        sums.into_buckets().into_iter().map(Bucket::complete).collect()
    }

    fn take(&self, _: usize, shape: Shape, sums: &Sums) -> Values {
        let mut gradient = vec![0.0; shape.elements];
        sums.mean(1.0, &mut gradient);
        let gradient = gradient.into_iter().map(f64::from).collect();
        Values { gradient, integers: sums.integers().to_vec() }
    }
}

mod over_tcp {
    super::conforms!(super::Rings);
}
