//! LoopLM: the model, its loss, its gradients and its optimizer.
//!
//! [`Trainer`] is what a worker drives: slots of tokens in, flat gradients out, updates in place, on the
//! CPU ([`Engine`]) or on a GPU.
//! Everything here is a function of weights, tokens and settings; nothing knows of networks or stores.
//! How long parts of the work take is measured, and nothing depends on it.

mod batch;
pub mod composite;
mod cpu;
mod cuda;
mod device;
mod engine;
mod evaluation;
mod exit;
mod generate;
mod layout;
mod numerics;
mod optimizer;
mod state;
mod trainer;

pub use batch::{SlotBatch, document_starts};
pub use cpu::{CacheSharing, KernelLevel};
#[cfg(any(test, feature = "emulator"))]
pub use cuda::DeviceMemory;
pub use cuda::{DeviceError, DeviceNumbers, DeviceSpan, DeviceSums, Exchange};
#[cfg(feature = "cuda")]
pub use cuda::{GpuFacts, gpu_facts, gpu_libraries, gpu_uuid, nccl};
pub use device::{Device, Gpu};
pub use engine::{Engine, Recompute, SlotOutput, StageSettings, TokenMeasures};
pub use evaluation::{DepthReport, DepthSums, Quality};
pub use exit::{
    ExitLoss, SlotStatistics, exit_loop, exit_shares, log_exit_pdf, stage_one, stage_two,
};
pub use generate::{Decoder, Exit, Generated, Next, Sampling, generate};
pub use layout::{Layout, TensorEntry};
pub use numerics::numerics;
pub use state::TrainState;
pub use trainer::{MemoryNeed, SummedSlot, Trainer, slot_bytes};
