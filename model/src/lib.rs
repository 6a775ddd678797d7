//! LoopLM on Burn: the model, its loss, its gradients and its optimizer.
//!
//! [`Engine`] is what a worker drives: slots of tokens in, flat gradients out, updates in place.
//! Everything here is a pure function of weights, tokens and settings; nothing knows of networks,
//! stores or clocks.

pub mod composite;
mod engine;
mod exit;
mod generate;
mod layout;
mod loop_lm;
mod numerics;
pub mod ops;
mod optimizer;
mod state;

pub use engine::{Engine, Recompute, SlotBatch, SlotOutput, StageSettings};
pub use exit::{SlotStatistics, StageOne, log_exit_pdf, stage_one};
pub use generate::{Sampling, generate};
pub use layout::{Layout, TensorEntry};
pub use loop_lm::{Layer, LoopLm, LoopOutput, Rotary};
pub use numerics::numerics;
pub use state::TrainState;
