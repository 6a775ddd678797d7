//! Why a worker ends without having finished.

use looptrain_model::DeviceError;
use looptrain_proto::SpecError;

use crate::data::DataError;
use crate::reduce::PeerError;

/// Why [`crate::run`] ends early; one line that names the place and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The coordinator's address is no URL.
    #[error("`{url}` is no coordinator's address for this worker: {reason}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The device where it computes cannot be used, or has failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nobody answers there.
    #[error("no coordinator answers at {url} after {seconds:.0} s: {reason}; is it running?")]
    Connect {
        /// As given.
        url: String,
        /// How long it was tried.
        seconds: f64,
        /// The last failure.
        reason: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
        /// The reason may pass.
        for_now: bool,
    },
    /// The session broke.
    #[error("lost the coordinator at {url}: {reason}")]
    Broken {
        /// As given.
        url: String,
        /// What happened to the stream.
        reason: String,
    },
    /// The coordinator was lost, and none came in time.
    #[error("{reason}; {saved}")]
    Orphaned {
        /// Why the last attempt to join failed.
        reason: String,
        /// What became of the state.
        saved: String,
    },
    /// The run goes on without this worker, for a fault that it has not noticed itself.
    #[error("the coordinator sent this worker away: {reason}")]
    SentAway {
        /// Its reason.
        reason: String,
    },
    /// The coordinator that came back has another run.
    #[error(
        "the coordinator at {url} has another run now, or began this one anew; start this worker anew"
    )]
    OtherRun {
        /// As given.
        url: String,
    },
    /// The peers of this worker could not reach it.
    #[error(
        "peers on other machines cannot reach {address}; start the worker with --peer-listen 0.0.0.0:0, or an \
         address that they can reach"
    )]
    PeerAddress {
        /// Where this worker listens.
        address: std::net::SocketAddr,
    },
    /// The coordinator sent what makes no sense.
    #[error("the coordinator at {url} {what}; worker and coordinator must be of one build")]
    Protocol {
        /// As given.
        url: String,
        /// What it did.
        what: String,
    },
    /// The coordinator's spec is not valid here.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The data the spec asks for is not there.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] looptrain_storage::Error),
    /// The peer port cannot be had.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// NCCL cannot be used any more by this process.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Nccl(crate::reduce::NcclError),
    /// The compute thread is gone.
    #[error("the compute thread ended unexpectedly; its panic message is above")]
    Compute,
    /// The coordinator ended this worker after a failure that the worker had reported.
    #[error("{detail} (the coordinator then ended this worker: {reason})")]
    Dropped {
        /// What this worker reported.
        detail: String,
        /// What the coordinator answered.
        reason: String,
    },
}

impl WorkerError {
    /// Whether another attempt to join may go better.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Broken { .. }
                | Self::Connect { .. }
                | Self::Protocol { .. }
                | Self::Refused { for_now: true, .. }
        )
    }
}
