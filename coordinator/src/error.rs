//! Why a coordinator cannot start or a run has failed: one line each, with the place and the
//! remedy.

use std::net::SocketAddr;

use looptrain_proto::{Digest, Incarnation, Step};

/// What a coordinator can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoordinatorError {
    /// An address cannot be listened on.
    #[error(
        "cannot listen for {what} on {address}: {error}; stop the process that holds the address \
         or choose another port (0 takes any free one)"
    )]
    Listen {
        /// For whom: `workers` or `the dashboard`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The store refuses to work.
    #[error(transparent)]
    Store(#[from] looptrain_storage::Error),
    /// The store has a run of this name that trains something else.
    #[error(
        "run `{run}` in {store} was started with another spec: {differences}; put that back, use \
         --fresh to start over, or give the new one another run.name (`looptrain branch` writes a spec \
         that goes on from a checkpoint of this run by other settings)"
    )]
    OtherSpec {
        /// The run.
        run: String,
        /// Its store.
        store: String,
        /// The keys that differ, or the trajectory digests where that cannot be told.
        differences: String,
    },
    /// There is nothing that the spec's `[branch]` names.
    #[error("branch.{key}: {reason}")]
    Branch {
        /// The key at fault.
        key: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The run of this name trains on other data.
    #[error("run `{run}` in {store}: {reason}")]
    OtherData {
        /// The run.
        run: String,
        /// Its store.
        store: String,
        /// Which dataset, and what to do.
        reason: String,
    },
    /// A checkpoint below the run's prefix belongs to another spec.
    #[error(
        "the checkpoint of step {step} of run `{run}` in {store} is of another model or data \
         order (trajectory {found}, expected {expected}): use --fresh to start over, or another \
         run.name"
    )]
    OtherCheckpoint {
        /// The run.
        run: String,
        /// Its store.
        store: String,
        /// Step of the checkpoint.
        step: Step,
        /// Trajectory digest in its manifest.
        found: Digest,
        /// Trajectory digest of the spec at hand.
        expected: Digest,
    },
    /// Another coordinator has taken the run over.
    #[error(
        "another coordinator (incarnation {by}) has taken over run `{run}`; this one has stopped \
         and left it alone"
    )]
    Fenced {
        /// The run.
        run: String,
        /// The other one.
        by: Incarnation,
    },
    /// The run has failed.
    #[error("{reason}")]
    Failed {
        /// What went wrong, for a person.
        reason: String,
    },
    /// The server stopped by itself.
    #[error("the coordinator's server on {address} stopped: {detail}")]
    Server {
        /// Where it listened.
        address: SocketAddr,
        /// What it said.
        detail: String,
    },
}

impl CoordinatorError {
    /// Fencing is an outcome of its own, whichever store call noticed it.
    pub(crate) fn of_store(error: looptrain_storage::Error) -> Self {
        match error {
            looptrain_storage::Error::Fenced { run, by } => Self::Fenced { run, by },
            other => Self::Store(other),
        }
    }
}
