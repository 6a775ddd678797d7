//! A slot's gradient: one flat buffer in layout order, cut into the tensors' places.

use rayon::prelude::*;

use super::clock::{Clock, Section};
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

/// The places of all gradients in a flat buffer.
pub(super) struct Gradients<'a> {
    layout: &'a Layout,
    layers: usize,
    flat: &'a mut [f32],
}

/// Tensors of a layer.
const OF_A_LAYER: usize = 11;

impl<'a> Gradients<'a> {
    /// Those in a flat buffer of as many elements as the layout has.
    pub(super) fn new(layout: &'a Layout, layers: usize, flat: &'a mut [f32]) -> Self {
        assert_eq!(flat.len(), layout.parameters(), "a gradient of all has the layout's elements");
        Self { layout, layers, flat }
    }

    /// All elements, in layout order.
    pub(super) fn flat(&self) -> &[f32] {
        self.flat
    }

    pub(super) fn embedding(&mut self) -> &mut [f32] {
        let [embedding] = self.places(0);
        embedding
    }

    pub(super) fn layer(&mut self, layer: usize) -> LayerGradients<'_> {
        let mut places = self.places::<OF_A_LAYER>(1 + layer * OF_A_LAYER).into_iter();
        let mut next = || places.next().expect("a layer has all its tensors");
        LayerGradients {
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
        }
    }

    /// That of the final norm.
    pub(super) fn norm(&mut self) -> &mut [f32] {
        let [norm] = self.places(self.after_layers());
        norm
    }

    /// Those of the exit gate's weight and bias.
    pub(super) fn exit_gate(&mut self) -> [&mut [f32]; 2] {
        self.places(self.after_layers() + 1)
    }

    pub(super) fn head(&mut self) -> &mut [f32] {
        let [head] = self.places(self.after_layers() + 3);
        head
    }

    /// The first element of a layer.
    pub(super) fn start_of_layer(&self, layer: usize) -> usize {
        self.layout.tensors()[1 + layer * OF_A_LAYER].offset
    }

    /// The first element of the exit gate, which the head follows.
    pub(super) fn start_of_exit_gate(&self) -> usize {
        self.layout.tensors()[self.after_layers() + 1].offset
    }

    fn after_layers(&self) -> usize {
        1 + self.layers * OF_A_LAYER
    }

    /// The places of `N` tensors, which follow each other, from the layout's tensor `first`.
    fn places<const N: usize>(&mut self, first: usize) -> [&mut [f32]; N] {
        let tensors = &self.layout.tensors()[first..first + N];
        let mut rest = &mut self.flat[tensors[0].offset..];
        std::array::from_fn(|tensor| {
            let (place, after) = std::mem::take(&mut rest).split_at_mut(tensors[tensor].len);
            rest = after;
            place
        })
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
    /// What each token's gradients are still to be multiplied by.
    pub(super) factors: Option<&'a [f32]>,
}

/// Adds `dy^T x` over `tokens` tokens to each weight's gradient; the time counts as that section.
pub(super) fn accumulate((clock, section): (&Clock, Section), tokens: usize, parts: Vec<Part<'_>>) {
    let mut strips = Vec::new();
    for Part { into, dy, stride, x, inputs, factors } in parts {
        for (strip, into) in into.chunks_mut(STRIP * inputs).enumerate() {
            let dy = &dy[strip * STRIP..];
            let dy = match factors {
                Some(factors) => Left::scaled_columns(dy, stride, factors),
                None => Left::columns(dy, stride),
            };
            strips.push((into, dy, x, inputs));
        }
    }
    strips.into_par_iter().for_each(|(into, dy, x, inputs)| {
        let shape = Shape { m: into.len() / inputs, n: inputs, k: tokens };
        clock.time(section, || product(shape, into, inputs, true, dy, Right::Rows(x, inputs)));
    });
}
