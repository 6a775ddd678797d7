//! Slots of this rank, read ahead of the steps that need them.
//!
//! Asking for a slot never fails because it was not read ahead: prefetching is only ever a head
//! start. At most [`DEPTH`] steps of the slots last asked for are held, and what belongs to steps
//! gone by is given up.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::try_join_all;
use looptrain_model::SlotBatch;
use looptrain_proto::Step;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::data::{Data, DataError};

/// Steps to read ahead.
const DEPTH: u64 = 2;

/// Slots that are read at once.
const READERS: usize = 8;

/// A read in the background; given up when dropped.
#[derive(Debug)]
struct Ahead(JoinHandle<Result<SlotBatch, DataError>>);

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
}

impl Feed {
    pub(crate) fn new(data: Arc<Data>) -> Self {
        Self {
            data,
            ahead: Mutex::new(BTreeMap::new()),
            readers: Arc::new(Semaphore::new(READERS)),
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
    ) -> Result<Vec<SlotBatch>, DataError> {
        let batches = try_join_all(slots.clone().map(|slot| self.slot(step, slot))).await?;
        let mut ahead = self.ahead();
        ahead.retain(|(old, _), _| *old > step);
        for later in (step.0 + 1..=step.0 + DEPTH).map(Step) {
            for slot in slots.clone() {
                ahead.entry((later, slot)).or_insert_with(|| self.read_ahead(later, slot));
            }
        }
        Ok(batches)
    }

    async fn slot(&self, step: Step, slot: u32) -> Result<SlotBatch, DataError> {
        let ahead = self.ahead().remove(&(step, slot));
        if let Some(mut ahead) = ahead {
            // What failed in the background may pass now: the store retries, a shard may be back.
            if let Ok(Ok(batch)) = (&mut ahead.0).await {
                return Ok(batch);
            }
        }
        let _reader = self.readers.acquire().await;
        self.data.slot(step, slot).await
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
    use super::*;
    use crate::testing::tiny_store;

    #[tokio::test]
    async fn reading_ahead_changes_nothing_and_stays_bounded() {
        let (spec, store) = tiny_store().await;
        let data = Arc::new(Data::open(spec, &store).await.unwrap());
        let feed = Feed::new(Arc::clone(&data));
        for step in (1..=4).map(Step) {
            let slots = feed.slots(step, 1..3).await.unwrap();
            for (slot, batch) in (1..3).zip(slots) {
                assert_eq!(batch, data.slot(step, slot).await.unwrap());
                assert_eq!(batch.tokens.len(), 2 * 9);
            }
            let ahead: Vec<_> = feed.ahead().keys().copied().collect();
            assert_eq!(ahead.len(), 4, "{ahead:?}");
            assert!(ahead.iter().all(|(later, slot)| *later > step && (1..3).contains(slot)));
        }
        // A retry of a step that was already handed out, with slots of another rank.
        assert_eq!(feed.slots(Step(4), 0..4).await.unwrap().len(), 4);
    }

    #[tokio::test]
    async fn past_the_last_step_there_are_no_slots() {
        let (spec, store) = tiny_store().await;
        let feed = Feed::new(Arc::new(Data::open(spec, &store).await.unwrap()));
        let error = feed.slots(Step(5), 0..1).await.unwrap_err();
        assert_eq!(error.to_string(), "the spec has no step 5");
    }
}
