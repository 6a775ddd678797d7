//! The model on a GPU: CUDA kernels and matrix products, forward and backward.
//!
//! - [`driver`]: what is needed of a device; [`device`]: the real one, through CUDA's driver and cuBLASLt,
//!   which are looked for when a device is asked for and not before, as is NVRTC.
//! - [`kernels`]: the kernels' source and what they are compiled for; [`compiler`]: their machine code.
//! - [`memory`]: what lies where; [`slot`]: a slot from tokens to gradient, as a queue of kernels.
//! - [`engine`]: the training state on the device; [`exchange`]: its sums, for a collective.
//!
//! Matrices and activations are bf16; weights, moments, the residual stream, norms, softmax, losses and
//! all sums are f32 or wider. No two blocks add floats to the same place (what they share are sums of
//! integers and minima), so the bits do not depend on their order.

#[cfg(feature = "cuda")]
mod compiler;
#[cfg(feature = "cuda")]
mod device;
mod driver;
#[cfg(any(test, feature = "emulator"))]
mod emulator;
mod engine;
mod exchange;
mod kernels;
#[cfg(feature = "cuda")]
mod libraries;
mod memory;
mod slot;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub use device::{GpuFacts, gpu_facts, gpu_uuid};
pub use driver::DeviceError;
pub(crate) use engine::CudaEngine;
pub use engine::DeviceSums;
#[cfg(any(test, feature = "emulator"))]
pub use exchange::DeviceMemory;
pub use exchange::{DeviceNumbers, DeviceSpan, Exchange};
#[cfg(feature = "cuda")]
pub use libraries::{gpu_libraries, nccl};
