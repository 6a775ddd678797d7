//! Entrances for measurements: parts of a worker, run by themselves with the code that workers run.
//!
//! Nothing of a worker knows of this module.

mod bare;
mod feeding;
mod saves;
mod transfer;

pub use bare::{BareError, BareStep, FixedSteps, bare_steps, fixed_steps};
pub use feeding::{Fed, Feeding};
pub use saves::{Save, Saves};
pub use transfer::{TransferError, Transfers};
