//! The feed by itself, without anybody who computes.

use std::sync::Arc;

use looptrain_proto::{Spec, Step};
use looptrain_storage::{ReadCounts, Reading, ReadingOptions, Store};

use crate::WorkerError;
use crate::data::{Data, DataError};
use crate::feed::Feed;
use crate::waits::Waits;

/// The feed of one worker that has all slots.
pub struct Feeding {
    spec: Arc<Spec>,
    feed: Feed,
    reading: Reading,
}

/// What a step was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fed {
    /// Sequences.
    pub sequences: u64,
    /// Sum of all their tokens.
    pub sum: u64,
}

impl Feeding {
    /// Opens the datasets of the spec, which are in its store.
    ///
    /// # Errors
    /// As for a worker.
    pub async fn open(spec: Spec, options: ReadingOptions) -> Result<Self, WorkerError> {
        let spec = Arc::new(spec);
        let store = Store::open(&spec.run.store)?;
        let reading = Reading::new(options);
        let data = Data::open(Arc::clone(&spec), &store, &reading).await?;
        Ok(Self { feed: Feed::new(Arc::new(data), Waits::default()), spec, reading })
    }

    /// Takes all slots of a step.
    ///
    /// # Errors
    /// When the spec has no such step, or data cannot be read.
    pub async fn step(&self, step: Step) -> Result<Fed, DataError> {
        let slots = self.spec.position(step).ok_or(DataError::NoSuchStep(step))?.slots;
        let mut fed = Fed { sequences: 0, sum: 0 };
        for slot in self.feed.slots(step, 0..slots).await? {
            fed.sequences += slot.sequences.len() as u64;
            fed.sum += slot.batch.tokens.iter().copied().map(u64::from).sum::<u64>();
        }
        Ok(fed)
    }

    /// Where blocks have come from.
    #[must_use]
    pub fn counts(&self) -> ReadCounts {
        self.reading.counts()
    }
}
