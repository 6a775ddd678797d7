//! What the core wants done. The runtime executes actions in order and decides nothing.

use looptrain_proto::v1::Trend;
use looptrain_proto::v1::coordinator_message::Kind;
use looptrain_proto::{Cursor, Digest, Generation, Step, WorkerId};

use super::event::SavedPart;
use crate::records::{Outcome, RunEvent, StepRecord};

/// A directive to a worker.
pub(crate) type Directive = Kind;

/// One thing to do.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Queue a message on a session.
    Send { worker: WorkerId, message: Directive },
    /// End a session once its queue is empty. Harmless when it is gone already.
    Close { worker: WorkerId },
    /// Tell everybody who watches, and make the durable notes that go with the event.
    Publish(RunEvent),
    /// Write down, for later starts of the run, how its workers compute.
    PinNumerics { numerics: String },
    /// Write down, for later starts of the run, that it is paused, and why, or that it goes on.
    KeepPause(Option<String>),
    /// The first generation is about to form, or the one before is lost with its state: the log
    /// ends after step `from`; of those steps, these are not in it yet.
    GoOn { from: Step, lost: Vec<StepRecord> },
    /// End the open segment of the metrics here: a resume can start behind this step.
    SealMetrics,
    /// All parts are in the store: write the manifest that makes them a checkpoint.
    WriteManifest(ManifestDraft),
    /// See whether the store has a good checkpoint of a later step than this:
    /// [`super::Event::CheckpointFound`] tells.
    FindCheckpoint { behind: Step },
    /// See whether the store answers this process: [`super::Event::StoreSeen`] tells.
    LookAtStore,
    /// The run is over; nothing follows.
    End(Result<Outcome, String>),
    /// Why the run is in its phase; only when that changed.
    Explain(String),
    /// A message was not acted on, and why.
    Ignored { worker: WorkerId, reason: String },
}

/// All the core knows of a checkpoint's manifest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ManifestDraft {
    pub(crate) step: Step,
    pub(crate) cursor: Cursor,
    pub(crate) generation: Generation,
    pub(crate) weights_digest: Digest,
    /// In part order.
    pub(crate) parts: Vec<SavedPart>,
    pub(crate) trend: Option<Trend>,
}
