//! The shared language of looptrain: the wire protocol, the run spec, and small value types.
//!
//! This crate depends on nothing else of the project; every other crate speaks it.

mod bytes;
mod form;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod ids;
pub mod metrics;
pub mod spec;
pub mod transport;
mod trend;

pub use form::Members;
pub use ids::{Cursor, Digest, Generation, Incarnation, NoDigest, Rank, Step, WorkerId};
pub use spec::{Spec, SpecError};
pub use trend::Bounds;

/// Messages and services, generated from `proto/looptrain/v1/looptrain.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    pub use crate::form::Form;

    tonic::include_proto!("looptrain.v1");
}

/// Version of the wire protocol; a worker and a coordinator must have the same.
pub const PROTOCOL_VERSION: u32 = 13;

/// Slots per step whose fixed-point gradients can be added up without overflow.
pub const MAX_SLOTS: u32 = 1 << 16;

/// Evaluation sums travel as integers in multiples of 2^-EVALUATION_FRACTION_BITS.
pub const EVALUATION_FRACTION_BITS: u32 = 32;
