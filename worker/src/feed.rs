//! Slots of this rank, read ahead of the steps that need them.
//!
//! Asking for a slot never fails because it was not read ahead: prefetching is only ever a head
//! start. Nor does it fail because the store is away: it waits. Of the slots last asked for, those of the
//! next [`STEPS`] steps are read ahead, as far as [`BYTES`] of tokens go; what belongs to steps gone by, or
//! to other ranks now, is given up.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::try_join_all;
use looptrain_proto::Step;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::data::{Data, DataError, Slot};
use crate::waits::Waits;

/// Steps to read ahead: some seconds, even of small steps, for a read may take as long.
const STEPS: u64 = 8;

/// Bytes of tokens to hold that were read ahead, or are being read.
const BYTES: usize = 64 << 20;

/// Slots that are read at once.
const READERS: usize = 8;

/// A read in the background; given up when dropped.
#[derive(Debug)]
struct Ahead(JoinHandle<Result<Slot, DataError>>);

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The slots of a run, for one worker.
#[derive(Debug)]
pub(crate) struct Feed {
    data: Arc<Data>,
    ahead: Mutex<BTreeMap<(Step, u32), Ahead>>,
    readers: Arc<Semaphore>,
    waits: Waits,
    /// How much may be read ahead.
    bytes: usize,
}

impl Feed {
    pub(crate) fn new(data: Arc<Data>, waits: Waits) -> Self {
        Self {
            data,
            waits,
            ahead: Mutex::new(BTreeMap::new()),
            readers: Arc::new(Semaphore::new(READERS)),
            bytes: BYTES,
        }
    }

    pub(crate) fn data(&self) -> &Data {
        &self.data
    }

    fn ahead(&self) -> MutexGuard<'_, BTreeMap<(Step, u32), Ahead>> {
        // Every change of the map is one call that cannot panic half-way.
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots of a step, in order; the same slots of the next steps are then read ahead.
    pub(crate) async fn slots(
        &self,
        step: Step,
        slots: Range<u32>,
    ) -> Result<Vec<Slot>, DataError> {
        let read = try_join_all(slots.clone().map(|slot| self.slot(step, slot))).await?;
        self.look_ahead(step, slots);
        Ok(read)
    }

    fn look_ahead(&self, step: Step, slots: Range<u32>) {
        let mut ahead = self.ahead();
        ahead.retain(|(later, slot), _| *later > step && slots.contains(slot));
        let mut bytes = 0;
        for later in (step.0 + 1..=step.0 + STEPS).map(Step) {
            let Some(slot_bytes) = self.data.slot_bytes(later) else { return };
            for slot in slots.clone() {
                bytes += slot_bytes;
                if bytes > self.bytes {
                    return;
                }
                ahead.entry((later, slot)).or_insert_with(|| self.read_ahead(later, slot));
            }
        }
    }

    async fn slot(&self, step: Step, slot: u32) -> Result<Slot, DataError> {
        let mut ahead = self.ahead().remove(&(step, slot));
        let read = || {
            let ahead = ahead.take();
            async move {
                if let Some(mut ahead) = ahead {
                    // What failed in the background may pass now: the store retries, a shard may be
                    // back.
                    if let Ok(Ok(slot)) = (&mut ahead.0).await {
                        return Ok(slot);
                    }
                }
                let _reader = self.readers.acquire().await;
                self.data.slot(step, slot).await
            }
        };
        let what = format!("the tokens of step {step}");
        self.waits.until_answered(what, DataError::may_pass, read).await
    }

    fn read_ahead(&self, step: Step, slot: u32) -> Ahead {
        let (data, readers) = (Arc::clone(&self.data), Arc::clone(&self.readers));
        Ahead(tokio::spawn(async move {
            let _reader = readers.acquire().await;
            data.slot(step, slot).await
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use looptrain_storage::{Faults, Reading, Store};
    use object_store::memory::InMemory;
    use object_store::throttle::{ThrottleConfig, ThrottledStore};
    use tokio::time::Instant;

    use super::*;
    use crate::testing::{tiny_dataset, tiny_spec, tiny_store};
    use crate::waits::Lasting;

    async fn feed() -> Feed {
        let (mut spec, store) = tiny_store().await;
        Arc::make_mut(&mut spec).stages[0].steps = 20;
        let data = Data::open(spec, &store, &Reading::default()).await.unwrap();
        Feed::new(Arc::new(data), Waits::default())
    }

    fn held(feed: &Feed) -> Vec<(u64, u32)> {
        feed.ahead().keys().map(|(step, slot)| (step.0, *slot)).collect()
    }

    #[tokio::test]
    async fn reading_ahead_changes_nothing_and_stays_bounded() {
        let feed = feed().await;
        for step in (1..=20).map(Step) {
            let slots = feed.slots(step, 1..3).await.unwrap();
            for (slot, read) in (1..3).zip(slots) {
                assert_eq!(read, feed.data.slot(step, slot).await.unwrap());
                assert_eq!(read.batch.tokens.len(), 2 * 9);
                assert_eq!(read.sequences.len(), 2);
                let bytes = 4 * read.batch.tokens.len() + 16 * read.sequences.len();
                assert_eq!(feed.data.slot_bytes(step), Some(size_of::<Slot>() + bytes));
            }
            let next = step.0 + 1..=(step.0 + STEPS).min(20);
            let expected: Vec<_> = next.flat_map(|step| [(step, 1), (step, 2)]).collect();
            assert_eq!(held(&feed), expected);
        }
        // A retry of a step that was already handed out, with slots of another rank.
        assert_eq!(feed.slots(Step(4), 0..4).await.unwrap().len(), 4);
    }

    #[tokio::test]
    async fn no_more_is_read_ahead_than_there_is_room_for() {
        let mut feed = feed().await;
        feed.bytes = 5 * feed.data.slot_bytes(Step(1)).unwrap() + 1;
        feed.slots(Step(1), 0..2).await.unwrap();
        assert_eq!(held(&feed), [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]);
        feed.slots(Step(2), 0..2).await.unwrap();
        assert_eq!(held(&feed), [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]);
    }

    #[tokio::test]
    async fn what_another_rank_reads_now_is_given_up() {
        let feed = feed().await;
        feed.slots(Step(1), 0..4).await.unwrap();
        feed.slots(Step(2), 3..4).await.unwrap();
        assert!(held(&feed).iter().all(|&(step, slot)| step > 2 && slot == 3));
    }

    #[tokio::test]
    async fn past_the_last_step_there_are_no_slots() {
        let feed = feed().await;
        let error = feed.slots(Step(21), 0..1).await.unwrap_err();
        assert_eq!(error.to_string(), "the spec has no step 21");
    }

    #[tokio::test(start_paused = true)]
    async fn slots_come_when_a_store_that_was_away_is_back() {
        let (mut spec, store) = tiny_store().await;
        Arc::make_mut(&mut spec).stages[0].steps = 20;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("away");
        let store = store.with_faults(Faults::away_while(file.clone()));
        let data = Data::open(spec, &store, &Reading::default()).await.unwrap();
        let waits = Waits::default();
        let feed = Feed::new(Arc::new(data), waits.clone());
        std::fs::write(&file, "").unwrap();
        let slots = feed.slots(Step(1), 0..4);
        let outage = async {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            std::fs::remove_file(&file).unwrap();
            waits.lasting()
        };
        let (slots, told) = tokio::join!(slots, outage);
        assert_eq!(slots.unwrap().len(), 4);
        let Lasting { detail, failed } = told.unwrap();
        assert!(detail.starts_with("the tokens of step 1: cannot ") && failed, "{detail}");
        assert!(detail.contains("503"), "{detail}");
        assert_eq!(waits.lasting(), None);
        // What is wrong with the data does not pass.
        assert!(feed.slots(Step(21), 0..1).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn steps_do_not_wait_for_a_store_that_delivers_in_the_time_of_a_few_steps() {
        let slow = Arc::new(ThrottledStore::new(InMemory::new(), ThrottleConfig::default()));
        let store = Store::simulated(Arc::clone(&slow) as _, "slow://");
        tiny_dataset(&store).await;
        let mut spec = tiny_spec("slow://");
        spec.stages[0].steps = 12;
        let data = Data::open(Arc::new(spec), &store, &Reading::default()).await.unwrap();
        let feed = Feed::new(Arc::new(data), Waits::default());
        let latency = Duration::from_millis(60);
        slow.config_mut(|config| config.wait_get_per_call = latency);
        let mut waits = Vec::new();
        for step in (1..=12).map(Step) {
            let begin = Instant::now();
            feed.slots(step, 0..4).await.unwrap();
            waits.push(begin.elapsed());
            // The step is computed.
            tokio::time::sleep(latency / 2).await;
        }
        assert!(waits[0] >= latency, "nothing was there before the first: {waits:?}");
        let rest: Duration = waits[1..].iter().sum();
        assert!(rest < latency * 2, "the others found their tokens there: {waits:?}");
    }
}
