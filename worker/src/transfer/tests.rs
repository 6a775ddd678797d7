//! Fetching from sources that behave, and from some that do not.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use looptrain_model::TrainState;
use looptrain_proto::transport::{Connection, Credentials, Role};
use looptrain_proto::v1::Prepared;
use looptrain_proto::{Digest, Rank, Step};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::shelf::Goods;
use super::wire::{Part, Reply, Request, send_digests, send_votes};
use super::*;
use crate::Moments;
use crate::memory::Memory;
use crate::reduce::tcp::{Peer, PeerListener, Peers};
use crate::testing::{authority, credentials};

/// Three chunks a buffer, the last one short.
const LENGTH: usize = 2 * CHUNK + 7;
const SOON: Duration = Duration::from_millis(200);

fn state(step: u64) -> TrainState {
    let buffer = |seed: usize| (0..LENGTH).map(|index| (index * seed % 8191) as f32).collect();
    TrainState {
        step: Step(step),
        weights: buffer(3),
        first_moment: buffer(5),
        second_moment: buffer(7),
    }
}

/// A cluster of sources and one joiner.
#[derive(Default)]
struct Cluster {
    /// With them, all speak TLS.
    credentials: Option<Arc<Credentials>>,
    sources: Vec<Peer>,
    listening: Vec<Peers>,
    serving: JoinSet<()>,
}

impl Cluster {
    async fn listen(&mut self) -> tokio::sync::mpsc::Receiver<Connection> {
        let listener = PeerListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let listener = listener.secured(self.credentials.clone());
        let rank = Rank(self.sources.len() as u32);
        let address = listener.address().to_string();
        self.sources.push(Peer { rank, name: format!("w{}", rank.0), address });
        let (peers, joiners) = listener.serve(Digest::of(b"run"));
        self.listening.push(peers);
        joiners
    }

    async fn honest(&mut self, state: TrainState) -> Shelf {
        self.telling(state, Memory::default()).await
    }

    /// The same, of one that remembers how it came to have what it has.
    async fn telling(&mut self, state: TrainState, memory: Memory) -> Shelf {
        let shelf = Shelf::default();
        shelf.put(state);
        let joiners = self.listen().await;
        self.serving.spawn(serve(joiners, shelf.clone(), memory, Moments::default()));
        shelf
    }

    /// A source of a small state; how many chunks of it have been sent.
    async fn counting(&mut self, buffer: Vec<f32>) -> Arc<AtomicU32> {
        let (shelf, sent) = (Shelf::default(), Arc::<AtomicU32>::default());
        let (weights, first_moment) = (buffer.clone(), buffer.clone());
        shelf.put(TrainState { step: Step(5), weights, first_moment, second_moment: buffer });
        let counts = Arc::clone(&sent);
        let moments = Moments::watched_by(move |_| {
            counts.fetch_add(1, Ordering::SeqCst);
        });
        let joiners = self.listen().await;
        self.serving.spawn(serve(joiners, shelf, Memory::default(), moments));
        sent
    }

    /// A source of the right digests that does as it likes with chunks.
    async fn odd(&mut self, state: &TrainState, damages: bool) {
        let buffers =
            vec![state.weights.clone(), state.first_moment.clone(), state.second_moment.clone()];
        let goods = Goods::new(buffers);
        let mut joiners = self.listen().await;
        self.serving.spawn(async move {
            while let Some(mut joiner) = joiners.recv().await {
                while let Ok(request) = Request::receive(&mut joiner).await {
                    match request.part {
                        Part::Digests => send_digests(&mut joiner, goods.digests()).await.unwrap(),
                        Part::Votes => send_votes(&mut joiner, Vec::new()).await.unwrap(),
                        Part::Chunk(index) if damages => {
                            let mut chunk = goods.chunk(index).unwrap().to_vec();
                            chunk[17] ^= 1;
                            let reply = Reply::Here { bytes: chunk.len() as u64 };
                            reply.send(&mut joiner).await.unwrap();
                            // The joiner may hang up.
                            let _ = joiner.write_all(&chunk).await;
                        }
                        Part::Chunk(_) => break,
                    }
                }
            }
        });
    }

    /// A source of the right digests that says nothing else.
    async fn mute(&mut self, state: &TrainState) {
        let state = state.clone();
        let goods = Goods::new(vec![state.weights, state.first_moment, state.second_moment]);
        let mut joiners = self.listen().await;
        self.serving.spawn(async move {
            while let Some(mut joiner) = joiners.recv().await {
                while let Ok(Request { item: Item::State(_), part: Part::Digests }) =
                    Request::receive(&mut joiner).await
                {
                    send_digests(&mut joiner, goods.digests()).await.unwrap();
                }
            }
        });
    }

    async fn fetch(&mut self, item: Item) -> Result<Option<Fetched>, FetchError> {
        let mut sources = self.sources.clone();
        let _own = self.listen().await;
        let own = self.listening.last().unwrap();
        let lengths = match item {
            Item::State(_) => vec![LENGTH; 3],
            Item::Update(_) => vec![LENGTH],
        };
        let fetched = fetch(own, &mut sources, item, &lengths, SOON).await;
        self.sources = sources;
        fetched
    }
}

/// What comes of it, and how many hundredths of a second that took; a machine that stands still
/// counts none.
async fn counted<T>(work: impl Future<Output = T>) -> (T, u32) {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut work, mut count) = (std::pin::pin!(work), 0);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return (done, count),
            _ = ticks.tick() => count += 1,
        }
    }
}

fn assert_whole(fetched: Option<Fetched>, expected: TrainState) {
    let expected = [expected.weights, expected.first_moment, expected.second_moment];
    assert!(fetched.unwrap().buffers == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn within_tls_a_state_arrives_as_it_was() {
    let credentials = Some(credentials(&authority(), Role::Worker));
    let mut cluster = Cluster { credentials, ..Cluster::default() };
    for _ in 0..2 {
        cluster.honest(state(5)).await;
    }
    assert_whole(cluster.fetch(Item::State(Step(5))).await.unwrap(), state(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_and_the_updates_after_it_come_from_all_peers_together() {
    let mut cluster = Cluster::default();
    for _ in 0..3 {
        let shelf = cluster.honest(state(5)).await;
        shelf.add(Step(6), vec![0.25; LENGTH]);
    }
    assert_whole(cluster.fetch(Item::State(Step(5))).await.unwrap(), state(5));
    let update = cluster.fetch(Item::Update(Step(6))).await.unwrap().unwrap();
    assert!(update.buffers == [vec![0.25; LENGTH]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_what_is_fetched_come_the_votes_on_it_from_a_peer_that_tells_them() {
    let memory = Memory::default();
    for step in 3..=7 {
        memory.remember_vote(Prepared { step, ..Prepared::default() });
    }
    let mut cluster = Cluster::default();
    // It hangs up when it is asked for votes.
    cluster.mute(&state(5)).await;
    cluster.telling(state(5), memory).await.add(Step(6), vec![0.25; LENGTH]);
    let steps =
        |fetched: &Fetched| -> Vec<u64> { fetched.votes.iter().map(|vote| vote.step).collect() };
    let fetched = cluster.fetch(Item::State(Step(5))).await.unwrap().unwrap();
    assert_eq!(steps(&fetched), [3, 4, 5]);
    assert_whole(Some(fetched), state(5));
    let fetched = cluster.fetch(Item::Update(Step(6))).await.unwrap().unwrap();
    assert_eq!(steps(&fetched), [6]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_peers_as_there_are_chunks_send_one_each_however_quick_they_are() {
    let mut cluster = Cluster::default();
    let mut sent = Vec::new();
    for _ in 0..3 {
        sent.push(cluster.counting(vec![1.0; 7]).await);
    }
    let _own = cluster.listen().await;
    let (own, sources) = (cluster.listening.last().unwrap(), cluster.sources[..3].to_vec());
    for round in 1..=200 {
        let mut sources = sources.clone();
        fetch(own, &mut sources, Item::State(Step(5)), &[7; 3], SOON).await.unwrap().unwrap();
        // The moment comes just behind the chunk.
        while sent.iter().map(|sent| sent.load(Ordering::SeqCst)).sum::<u32>() < 3 * round {
            tokio::task::yield_now().await;
        }
        assert!(sent.iter().all(|sent| sent.load(Ordering::SeqCst) == round), "{sent:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_still_come_is_no_error_and_what_is_gone_is() {
    let mut cluster = Cluster::default();
    cluster.honest(state(5)).await;
    assert!(cluster.fetch(Item::Update(Step(6))).await.unwrap().is_none());
    let error = cluster.fetch(Item::State(Step(4))).await.unwrap_err().to_string();
    assert!(error.contains("state of step 4") && error.contains("(w0 at"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_whose_chunks_are_damaged_or_that_dies_leaves_them_to_the_others() {
    for damages in [true, false] {
        let mut cluster = Cluster::default();
        cluster.odd(&state(5), damages).await;
        cluster.honest(state(5)).await;
        assert_whole(cluster.fetch(Item::State(Step(5))).await.unwrap(), state(5));

        let mut alone = Cluster::default();
        alone.odd(&state(5), damages).await;
        let error = alone.fetch(Item::State(Step(5))).await.unwrap_err().to_string();
        assert!(error.starts_with("9 chunks of the state of step 5 are missing"), "{error}");
        assert_eq!(error.contains("a chunk is damaged"), damages, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_contradicts_the_others_is_left_out_and_two_that_disagree_give_nothing() {
    let mut wrong = state(5);
    // In a moment: the weights' digests that the coordinator compares would not show it.
    wrong.second_moment[LENGTH - 1] += 1.0;
    let mut cluster = Cluster::default();
    cluster.honest(wrong.clone()).await;
    cluster.honest(state(5)).await;
    let error = cluster.fetch(Item::State(Step(5))).await.unwrap_err().to_string();
    assert!(error.contains("disagree") && error.contains("w0") && error.contains("w1"), "{error}");

    let mut cluster = Cluster::default();
    cluster.honest(wrong).await;
    cluster.honest(state(5)).await;
    cluster.honest(state(5)).await;
    assert_whole(cluster.fetch(Item::State(Step(5))).await.unwrap(), state(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_are_not_there_are_named() {
    let mut cluster = Cluster::default();
    cluster.honest(state(5)).await;
    cluster.honest(state(5)).await;
    cluster.listening.remove(0);
    let (fetched, ticks) = counted(cluster.fetch(Item::State(Step(5)))).await;
    assert_whole(fetched.unwrap(), state(5));
    assert!(ticks < 300, "a refused connection is not tried again, for five seconds");
    assert_eq!(cluster.sources.len(), 1, "it is not asked for the next item");
    cluster.listening.clear();
    let error = cluster.fetch(Item::State(Step(5))).await.unwrap_err().to_string();
    assert!(error.contains("no peer has the state") && error.contains("(w1 at"), "{error}");
}
