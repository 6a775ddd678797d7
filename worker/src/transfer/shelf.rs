//! What a member offers to joiners.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use looptrain_model::TrainState;
use looptrain_proto::{Digest, Step};

use super::CHUNK;
use super::wire::Item;

/// Bytes of gradients that are kept for joiners in any case; beyond, as much as four times the
/// state.
const KEPT_BYTES: usize = 512 << 20;

/// Updates that are kept for joiners that hold a state and follow: they lag by a step or two. As many as
/// fit into so many bytes, but some.
const KEPT_FOR_FOLLOWERS: usize = 8;
const BYTES_FOR_FOLLOWERS: usize = 4 << 30;
const FEWEST_FOR_FOLLOWERS: usize = 3;

/// Threads that hash what is offered: a joiner waits for it, and more would take too much from the
/// training.
const HASHERS: usize = 4;

/// The state of one step, and the gradients of the newest commits; empty most of the time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shelf(Arc<Mutex<Option<Offer>>>);

#[derive(Debug)]
struct Offer {
    /// The newest state that was offered, and the state while joiners may fetch it.
    step: Step,
    state: Option<Arc<Goods>>,
    /// Without a gap; of all steps after `step` while the state is here.
    updates: BTreeMap<Step, Arc<Goods>>,
    /// Bytes that `updates` may take.
    room: usize,
}

impl Offer {
    fn newest(&self) -> Step {
        self.updates.keys().next_back().copied().unwrap_or(self.step)
    }

    /// Without the state, the newest updates are all that is of use.
    fn shrink(&mut self) {
        if self.state.is_none() {
            keep_newest(&mut self.updates, BYTES_FOR_FOLLOWERS);
        }
    }

    fn bytes(&self) -> usize {
        bytes(&self.updates)
    }
}

fn bytes(updates: &BTreeMap<Step, Arc<Goods>>) -> usize {
    updates.values().map(|goods| goods.bytes()).sum()
}

/// Leaves what followers need.
fn keep_newest(updates: &mut BTreeMap<Step, Arc<Goods>>, room: usize) {
    let too_many = |updates: &BTreeMap<_, _>| {
        updates.len() > KEPT_FOR_FOLLOWERS
            || (updates.len() > FEWEST_FOR_FOLLOWERS && bytes(updates) > room)
    };
    while too_many(updates) {
        updates.pop_first();
    }
}

/// Why an item is not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// It may come.
    NotYet,
    /// It will not.
    Gone,
}

impl Shelf {
    fn offer(&self) -> MutexGuard<'_, Option<Offer>> {
        // Every change is one call that cannot panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a state in place of an older one. Updates that lead to it stay, for joiners that hold
    /// an older one and follow.
    pub(crate) fn put(&self, state: TrainState) {
        let TrainState { step, weights, first_moment, second_moment } = state;
        let room = KEPT_BYTES.max(4 * 3 * size_of_val(weights.as_slice()));
        let state = Some(Arc::new(Goods::new(vec![weights, first_moment, second_moment])));
        let mut offer = self.offer();
        let before = offer.take().filter(|open| open.newest() == step);
        let mut updates = before.map(|open| open.updates).unwrap_or_default();
        keep_newest(&mut updates, BYTES_FOR_FOLLOWERS);
        *offer = Some(Offer { step, state, updates, room });
    }

    /// Nobody fetches the state any more; who holds one follows the updates.
    pub(crate) fn keep_updates(&self) {
        if let Some(open) = self.offer().as_mut() {
            open.state = None;
            open.shrink();
        }
    }

    /// Whether updates are of use to anybody.
    pub(crate) fn is_open(&self) -> bool {
        self.offer().is_some()
    }

    /// Adds the gradient that led to `step`, if a state before it is offered.
    pub(crate) fn add(&self, step: Step, gradient: Vec<f32>) {
        let mut offer = self.offer();
        let Some(open) = offer.as_mut() else { return };
        let newest = open.newest();
        if step == newest.next() {
            open.updates.insert(step, Arc::new(Goods::new(vec![gradient])));
            if open.state.is_some() && open.bytes() > open.room {
                tracing::warn!(%step, "a joiner fetches too slowly; the state is offered no longer");
                open.state = None;
            }
            open.shrink();
        } else {
            // With a gap the rest is of no use.
            tracing::warn!(%step, %newest, "the offered state has no way to this step");
            *offer = None;
        }
    }

    /// Offers nothing any more.
    pub(crate) fn clear(&self) {
        *self.offer() = None;
    }

    pub(super) fn find(&self, item: Item) -> Result<Arc<Goods>, Lack> {
        match (item, self.offer().as_ref()) {
            // The coordinator's word may not have reached this worker yet.
            (Item::State(_), None) => Err(Lack::NotYet),
            (Item::State(step), Some(open)) => match step.cmp(&open.step) {
                Ordering::Less => Err(Lack::Gone),
                Ordering::Equal => open.state.clone().ok_or(Lack::Gone),
                Ordering::Greater => Err(Lack::NotYet),
            },
            (Item::Update(step), Some(open)) => match open.updates.get(&step) {
                Some(update) => Ok(Arc::clone(update)),
                None if step > open.newest() => Err(Lack::NotYet),
                None => Err(Lack::Gone),
            },
            // Who asks for it fetched a state that was offered then.
            (Item::Update(_), None) => Err(Lack::Gone),
        }
    }
}

/// Buffers that may be fetched, cut into chunks that do not cross from one buffer to the next.
#[derive(Debug)]
pub(super) struct Goods {
    buffers: Vec<Vec<f32>>,
    digests: OnceLock<Vec<Digest>>,
}

impl Goods {
    pub(super) fn new(buffers: Vec<Vec<f32>>) -> Self {
        Self { buffers, digests: OnceLock::new() }
    }

    fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        self.buffers.iter().flat_map(|buffer| buffer.chunks(CHUNK).map(bytemuck::cast_slice))
    }

    fn bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| size_of_val(buffer.as_slice())).sum()
    }

    pub(super) fn chunk(&self, index: u32) -> Option<&[u8]> {
        self.chunks().nth(index as usize)
    }

    /// One digest a chunk. The first call hashes everything, on some threads, and blocks.
    pub(super) fn digests(&self) -> &[Digest] {
        self.digests.get_or_init(|| {
            let chunks: Vec<&[u8]> = self.chunks().collect();
            let threads = thread::available_parallelism().map_or(1, usize::from).min(HASHERS);
            let share = chunks.len().div_ceil(threads).max(1);
            let hash = |chunks: &[&[u8]]| -> Vec<Digest> {
                chunks.iter().map(|chunk| Digest::of(chunk)).collect()
            };
            thread::scope(|scope| {
                let shares: Vec<_> =
                    chunks.chunks(share).map(|share| scope.spawn(move || hash(share))).collect();
                let joined = shares.into_iter().map(|share| share.join());
                joined.flat_map(|digests| digests.expect("hashing does not panic")).collect()
            })
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn state(step: u64) -> TrainState {
        let buffer = |value: f32| vec![value; 3];
        TrainState {
            step: Step(step),
            weights: buffer(1.0),
            first_moment: buffer(2.0),
            second_moment: buffer(3.0),
        }
    }

    #[test]
    fn a_shelf_tells_what_may_come_from_what_is_gone() {
        let shelf = Shelf::default();
        assert_eq!(shelf.find(Item::State(Step(5))).err(), Some(Lack::NotYet));
        shelf.put(state(5));
        shelf.add(Step(6), vec![0.5; 3]);
        assert_eq!(shelf.find(Item::State(Step(5))).unwrap().digests().len(), 3);
        assert_eq!(shelf.find(Item::Update(Step(6))).unwrap().digests().len(), 1);
        assert_eq!(shelf.find(Item::Update(Step(7))).err(), Some(Lack::NotYet));
        assert_eq!(shelf.find(Item::Update(Step(5))).err(), Some(Lack::Gone));
        assert_eq!(shelf.find(Item::State(Step(4))).err(), Some(Lack::Gone));
        assert_eq!(shelf.find(Item::State(Step(6))).err(), Some(Lack::NotYet));
        shelf.clear();
        assert_eq!(shelf.find(Item::State(Step(5))).err(), Some(Lack::NotYet));
        assert_eq!(shelf.find(Item::Update(Step(7))).err(), Some(Lack::Gone));
    }

    #[test]
    fn a_state_whose_updates_take_too_much_memory_is_withdrawn() {
        let shelf = Shelf::default();
        shelf.put(state(5));
        shelf.offer().as_mut().unwrap().room = 12 * KEPT_FOR_FOLLOWERS;
        let last = 6 + KEPT_FOR_FOLLOWERS as u64;
        for step in 6..last {
            shelf.add(Step(step), vec![0.5; 3]);
        }
        assert!(shelf.find(Item::State(Step(5))).is_ok());
        shelf.add(Step(last), vec![0.5; 3]);
        assert_eq!(shelf.find(Item::State(Step(5))).err(), Some(Lack::Gone));
        assert_eq!(shelf.find(Item::Update(Step(6))).err(), Some(Lack::Gone));
        assert!(shelf.find(Item::Update(Step(7))).is_ok());
    }

    #[test]
    fn followers_of_a_large_model_find_some_updates() {
        let update = |step| (Step(step), Arc::new(Goods::new(vec![vec![0.5_f32; 3]])));
        let left = |room| {
            let mut updates: BTreeMap<_, _> = (1..=20).map(update).collect();
            keep_newest(&mut updates, room);
            updates.keys().map(|step| step.0).collect::<Vec<_>>()
        };
        assert_eq!(left(usize::MAX), (13..=20).collect::<Vec<_>>());
        assert_eq!(left(5 * 12), (16..=20).collect::<Vec<_>>());
        assert_eq!(left(0), [18, 19, 20]);
    }

    #[test]
    fn followers_find_the_newest_updates_also_after_another_state_was_offered() {
        let shelf = Shelf::default();
        shelf.put(state(5));
        shelf.keep_updates();
        assert_eq!(shelf.find(Item::State(Step(5))).err(), Some(Lack::Gone));
        for step in 6..30 {
            shelf.add(Step(step), vec![0.5; 3]);
            assert!(shelf.find(Item::Update(Step(step))).is_ok());
            assert_eq!(shelf.find(Item::Update(Step(step + 1))).err(), Some(Lack::NotYet));
        }
        assert_eq!(shelf.find(Item::Update(Step(21))).err(), Some(Lack::Gone));
        shelf.put(state(29));
        assert!(shelf.find(Item::State(Step(29))).is_ok());
        assert!(shelf.find(Item::Update(Step(29))).is_ok());
        shelf.put(state(40));
        assert_eq!(shelf.find(Item::Update(Step(29))).err(), Some(Lack::Gone));
    }

    #[test]
    fn an_offer_with_a_gap_is_withdrawn() {
        let shelf = Shelf::default();
        shelf.add(Step(6), vec![0.5; 3]);
        shelf.put(state(5));
        shelf.add(Step(7), vec![0.5; 3]);
        assert_eq!(shelf.find(Item::State(Step(5))).err(), Some(Lack::NotYet));
    }
}
