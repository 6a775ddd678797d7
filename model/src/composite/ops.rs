//! The parts of the model in plain Burn operations.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Bool, Int, Tensor, TensorData};

/// Rows of `weight [V, d]` at `ids [N]` -> `[N, d]`.
pub(crate) fn embedding(weight: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    weight.select(0, ids)
}

/// `x [N, in]` times the transpose of `weight [out, in]` -> `[N, out]`.
pub(crate) fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// `x / sqrt(mean(x^2) + eps) * weight` over rows: `x [N, d]`, `weight [d]` -> `[N, d]`.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let rms = (x.clone().square().mean_dim(1) + eps).sqrt();
    x / rms * weight.unsqueeze()
}

/// `residual + rms_norm(x, weight)`: all `[N, d]`.
pub(crate) fn rms_norm_add(
    x: Tensor<2>,
    weight: Tensor<1>,
    residual: Tensor<2>,
    eps: f32,
) -> Tensor<2> {
    residual + rms_norm(x, weight, eps)
}

/// `silu(gate) * up`, elementwise on `[N, f]`.
pub(crate) fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    silu(gate) * up
}

fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let turned = a.clone() * cos.clone() - b.clone() * sin.clone();
    Tensor::cat(vec![turned, b * cos + a * sin], 3)
}

/// Causal attention of rotated queries and keys, scaled by `head_dim^-0.5`: `q`, `k`, `v` and the
/// result `[B, T, heads * head_dim]`; `cos`, `sin` `[T, head_dim / 2]`, halves rotated (the
/// convention of the Llama family): `(a, b) -> (a cos - b sin, b cos + a sin)`. A query sees what is not
/// after it nor before its start, by `starts [B * T]`, or empty.
pub(crate) fn attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    cos: Tensor<2>,
    sin: Tensor<2>,
    starts: &[u32],
    heads: usize,
) -> Tensor<3> {
    let [batch, length, width] = q.dims();
    let head_dim = width / heads;
    let split = |x: Tensor<3>| x.reshape([batch, length, heads, head_dim]).swap_dims(1, 2);
    let (cos, sin) = (cos.unsqueeze::<4>(), sin.unsqueeze::<4>());
    let q = rotate(split(q), cos.clone(), sin.clone());
    let k = rotate(split(k), cos, sin);
    let is_masked = |at: usize| {
        let (token, query, key) = (at / length, at / length % length, at % length);
        key > query || starts.get(token).is_some_and(|&start| key < start as usize)
    };
    let masked: Vec<bool> = (0..batch * length * length).map(is_masked).collect();
    let masked = TensorData::new(masked, [batch, 1, length, length]);
    let mask =
        Tensor::<4, Bool>::from_data(masked, &v.device()).expand([batch, heads, length, length]);
    let scores = q.matmul(k.swap_dims(2, 3)) / (head_dim as f32).sqrt();
    let weights = softmax(scores.mask_fill(mask, f32::NEG_INFINITY), 3);
    weights.matmul(split(v)).swap_dims(1, 2).reshape([batch, length, width])
}

/// Cross-entropy of each token under the softmax of `x weight^T`: `x [N, d]`, `weight [V, d]`,
/// `targets [N]` below V -> `[N]`, in nats.
pub(crate) fn cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let log_probabilities = log_softmax(linear(x, weight), 1);
    log_probabilities.gather(1, targets.unsqueeze_dim(1)).squeeze_dim::<1>(1).neg()
}
