//! Over the stand-in for NCCL, on emulated devices: the suite of all collectives, and what only NCCL can do
//! wrong.
#![allow(clippy::unwrap_used)]

use futures::future::join_all;
use half::bf16;
use looptrain_model::{DeviceMemory, DeviceNumbers, DeviceSpan};
use looptrain_proto::spec::Reduction;
use looptrain_proto::{Generation, Incarnation};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::reduce::conformance::{
    Fabric, INTEGERS, SHAPE, Shape, Values, conforms, form, ready, reduces,
};
use crate::reduce::{Bucket, Sums};

/// A result of NCCL, a call that is stuck, and work that never ends.
const SYSTEM_ERROR: i32 = 2;
const REMOTE_ERROR: i32 = 6;
const STUCK: i32 = -1;
const ENDLESS: i32 = -2;

/// A worker: its device, and what reduces over it.
struct Worker {
    memory: DeviceMemory,
    nccl: Nccl,
    /// Where its sums are.
    given: Mutex<Vec<DeviceSpan>>,
}

struct World {
    workers: Vec<Worker>,
    members: Vec<Peer>,
}

impl World {
    /// As [`Fabric::try_form`].
    async fn form_or_not(
        &self,
        generation: u64,
        there: impl Fn(usize) -> bool,
        within: Duration,
    ) -> Vec<Result<Collective, NcclError>> {
        let ring = RingId { incarnation: Incarnation(1), generation: Generation(generation) };
        let (tell, mut told) = mpsc::channel(1);
        let (mut places, mut waiting) = (Vec::new(), Vec::new());
        for rank in 0..self.workers.len() {
            let (hear, heard) = oneshot::channel();
            waiting.push((rank > 0).then_some(hear));
            places.push((rank, Rendezvous::new(Generation(generation), tell.clone(), heard)));
        }
        drop(tell);
        // What the coordinator does.
        let passed_on = async {
            let id = told.recv().await.map(|message| message.kind);
            if let Some(Some(looptrain_proto::v1::worker_message::Kind::Communicator(it))) = id {
                assert_eq!(it.generation, generation);
                for hear in waiting.into_iter().flatten() {
                    let _ = hear.send(it.id.clone());
                }
            }
        };
        let formed = places.into_iter().filter(|(rank, _)| there(*rank)).map(|(rank, place)| {
            let (nccl, members) = (&self.workers[rank].nccl, &self.members);
            async move {
                let mut place = place;
                nccl.let_go(within).await?;
                nccl.form(ring, Rank(rank as u32), members, &mut place, within).await
            }
        });
        tokio::join!(passed_on, join_all(formed)).1
    }
}

impl Fabric for World {
    type Ground = StandIn;

    const FINDS_THE_ODD_ONE: bool = true;

    fn ground() -> StandIn {
        StandIn::take()
    }

    async fn of(stand_in: &StandIn, world: usize) -> Self {
        let worker = |_| {
            let memory = DeviceMemory::emulated();
            let exchange = memory.exchange(ROOM).unwrap();
            let nccl = Nccl::new(stand_in.library(), exchange);
            Worker { memory, nccl, given: Mutex::default() }
        };
        let member = |rank: usize| Peer {
            rank: Rank(rank as u32),
            name: format!("w{rank}"),
            address: format!("127.0.0.1:{rank}"),
        };
        let workers = (0..world).map(worker).collect();
        Self { workers, members: (0..world).map(member).collect() }
    }

    async fn try_form(
        &self,
        generation: u64,
        there: impl Fn(usize) -> bool,
        within: Duration,
    ) -> Vec<Result<Collective, String>> {
        let outcomes = self.form_or_not(generation, there, within).await;
        outcomes.into_iter().map(|outcome| outcome.map_err(|error| error.to_string())).collect()
    }

    fn give(&self, rank: usize, shape: Shape) -> Vec<Bucket> {
        let Shape { elements, buckets, reduction, .. } = shape;
        let Worker { memory, given, .. } = &self.workers[rank];
        let Values { gradient, integers } = shape.of_rank(rank);
        let mut sums = Sums::beside_device(shape.arithmetic(), elements, INTEGERS, buckets);
        sums.integers_mut().copy_from_slice(&integers);
        let spans = match reduction {
            Reduction::Exact => {
                let fixed = |value: &f64| (value * 2f64.powi(40)) as i64;
                let words: Vec<i64> = gradient.iter().map(fixed).collect();
                memory.put(&words, (DeviceNumbers::Integers, elements), buckets)
            }
            Reduction::Fast => {
                let floats: Vec<f32> = gradient.iter().map(|value| *value as f32).collect();
                let numbers = (DeviceNumbers::Floats, elements);
                memory.put(&bytemuck::pod_collect_to_vec(&floats), numbers, buckets)
            }
            Reduction::FastBf16 => {
                let half = |value: &f64| bf16::from_f64(*value).to_bits();
                let halves: Vec<u16> = gradient.iter().map(half).collect();
                let numbers = (DeviceNumbers::Bf16, elements);
                memory.put(&bytemuck::pod_collect_to_vec(&halves), numbers, buckets)
            }
        };
        given.lock().unwrap().clone_from(&spans);
        let beside = memory.put(&integers, (DeviceNumbers::Integers, INTEGERS), 1).remove(0);
        let with_spans = |(number, (bucket, span)): (usize, (Bucket, DeviceSpan))| {
            let beside = (number + 1 == buckets).then(|| beside.clone());
            bucket.on_device([span].into_iter().chain(beside).collect())
        };
        sums.into_buckets().into_iter().zip(spans).enumerate().map(with_spans).collect()
    }

    fn take(&self, rank: usize, shape: Shape, sums: &Sums) -> Values {
        let Worker { memory, given, .. } = &self.workers[rank];
        let words: Vec<i64> =
            given.lock().unwrap().iter().rev().flat_map(|span| memory.words(span)).collect();
        let gradient = match shape.reduction {
            Reduction::Exact => words.iter().map(|word| *word as f64 / 2f64.powi(40)).collect(),
            Reduction::Fast => bytemuck::cast_slice::<_, f32>(&words)
                .iter()
                .map(|value| f64::from(*value))
                .collect(),
            Reduction::FastBf16 => bytemuck::cast_slice::<_, u16>(&words)
                .iter()
                .map(|bits| bf16::from_bits(*bits).to_f64())
                .collect(),
        };
        Values { gradient, integers: sums.integers().to_vec() }
    }
}

conforms!(World);

#[tokio::test(flavor = "multi_thread")]
async fn each_communicator_is_aborted_once_before_the_next_one_comes() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 3).await;
    for generation in 1..=5 {
        let mut formed = form(&world, generation).await;
        reduces(&world, &mut formed, SHAPE).await;
    }
    let last = form(&world, 6).await;
    let calls = stand_in.calls();
    assert_eq!((calls["ncclGetUniqueId"], calls["ncclCommInitRankConfig"]), (6, 18));
    assert_eq!(calls["ncclCommAbort"], 15);
    drop(last);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_stuck_is_aborted_from_outside() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 2).await;
    let mut formed = form(&world, 1).await;
    stand_in.calls();
    // The second sum of rank 0 hangs within the call.
    stand_in.fail("ncclAllReduce", 0, 2, STUCK);
    tokio::select! {
        () = reduces(&world, &mut formed, SHAPE) => panic!("rank 0 hangs"),
        calls = stand_in.until_called("ncclAllReduce", 4) => assert!(calls >= 4),
    }
    drop(formed);
    let mut again = form(&world, 2).await;
    assert_eq!(stand_in.calls()["ncclCommAbort"], 2, "each is aborted once");
    reduces(&world, &mut again, SHAPE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_come_is_told_by_what_is_missing() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 3).await;
    let short = Duration::from_secs(2);
    let formed = world.form_or_not(1, |rank| rank != 2, short).await;
    assert!(formed.iter().all(|outcome| matches!(outcome, Err(NcclError::Late { world: 3, .. }))));
    // Rank 0 is the one that does not come, and nobody passes an id on.
    let formed = world.form_or_not(2, |rank| rank != 0, short).await;
    assert!(
        formed.iter().all(|outcome| matches!(outcome, Err(NcclError::NoId { .. }))),
        "{formed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_is_named_and_leaves_nothing_behind() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 2).await;
    // While it forms.
    for (call, result) in [
        ("ncclGetUniqueId", SYSTEM_ERROR),
        ("ncclCommInitRankConfig", SYSTEM_ERROR),
        ("background", REMOTE_ERROR),
    ] {
        stand_in.calls();
        let rank = if call == "ncclGetUniqueId" { -1 } else { 0 };
        stand_in.fail(call, rank, 1, result);
        let outcome = world.form_or_not(1, |_| true, Duration::from_secs(2)).await.remove(0);
        let told = outcome.expect_err("it fails").to_string();
        let name = if call == "background" { "the background gives ncclRemoteError" } else { call };
        assert!(told.contains(name) && told.contains("told to fail"), "{told}");
    }
    // During a step: any of the sums, or something in the background.
    for (call, after, result) in [
        ("ncclAllReduce", 1, SYSTEM_ERROR),
        ("ncclAllReduce", 2, REMOTE_ERROR),
        ("ncclAllReduce", 4, REMOTE_ERROR),
        ("background", 4, REMOTE_ERROR),
    ] {
        let mut formed = form(&world, 2).await;
        stand_in.calls();
        stand_in.fail(call, 0, after, result);
        let [first, second] = formed.as_mut_slice() else { panic!() };
        let (mine, theirs) = (ready(world.give(0, SHAPE)), ready(world.give(1, SHAPE)));
        let error = tokio::select! {
            ended = first.all_reduce_as_ready(SHAPE.tag, mine, || {}) => ended.unwrap_err(),
            ended = async {
                let ended = second.all_reduce_as_ready(SHAPE.tag, theirs, || {}).await;
                // It may have all that it needs before rank 0 fails.
                assert!(ended.is_ok(), "{ended:?}");
                std::future::pending().await
            } => ended,
        };
        let told = error.to_string();
        assert!(told.contains("told to fail"), "{told}");
    }
    let mut again = form(&world, 3).await;
    reduces(&world, &mut again, SHAPE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_communicator_that_is_never_let_go_of_ends_the_worker() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 2).await;
    let formed = form(&world, 1).await;
    stand_in.fail("ncclCommAbort", 0, 1, STUCK);
    drop(formed);
    let formed = world.form_or_not(2, |_| true, Duration::from_millis(500)).await;
    let error = formed.into_iter().next().unwrap().expect_err("the device is not free");
    assert!(matches!(error, NcclError::Stuck { .. }) && error.is_fatal(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_never_ends_is_let_go_of_with_the_generation() {
    let stand_in = StandIn::take();
    let world = World::of(&stand_in, 2).await;
    let mut formed = form(&world, 1).await;
    stand_in.fail("ncclAllReduce", 0, 2, ENDLESS);
    tokio::select! {
        () = reduces(&world, &mut formed, SHAPE) => panic!("its sum never comes"),
        calls = stand_in.until_called("ncclAllReduce", 8) => assert!(calls >= 8),
    }
    drop(formed);
    let mut again = form(&world, 2).await;
    reduces(&world, &mut again, SHAPE).await;
}
