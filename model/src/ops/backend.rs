//! What a device supplies: plain forward and backward kernels ([`Kernels`]), and the operators
//! built from them ([`FusedOps`]), which Burn dispatches and which carry gradients.
//!
//! A new device implements `Kernels` and the forward half of `FusedOps`; the backward half in
//! `autodiff.rs` is written once for all of them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Flex, backend_extension};

/// Inputs of causal attention. `q`, `k`, `v`: `[B, T, heads * head_dim]` before rotation; `cos` and
/// `sin`: `[T, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct AttentionInputs<B: Backend> {
    /// Queries.
    pub q: FloatTensor<B>,
    /// Keys.
    pub k: FloatTensor<B>,
    /// Values.
    pub v: FloatTensor<B>,
    /// Cosines of the rotary angles.
    pub cos: FloatTensor<B>,
    /// Sines of the rotary angles.
    pub sin: FloatTensor<B>,
}

/// Outputs of causal attention that backward needs again.
#[derive(Clone, Debug)]
pub struct AttentionOutputs<B: Backend> {
    /// `[B, T, heads * head_dim]`.
    pub out: FloatTensor<B>,
    /// Log-sum-exp of each query's scaled scores, `[B * heads * T]`.
    pub log_sums: FloatTensor<B>,
}

/// Forward and backward kernels of one device, called with its own tensors in hand.
#[allow(missing_docs)] // each is described at the operator of the same name
pub trait Kernels: Backend {
    fn embedding_forward(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;
    fn embedding_backward_weight(
        rows: usize,
        ids: IntTensor<Self>,
        dout: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    fn linear_backward_input(
        dout: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    fn linear_backward_weight(dout: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Returns the result and the inverse root mean square of each row.
    fn rms_norm_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: Option<FloatTensor<Self>>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        dout: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dout: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn attention_forward(inputs: AttentionInputs<Self>, heads: usize) -> AttentionOutputs<Self>;
    fn attention_backward(
        inputs: AttentionInputs<Self>,
        outputs: AttentionOutputs<Self>,
        heads: usize,
        dout: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3];
    /// Returns the loss and the log-sum-exp of the logits of each token.
    fn cross_entropy_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn cross_entropy_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sums: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// The operators as Burn dispatches them; see the functions of the same names in the parent module
/// for shapes and formulas.
#[backend_extension(Flex, Autodiff)]
#[allow(missing_docs)]
pub trait FusedOps: Backend {
    fn fused_embedding(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;
    fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;
    fn fused_rms_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;
    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
    ) -> FloatTensor<Self>;
    fn fused_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// Without autodiff there is only the forward half.
impl FusedOps for Flex {
    fn fused_embedding(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        <Self as Kernels>::embedding_forward(weight, ids)
    }

    fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        <Self as Kernels>::linear_forward(x, weight)
    }

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        <Self as Kernels>::rms_norm_forward(x, weight, None, eps).0
    }

    fn fused_rms_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        <Self as Kernels>::rms_norm_forward(x, weight, Some(residual), eps).0
    }

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        <Self as Kernels>::swiglu_forward(gate, up)
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
    ) -> FloatTensor<Self> {
        <Self as Kernels>::attention_forward(AttentionInputs { q, k, v, cos, sin }, heads).out
    }

    fn fused_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        <Self as Kernels>::cross_entropy_forward(x, weight, targets).0
    }
}
