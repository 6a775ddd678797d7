//! A slot's gradient: one flat buffer in layout order, cut into the tensors' places.

use rayon::prelude::*;

use super::product::{Left, Right, Shape, product};
use crate::Layout;

/// Rows of a weight's gradient per task.
const STRIP: usize = 192;

/// Places of one layer's gradients.
pub(super) struct LayerGradients<'a> {
    input_norm: &'a mut [f32],
    pub(super) query: &'a mut [f32],
    pub(super) key: &'a mut [f32],
    pub(super) value: &'a mut [f32],
    pub(super) output: &'a mut [f32],
    attention_norm: &'a mut [f32],
    mlp_norm: &'a mut [f32],
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a mut [f32],
    pub(super) down: &'a mut [f32],
    output_norm: &'a mut [f32],
}

impl LayerGradients<'_> {
    /// Those of the norms, in the order in which a token meets them.
    pub(super) fn norms(&mut self) -> [&mut [f32]; 4] {
        [self.input_norm, self.attention_norm, self.mlp_norm, self.output_norm]
    }
}

/// Places of all gradients.
pub(super) struct Gradients<'a> {
    pub(super) embedding: &'a mut [f32],
    pub(super) layers: Vec<LayerGradients<'a>>,
    pub(super) norm: &'a mut [f32],
    pub(super) exit_weight: &'a mut [f32],
    pub(super) exit_bias: &'a mut [f32],
    pub(super) head: &'a mut [f32],
}

impl<'a> Gradients<'a> {
    /// Cuts a flat buffer of as many elements as the layout has.
    pub(super) fn new(layout: &Layout, layers: usize, flat: &'a mut [f32]) -> Self {
        let mut rest = flat;
        let mut lengths = layout.tensors().iter().map(|tensor| tensor.len);
        let mut next = || {
            let len = lengths.next().expect("the layout has all tensors of the model");
            let (place, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            place
        };
        Self {
            embedding: next(),
            layers: (0..layers)
                .map(|_| LayerGradients {
                    input_norm: next(),
                    query: next(),
                    key: next(),
                    value: next(),
                    output: next(),
                    attention_norm: next(),
                    mlp_norm: next(),
                    gate: next(),
                    up: next(),
                    down: next(),
                    output_norm: next(),
                })
                .collect(),
            norm: next(),
            exit_weight: next(),
            exit_bias: next(),
            head: next(),
        }
    }
}

/// One weight's part in a sum over tokens.
pub(super) struct Part<'a> {
    /// The weight's gradient, `[out, in]`.
    pub(super) into: &'a mut [f32],
    /// Gradients of its outputs, rows of at least `out`.
    pub(super) dy: &'a [f32],
    /// From row to row of `dy`.
    pub(super) stride: usize,
    /// Its inputs, `[tokens, in]`.
    pub(super) x: &'a [f32],
    /// Its width, in.
    pub(super) inputs: usize,
}

/// Adds `dy^T x` over `tokens` tokens to each weight's gradient.
pub(super) fn accumulate(tokens: usize, parts: Vec<Part<'_>>) {
    let mut strips = Vec::new();
    for Part { into, dy, stride, x, inputs } in parts {
        for (strip, into) in into.chunks_mut(STRIP * inputs).enumerate() {
            strips.push((into, Left::columns(&dy[strip * STRIP..], stride), x, inputs));
        }
    }
    strips.into_par_iter().for_each(|(into, dy, x, inputs)| {
        let shape = Shape { m: into.len() / inputs, n: inputs, k: tokens };
        product(shape, into, inputs, true, dy, Right::Rows(x, inputs));
    });
}
