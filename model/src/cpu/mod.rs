//! The model on the CPU: hand-written kernels on slices, forward and backward.
//!
//! - [`product`]: matrix products; [`simd`]: kernels on rows; both for every [`KernelLevel`].
//! - [`attention`], [`layer`], [`head`]: the parts of the model with their gradients.
//! - [`weights`]: the weights in the form that products read, made once per step; [`gradients`]: the
//!   places of their gradients in one flat buffer.
//! - [`slot`]: a slot from tokens to gradient, with what is kept and what is computed again;
//!   [`decode`]: new tokens behind those in a cache.
//!
//! Bits depend on the shape and on fused multiply-add alone: work is cut into pieces by fixed sizes,
//! partial sums are added in the order of the pieces, and no two threads add to the same float.
//! The formulas in plain Burn operations are in [`composite`](crate::composite), which the tests
//! compare with.

mod attention;
mod clock;
mod decode;
mod gradients;
mod head;
mod layer;
mod level;
mod product;
mod rotary;
mod scratch;
pub(crate) mod simd;
mod slot;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use clock::{Clock, Section};
pub use decode::CacheSharing;
pub(crate) use decode::{Cache, Decoded};
pub use level::KernelLevel;
pub(crate) use rotary::Rotary;
pub(crate) use slot::{Shape, Task, Workspace};
pub(crate) use weights::Weights;
