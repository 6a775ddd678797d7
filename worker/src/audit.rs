//! What this rank has used for a step, written to the store before the rank votes for it: see
//! `looptrain_storage::write_audit`.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use looptrain_proto::{Digest, Rank, Spec, Step};
use looptrain_storage::{Attempt, Error, SlotUse, Store, write_audit};

use crate::data::Slot;
use crate::reduce::tcp::RingId;
use crate::waits::Waits;

/// Pause before the store is asked again for what it refuses.
const PAUSE: Duration = Duration::from_secs(1);

/// Writes the audit of an audited run.
#[derive(Debug)]
pub(crate) struct Audit {
    store: Store,
    run: String,
    waits: Waits,
    /// The ring that was formed last, and this worker's place in it.
    place: Mutex<(RingId, Rank)>,
}

impl Audit {
    /// `None` when the spec asks for none.
    pub(crate) fn new(spec: &Spec, store: &Store, waits: Waits) -> Option<Self> {
        spec.run.audit.then(|| Self {
            store: store.clone(),
            waits,
            run: spec.run.name.clone(),
            place: Mutex::default(),
        })
    }

    /// From now on this worker is `rank` in `ring`.
    pub(crate) fn take_place(&self, ring: RingId, rank: Rank) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = (ring, rank);
    }

    /// Returns when the store has what was used. While it does not take it, the step waits: a step
    /// that is committed without its audit cannot be audited any more.
    pub(crate) async fn write(&self, step: Step, slots: &[SlotUse]) {
        let (ring, rank) = *self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let RingId { incarnation, generation } = ring;
        let attempt = Attempt { step, incarnation, generation, rank };
        let what = || format!("the audit of step {step}");
        let write = || write_audit(&self.store, &self.run, attempt, slots);
        while let Err(error) = self.waits.until_answered(what(), Error::may_pass, write).await {
            tracing::warn!(%step, %error, "the audit of the step waits for the store");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// What is told of a slot that is about to be computed.
pub(crate) fn use_of(spec: &Spec, number: u32, slot: &Slot) -> SlotUse {
    let bytes: Vec<u8> = slot.batch.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let name =
        |&(dataset, sequence): &(usize, u64)| (spec.datasets[dataset].name.clone(), sequence);
    SlotUse {
        slot: number,
        sequences: slot.sequences.iter().map(name).collect(),
        tokens: Digest::of(&bytes),
    }
}
