//! What a directive may end in besides success, and how it is told to the coordinator.

use looptrain_proto::v1::{Failed, failed::Cause};
use looptrain_proto::{Generation, Step};

use crate::WorkerError;
use crate::compute::ComputeError;
use crate::data::DataError;
#[cfg(feature = "cuda")]
use crate::reduce::NcclError;
use crate::reduce::PeerError;
use crate::state::StateError;

/// Why a directive was not carried out.
#[derive(Debug)]
pub enum Failure {
    /// Told to the coordinator, which decides what happens.
    Told(Cause, String),
    /// This worker holds the state of a step from which there is no way to the members'.
    Behind(Step, String),
    /// This worker cannot go on.
    Fatal(WorkerError),
    /// A newer directive has taken its place.
    Abandoned,
}

impl Failure {
    /// A directive that makes no sense.
    pub(super) fn senseless(detail: impl Into<String>) -> Self {
        Self::Told(Cause::Internal, detail.into())
    }
}

pub(super) fn failed(
    generation: Generation,
    step: Step,
    cause: Cause,
    detail: impl Into<String>,
) -> Failed {
    let (generation, step) = (generation.0, step.0);
    Failed { generation, step, cause: cause.into(), detail: detail.into() }
}

impl From<WorkerError> for Failure {
    fn from(error: WorkerError) -> Self {
        Self::Fatal(error)
    }
}

#[cfg(feature = "cuda")]
impl From<NcclError> for Failure {
    fn from(error: NcclError) -> Self {
        match error.is_fatal() {
            true => Self::Fatal(WorkerError::Nccl(error)),
            false => Self::Told(Cause::Peer, error.to_string()),
        }
    }
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        #[cfg(feature = "cuda")]
        let error = match error {
            PeerError::Nccl(error) => return (*error).into(),
            error => error,
        };
        Self::Told(Cause::Peer, error.to_string())
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Told(Cause::Store, error.to_string())
    }
}

impl From<looptrain_storage::Error> for Failure {
    fn from(error: looptrain_storage::Error) -> Self {
        Self::Told(Cause::Store, error.to_string())
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::Told(Cause::Store, error.to_string())
    }
}

impl From<ComputeError> for Failure {
    fn from(error: ComputeError) -> Self {
        match error {
            ComputeError::Cancelled => Self::Abandoned,
            ComputeError::Device(error) => Self::Fatal(error.into()),
            ComputeError::NotFinite { .. } => Self::Told(Cause::NonFinite, error.to_string()),
            ComputeError::WrongStep { .. } | ComputeError::Shape { .. } => {
                Self::Told(Cause::Internal, error.to_string())
            }
        }
    }
}
