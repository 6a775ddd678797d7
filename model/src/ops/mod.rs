//! Fused operators with hand-written gradients, as functions on Burn tensors.
//!
//! Each has its formula written out in plain Burn operations in `composite.rs`, which the tests
//! compare with, forward and backward.

mod autodiff;
mod backend;
#[cfg(test)]
mod composite;
mod cpu;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};

pub use backend::{AttentionInputs, AttentionOutputs, FusedOps, Kernels};
pub use cpu::{KernelLevel, is_threaded};

/// Rows of `weight [V, d]` at `ids [N]` -> `[N, d]`.
#[must_use]
pub fn embedding(weight: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    let out = Dispatch::fused_embedding(weight.into_dispatch(), ids.into_dispatch());
    Tensor::from_dispatch(out)
}

/// `x [N, in]` times the transpose of `weight [out, in]` -> `[N, out]`.
#[must_use]
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::fused_linear(x.into_dispatch(), weight.into_dispatch()))
}

/// `x / sqrt(mean(x^2) + eps) * weight` over rows: `x [N, d]`, `weight [d]` -> `[N, d]`.
#[must_use]
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let out = Dispatch::fused_rms_norm(x.into_dispatch(), weight.into_dispatch(), eps);
    Tensor::from_dispatch(out)
}

/// `residual + rms_norm(x, weight)`: all `[N, d]`.
#[must_use]
pub fn rms_norm_add(x: Tensor<2>, weight: Tensor<1>, residual: Tensor<2>, eps: f32) -> Tensor<2> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_rms_norm_add(x, weight, residual.into_dispatch(), eps))
}

/// `silu(gate) * up`, elementwise on `[N, f]`.
#[must_use]
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::fused_swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// Causal attention of rotated queries and keys, scaled by `head_dim^-0.5`: `q`, `k`, `v` and the
/// result `[B, T, heads * head_dim]`; `cos`, `sin` `[T, head_dim / 2]`, halves rotated (the
/// convention of the Llama family): `(a, b) -> (a cos - b sin, b cos + a sin)`.
#[must_use]
pub fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    heads: usize,
) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::fused_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        heads,
    ))
}

/// Cross-entropy of each token under the softmax of `x weight^T`: `x [N, d]`, `weight [V, d]`,
/// `targets [N]` below V -> `[N]`, in nats. The logits are never held as a whole.
#[must_use]
pub fn cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_cross_entropy(x, weight, targets.into_dispatch()))
}

#[cfg(test)]
mod tests;
