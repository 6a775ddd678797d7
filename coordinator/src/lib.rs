//! The coordinator of a run: who takes part, what they compute, what is committed.
//!
//! [`start`] claims the run in its store, binds its addresses and leaves everything to background
//! tasks; [`Running`] is the handle on them. Decisions are made in `core`, a pure state machine;
//! around it are the gRPC service (`server`), the task that executes decisions (`runtime`), the
//! durable notes (`keeper`, `journal`), and the dashboard.
//!
//! What is durable when: a step is durable when a checkpoint at or behind it exists, and a
//! checkpoint exists once its manifest does. The run record names the newest one for people; on
//! a start, the checkpoints themselves are asked.

mod board;
mod branch;
mod claim;
mod core;
mod dashboard;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod history;
pub mod http;
mod journal;
mod keeper;
mod ledger;
mod listen;
mod lookout;
mod metrics;
mod moment;
mod pruner;
mod records;
mod reports;
mod runtime;
mod server;
mod start;
#[cfg(test)]
mod testing;
mod trace;

pub use branch::find_branch;
pub use dashboard::RenderMetrics;
pub use error::CoordinatorError;
pub use journal::read_chronicle_json;
pub use ledger::Category;
pub use listen::Listen;
pub use moment::{Moment, OnMoment};
pub use records::{
    EvaluationRecord, LossCause, Outcome, RunEvent, Section, SectionSeconds, StepRecord,
};
pub use start::{Running, Settings, Started, start, start_on};
