//! What the core hears: everything that can happen to a run, already checked for form at the rim.

use std::time::Duration;

use looptrain_proto::{Digest, Generation, Step, WorkerId, v1};

use super::Left;
use crate::records::LossCause;

/// One thing that happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A new session introduced itself.
    Joined { worker: WorkerId, join: v1::Join },
    /// A message on a session.
    Report { worker: WorkerId, report: Report },
    /// Sessions are over, all at once as far as anybody can tell.
    Lost(Vec<Loss>),
    /// Time has passed; sent several times per worker time-out.
    Tick,
    /// An operator wants the run to stop at the next step boundary.
    StopRequested { reason: String },
    /// An operator wants a worker to leave.
    DrainRequested { worker: WorkerId, reason: String },
    /// An operator wants the run to hold at the next step boundary.
    PauseRequested { reason: String },
    /// An operator wants a paused run to go on.
    ResumeRequested,
    /// An operator wants a checkpoint at the next step boundary.
    SaveRequested,
    /// The newest good checkpoint in the store that nobody has told of, if there is one; or what the store
    /// said instead.
    CheckpointFound(Result<Option<Box<Left>>, String>),
    /// The manifest of this step's checkpoint is in the store.
    CheckpointWritten { step: Step },
    /// The manifest of this step's checkpoint could not be written.
    CheckpointRefused { step: Step, reason: String },
    /// Whether the store answers this process, and what it says if not.
    StoreSeen(Result<(), String>),
}

/// What a worker that has joined can say.
#[derive(Clone, Debug)]
pub(crate) enum Report {
    Heartbeat,
    Ready {
        generation: Generation,
        step: Step,
        weights_digest: Digest,
    },
    Prepared {
        generation: Generation,
        step: Step,
        digest: Digest,
        statistics: Box<v1::StepStatistics>,
        sections: v1::Sections,
        computed_slots: u32,
        detail: String,
    },
    Evaluated {
        generation: Generation,
        step: Step,
        sums: Vec<i64>,
        tokens: u64,
    },
    PartSaved {
        step: Step,
        part: usize,
        parts: usize,
        result: Result<SavedPart, String>,
    },
    Failed {
        generation: Generation,
        step: Step,
        cause: v1::failed::Cause,
        detail: String,
    },
    /// What rank 0 of a generation that reduces over NCCL passes on to the others.
    Communicator {
        generation: Generation,
        id: Vec<u8>,
    },
    /// It has waited for the store for a while, and goes on waiting.
    Waiting {
        generation: Generation,
        detail: String,
        failed: bool,
    },
    Fetched {
        step: Step,
        result: Result<(), String>,
    },
    /// It was told to leave, and does when it may.
    Leaving {
        reason: String,
    },
    Leave {
        reason: String,
    },
}

/// A worker whose session is over.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    pub(crate) worker: WorkerId,
    pub(crate) cause: LossCause,
    pub(crate) reason: String,
}

impl Loss {
    /// Without a farewell.
    pub(crate) fn broken(worker: WorkerId, reason: impl Into<String>) -> Self {
        Self { worker, cause: LossCause::Died, reason: reason.into() }
    }

    /// With one.
    pub(crate) fn left(worker: WorkerId, reason: &str) -> Self {
        let reason =
            if reason.is_empty() { "it left".into() } else { format!("it left: {reason}") };
        Self { worker, cause: LossCause::Left, reason }
    }
}

impl Report {
    /// Whether it answers what the members of a generation are asked to do. Heartbeats come from a
    /// worker that is stuck, too, and uploads go on beside everything.
    pub(crate) fn is_an_answer(&self) -> bool {
        match self {
            Self::Heartbeat
            | Self::Waiting { .. }
            | Self::PartSaved { .. }
            | Self::Communicator { .. }
            | Self::Leaving { .. } => false,
            Self::Ready { .. }
            | Self::Prepared { .. }
            | Self::Evaluated { .. }
            | Self::Failed { .. }
            | Self::Fetched { .. }
            | Self::Leave { .. } => true,
        }
    }
}

/// One part of a checkpoint, as its writer describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedPart {
    /// File name below the checkpoint's prefix.
    pub(crate) file: String,
    pub(crate) bytes: u64,
    pub(crate) digest: Digest,
    pub(crate) tensors: u64,
    /// Digest of the whole weights, of which this is a part.
    pub(crate) weights_digest: Digest,
    /// How long its writer stood still to copy the state.
    pub(crate) stall: Duration,
}
