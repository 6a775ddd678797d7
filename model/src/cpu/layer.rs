//! One layer, forward and backward, over all tokens of a slot.
//!
//! Tokens are taken in blocks of some rows: a task carries a block through norms, products and
//! elementwise work while it is in the cache. Only attention looks across blocks, and the weights'
//! gradients, which are sums over all tokens. Blocks follow the shape alone, and what is summed over
//! them is summed in their order.

use rayon::prelude::*;

use super::attention;
use super::clock::{Clock, Section};
use super::gradients::{LayerGradients, Part, accumulate};
use super::rotary::Rotary;
use super::scratch::with_scratch;
use super::simd;
use super::weights::Layer;

/// Tokens per task: so many that a weight that is read for them is worth reading, so few that there
/// are some blocks for the threads to share. It follows the number of tokens alone.
pub(super) fn block_of(tokens: usize) -> usize {
    tokens.div_ceil(4).next_multiple_of(12).clamp(72, 288)
}

/// Norms of a layer.
const NORMS: usize = 4;

/// Shape of the work on a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    /// Sequences, positions and heads.
    pub(super) attention: attention::Dims,
    /// Width of the residual stream, d.
    pub(super) hidden: usize,
    /// Inner width of the SwiGLU, f.
    pub(super) inner: usize,
    /// Added to the mean square in RMSNorm.
    pub(super) eps: f32,
}

impl Dims {
    /// Tokens of the slot, N.
    pub(super) fn tokens(&self) -> usize {
        self.attention.sequences * self.attention.length
    }

    /// Tokens per task.
    pub(super) fn block(&self) -> usize {
        block_of(self.tokens())
    }

    fn blocks(&self) -> usize {
        self.tokens().div_ceil(self.block())
    }
}

/// What a layer's work needs beside its weights and tokens.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) dims: &'a Dims,
    /// Where attention begins for each token; empty: with its sequence.
    pub(super) starts: &'a [u32],
    pub(super) rotary: &'a Rotary,
    pub(super) clock: &'a Clock,
    /// What its time is counted as, attention apart.
    pub(super) section: Section,
}

impl Call<'_> {
    fn time<R>(&self, part: impl FnOnce() -> R) -> R {
        self.clock.time(self.section, part)
    }
}

/// What a layer's forward leaves for its backward.
#[derive(Default)]
pub(super) struct Saved {
    /// Rotated queries (with the softmax scale), rotated keys and values, `[N, 3 d]`.
    qkv: Vec<f32>,
    /// Outputs of the heads, `[B, H, T, head_dim]`.
    mixed: Vec<f32>,
    /// Log-sum-exp of the scores, `[B, H, T]`.
    log_sums: Vec<f32>,
    /// The attention branch before its norm, `[N, d]`.
    branch: Vec<f32>,
    /// The residual stream between the branches, `[N, d]`.
    middle: Vec<f32>,
    /// Gate and up projections beside each other, `[N, 2 f]`.
    gates: Vec<f32>,
    /// The MLP branch before its norm, `[N, d]`.
    mlp: Vec<f32>,
    /// Inverse rms of each norm, `[N, 4]`.
    inverses: Vec<f32>,
}

impl Saved {
    /// Floats per token.
    pub(super) fn width(dims: &Dims) -> usize {
        7 * dims.hidden + 2 * dims.inner + dims.attention.heads + NORMS
    }

    /// Makes room for a slot; contents are anything.
    pub(super) fn resize(&mut self, dims: &Dims) {
        let (n, d) = (dims.tokens(), dims.hidden);
        self.qkv.resize(n * 3 * d, 0.0);
        self.mixed.resize(n * d, 0.0);
        self.log_sums.resize(n * dims.attention.heads, 0.0);
        self.branch.resize(n * d, 0.0);
        self.middle.resize(n * d, 0.0);
        self.gates.resize(n * 2 * dims.inner, 0.0);
        self.mlp.resize(n * d, 0.0);
        self.inverses.resize(n * NORMS, 0.0);
    }
}

/// Room for backward, used by one layer after the other.
#[derive(Default)]
pub(super) struct Work {
    /// Gradient of the heads' outputs, `[N, d]`.
    dmixed: Vec<f32>,
    /// Gradients of queries, keys and values by head, `[B, H, 3, T, head_dim]`.
    dheads: Vec<f32>,
    /// Outputs of the SwiGLU, `[N, f]`.
    swiglu: Vec<f32>,
    /// The layer's normed input, `[N, d]`.
    normed: Vec<f32>,
    /// Outputs of the heads beside each other, `[N, d]`.
    joined: Vec<f32>,
    /// Sums of each block for the norms' gradients, `[blocks, 4, d]`.
    norms: Vec<f32>,
}

impl Work {
    /// Floats of the room for a slot.
    pub(super) fn len(dims: &Dims) -> usize {
        dims.tokens() * (6 * dims.hidden + dims.inner) + dims.blocks() * NORMS * dims.hidden
    }

    /// Makes room for a slot; contents are anything.
    pub(super) fn resize(&mut self, dims: &Dims) {
        let (n, d) = (dims.tokens(), dims.hidden);
        self.dmixed.resize(n * d, 0.0);
        self.dheads.resize(n * 3 * d, 0.0);
        self.swiglu.resize(n * dims.inner, 0.0);
        self.normed.resize(n * d, 0.0);
        self.joined.resize(n * d, 0.0);
        self.norms.resize(dims.blocks() * NORMS * d, 0.0);
    }
}

/// Puts the heads' rows of a block's tokens beside each other: `heads [B, H, T, head_dim]` ->
/// `rows [.., d]`, each `stride` elements after the other.
fn join(heads: &[f32], dims: &Dims, first: usize, rows: &mut [f32]) {
    let attention = &dims.attention;
    let (length, head_dim) = (attention.length, attention.head_dim);
    for (row, out) in rows.chunks_exact_mut(dims.hidden).enumerate() {
        let (sequence, position) = ((first + row) / length, (first + row) % length);
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let at = (sequence * attention.heads + head) * attention.head_len();
            let at = at + position * head_dim;
            out.copy_from_slice(&heads[at..at + head_dim]);
        }
    }
}

/// `x [N, d]` -> `y [N, d]`, both in rows.
pub(super) fn forward(layer: &Layer, call: &Call<'_>, x: &[f32], y: &mut [f32], saved: &mut Saved) {
    let Call { dims, starts, clock, .. } = *call;
    attention_inputs(layer, call, x, saved);
    let Saved { qkv, mixed, log_sums, .. } = saved;
    attention::forward(clock, qkv, &dims.attention, starts, mixed, log_sums);
    from_heads(layer, call, x, y, saved);
}

/// Normed input, projections to queries, keys and values, rotation.
fn attention_inputs(layer: &Layer, call: &Call<'_>, x: &[f32], saved: &mut Saved) {
    let Call { dims, rotary, .. } = *call;
    let (d, eps, size) = (dims.hidden, dims.eps, dims.block());
    (
        x.par_chunks(size * d),
        saved.qkv.par_chunks_mut(size * 3 * d),
        saved.inverses.par_chunks_mut(size * NORMS),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(block, (x, qkv, inverses))| {
            call.time(|| {
                let rows = x.len() / d;
                with_scratch([rows * d], |[normed]| {
                    for (row, normed) in normed.chunks_exact_mut(d).enumerate() {
                        let x = &x[row * d..(row + 1) * d];
                        inverses[row * NORMS] =
                            simd::rms_norm(x, &layer.input_norm, None, normed, eps);
                    }
                    layer.query.apply(rows, normed, qkv, 3 * d);
                    layer.key.apply(rows, normed, &mut qkv[d..], 3 * d);
                    layer.value.apply(rows, normed, &mut qkv[2 * d..], 3 * d);
                });
                for (row, qkv) in qkv.chunks_exact_mut(3 * d).enumerate() {
                    let (q, rest) = qkv.split_at_mut(d);
                    rotary.turn(block * size + row, q, rotary.scale());
                    rotary.turn(block * size + row, &mut rest[..d], 1.0);
                }
            })
        });
}

/// Output projection, both residual additions, the MLP.
fn from_heads(layer: &Layer, call: &Call<'_>, x: &[f32], y: &mut [f32], saved: &mut Saved) {
    let Call { dims, .. } = *call;
    let (d, f, eps, size) = (dims.hidden, dims.inner, dims.eps, dims.block());
    let Saved { mixed, branch, middle, gates, mlp, inverses, .. } = saved;
    let mixed = &*mixed;
    (
        x.par_chunks(size * d),
        branch.par_chunks_mut(size * d),
        middle.par_chunks_mut(size * d),
        gates.par_chunks_mut(size * 2 * f),
        mlp.par_chunks_mut(size * d),
        inverses.par_chunks_mut(size * NORMS),
        y.par_chunks_mut(size * d),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(block, (x, branch, middle, gates, mlp, inverses, y))| {
            call.time(|| {
                let rows = x.len() / d;
                with_scratch([rows * d, rows * f], |[scratch, swiglu]| {
                    join(mixed, dims, block * size, scratch);
                    layer.output.apply(rows, scratch, branch, d);
                    for row in 0..rows {
                        let (at, inverses) = (row * d..(row + 1) * d, &mut inverses[row * NORMS..]);
                        let (x, middle) = (&x[at.clone()], &mut middle[at.clone()]);
                        let weight = &layer.attention_norm;
                        inverses[1] =
                            simd::rms_norm(&branch[at.clone()], weight, Some(x), middle, eps);
                        let weight = &layer.mlp_norm;
                        inverses[2] = simd::rms_norm(middle, weight, None, &mut scratch[at], eps);
                    }
                    layer.gate.apply(rows, scratch, gates, 2 * f);
                    layer.up.apply(rows, scratch, &mut gates[f..], 2 * f);
                    for (gates, out) in gates.chunks_exact(2 * f).zip(swiglu.chunks_exact_mut(f)) {
                        let (gate, up) = gates.split_at(f);
                        simd::swiglu(gate, up, out);
                    }
                    layer.down.apply(rows, swiglu, mlp, d);
                    for row in 0..rows {
                        let at = row * d..(row + 1) * d;
                        let (middle, y) = (Some(&middle[at.clone()]), &mut y[at.clone()]);
                        inverses[row * NORMS + 3] =
                            simd::rms_norm(&mlp[at], &layer.output_norm, middle, y, eps);
                    }
                });
            })
        });
}

/// Turns `dy`, the gradient of the layer's output, into that of its input `x`, and adds the
/// weights' gradients. What forward saved is used up.
pub(super) fn backward(
    layer: &Layer,
    call: &Call<'_>,
    x: &[f32],
    dy: &mut [f32],
    saved: &mut Saved,
    work: &mut Work,
    gradients: &mut LayerGradients<'_>,
) {
    let Call { dims, starts, clock, .. } = *call;
    work.norms.fill(0.0);
    back_to_heads(layer, call, dy, saved, work);
    let Saved { qkv, mixed, log_sums, .. } = &*saved;
    let from_forward = attention::Saved { qkv, mixed, log_sums };
    let Work { dmixed, dheads, .. } = &mut *work;
    attention::backward(clock, from_forward, &dims.attention, starts, dmixed, dheads);
    back_to_input(layer, call, x, dy, saved, work);
    weight_gradients(call, saved, work, gradients);
}

/// From the gradient of the output to that of the heads' outputs: `mlp`, `gates` and `branch` become
/// their own gradients, `middle` the MLP's normed input, `dy` the gradient of the stream between the
/// branches.
fn back_to_heads(
    layer: &Layer,
    call: &Call<'_>,
    dy: &mut [f32],
    saved: &mut Saved,
    work: &mut Work,
) {
    let Call { dims, .. } = *call;
    let (d, f, size) = (dims.hidden, dims.inner, dims.block());
    let Saved { branch, middle, gates, mlp, inverses, .. } = saved;
    let Work { dmixed, swiglu, norms, .. } = work;
    (
        dy.par_chunks_mut(size * d),
        mlp.par_chunks_mut(size * d),
        gates.par_chunks_mut(size * 2 * f),
        swiglu.par_chunks_mut(size * f),
        middle.par_chunks_mut(size * d),
        branch.par_chunks_mut(size * d),
        dmixed.par_chunks_mut(size * d),
        inverses.par_chunks(size * NORMS),
        norms.par_chunks_mut(NORMS * d),
    )
        .into_par_iter()
        .for_each(|(dy, mlp, gates, swiglu, middle, branch, dmixed, inverses, norms)| {
            call.time(|| {
                let rows = dy.len() / d;
                let (_, norms) = norms.split_at_mut(d);
                let (attention_norm, norms) = norms.split_at_mut(d);
                let (mlp_norm, output_norm) = norms.split_at_mut(d);
                for (row, mlp) in mlp.chunks_exact_mut(d).enumerate() {
                    let (inverse, dy) = (inverses[row * NORMS + 3], &dy[row * d..(row + 1) * d]);
                    simd::rms_norm_backward(mlp, &layer.output_norm, inverse, dy, output_norm);
                }
                layer.down.apply_backward(rows, mlp, d, swiglu, false);
                for (gates, swiglu) in gates.chunks_exact_mut(2 * f).zip(swiglu.chunks_exact_mut(f))
                {
                    let (gate, up) = gates.split_at_mut(f);
                    simd::swiglu_backward(gate, up, swiglu);
                }
                with_scratch([rows * d], |[dnormed]| {
                    layer.gate.apply_backward(rows, gates, 2 * f, dnormed, false);
                    layer.up.apply_backward(rows, &gates[f..], 2 * f, dnormed, true);
                    for row in 0..rows {
                        let at = row * d..(row + 1) * d;
                        let inverses = &inverses[row * NORMS..];
                        let dy = &mut dy[at.clone()];
                        simd::rms_norm_backward_add(
                            &mut middle[at.clone()],
                            &layer.mlp_norm,
                            inverses[2],
                            &dnormed[at.clone()],
                            dy,
                            mlp_norm,
                        );
                        let weight = &layer.attention_norm;
                        let branch = &mut branch[at];
                        simd::rms_norm_backward(branch, weight, inverses[1], dy, attention_norm);
                    }
                });
                layer.output.apply_backward(rows, branch, d, dmixed, false);
            })
        });
}

/// From the gradients of the heads to that of the input: `qkv` becomes its own gradient, `dy` the
/// input's.
fn back_to_input(
    layer: &Layer,
    call: &Call<'_>,
    x: &[f32],
    dy: &mut [f32],
    saved: &mut Saved,
    work: &mut Work,
) {
    let Call { dims, rotary, .. } = *call;
    let (d, size) = (dims.hidden, dims.block());
    let Saved { qkv, mixed, inverses, .. } = saved;
    let Work { dheads, normed, joined, norms, .. } = work;
    let (dheads, mixed) = (&*dheads, &*mixed);
    (
        x.par_chunks(size * d),
        dy.par_chunks_mut(size * d),
        qkv.par_chunks_mut(size * 3 * d),
        normed.par_chunks_mut(size * d),
        joined.par_chunks_mut(size * d),
        inverses.par_chunks(size * NORMS),
        norms.par_chunks_mut(NORMS * d),
    )
        .into_par_iter()
        .enumerate()
        .for_each(|(block, (x, dy, qkv, normed, joined, inverses, norms))| {
            call.time(|| {
                let (rows, first) = (x.len() / d, block * size);
                join(mixed, dims, first, joined);
                split_gradients(dheads, dims, first, qkv);
                for (row, qkv) in qkv.chunks_exact_mut(3 * d).enumerate() {
                    let (q, rest) = qkv.split_at_mut(d);
                    rotary.turn_back(first + row, q, rotary.scale());
                    rotary.turn_back(first + row, &mut rest[..d], 1.0);
                }
                with_scratch([rows * d], |[dnormed]| {
                    layer.query.apply_backward(rows, qkv, 3 * d, dnormed, false);
                    layer.key.apply_backward(rows, &qkv[d..], 3 * d, dnormed, true);
                    layer.value.apply_backward(rows, &qkv[2 * d..], 3 * d, dnormed, true);
                    normed.copy_from_slice(x);
                    for row in 0..rows {
                        let at = row * d..(row + 1) * d;
                        simd::rms_norm_backward_add(
                            &mut normed[at.clone()],
                            &layer.input_norm,
                            inverses[row * NORMS],
                            &dnormed[at.clone()],
                            &mut dy[at],
                            &mut norms[..d],
                        );
                    }
                });
            })
        });
}

/// Adds the gradients of the layer's weights, once all that they are sums of is there.
fn weight_gradients(
    call: &Call<'_>,
    saved: &Saved,
    work: &Work,
    gradients: &mut LayerGradients<'_>,
) {
    let Call { dims, clock, .. } = *call;
    let (d, f) = (dims.hidden, dims.inner);
    let Saved { qkv, branch, middle, gates, mlp, .. } = saved;
    let Work { swiglu, normed, joined, norms, .. } = work;
    clock.time(Section::WeightGradients, || {
        for block in norms.chunks_exact(NORMS * d) {
            for (sum, part) in gradients.norms().into_iter().zip(block.chunks_exact(d)) {
                simd::add(sum, part);
            }
        }
    });
    let LayerGradients { query, key, value, output, gate, up, down, .. } = gradients;
    let part = |into, dy, stride, x, inputs| Part { into, dy, stride, x, inputs, factors: None };
    accumulate(
        (clock, Section::WeightGradients),
        dims.tokens(),
        vec![
            part(&mut **query, &qkv[..], 3 * d, &normed[..], d),
            part(&mut **key, &qkv[d..], 3 * d, &normed[..], d),
            part(&mut **value, &qkv[2 * d..], 3 * d, &normed[..], d),
            part(&mut **output, &branch[..], d, &joined[..], d),
            part(&mut **gate, &gates[..], 2 * f, &middle[..], d),
            part(&mut **up, &gates[f..], 2 * f, &middle[..], d),
            part(&mut **down, &mlp[..], d, &swiglu[..], f),
        ],
    );
}

/// Puts the gradients of a block's queries, keys and values beside each other:
/// `dheads [B, H, 3, T, head_dim]` -> `rows [.., 3 d]`.
fn split_gradients(dheads: &[f32], dims: &Dims, first: usize, rows: &mut [f32]) {
    let attention = &dims.attention;
    let (length, head_dim, d) = (attention.length, attention.head_dim, dims.hidden);
    for (row, out) in rows.chunks_exact_mut(3 * d).enumerate() {
        let (sequence, position) = ((first + row) / length, (first + row) % length);
        for head in 0..attention.heads {
            for which in 0..3 {
                let at = ((sequence * attention.heads + head) * 3 + which) * attention.head_len()
                    + position * head_dim;
                let to = which * d + head * head_dim;
                out[to..to + head_dim].copy_from_slice(&dheads[at..at + head_dim]);
            }
        }
    }
}
