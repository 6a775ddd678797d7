//! Global-norm clipping and AdamW in one pass over the flat buffers.

use looptrain_proto::spec;
use rayon::prelude::*;

use crate::cpu::simd::{self, AdamW};
use crate::{Layout, TrainState};

/// Elements per task and per partial sum: fixed, so that the norm's sum keeps its shape.
const CHUNK: usize = 1 << 14;

/// Euclidean norm in double precision, summed chunk by chunk.
#[must_use]
pub(crate) fn global_norm(gradient: &[f32]) -> f64 {
    let partial: Vec<f64> = gradient.par_chunks(CHUNK).map(simd::sum_of_squares).collect();
    partial.iter().sum::<f64>().sqrt()
}

/// One update in place: clip by global norm, then decoupled weight decay and Adam with bias
/// correction (Loshchilov and Hutter, arXiv 1711.05101). Advances `state.step` and returns the
/// norm before clipping.
///
/// # Panics
/// If the buffers and the layout differ in length.
pub(crate) fn update(
    layout: &Layout,
    state: &mut TrainState,
    gradient: &[f32],
    settings: &spec::Optimizer,
    learning_rate: f64,
) -> f64 {
    assert_eq!(gradient.len(), layout.parameters(), "gradient and layout differ in length");
    let norm = global_norm(gradient);
    state.step = state.step.next();
    let steps = state.step.0 as f64;
    let clip = if norm > settings.clip_norm { settings.clip_norm / norm } else { 1.0 };
    let base = AdamW {
        clip: clip as f32,
        beta1: settings.beta1 as f32,
        beta2: settings.beta2 as f32,
        epsilon: settings.epsilon as f32,
        step_size: (learning_rate / (1.0 - settings.beta1.powf(steps))) as f32,
        inverse_root: (1.0 / (1.0 - settings.beta2.powf(steps)).sqrt()) as f32,
        keep: 1.0,
    };
    for tensor in layout.tensors() {
        let decay = if tensor.decay { learning_rate * settings.weight_decay } else { 0.0 };
        let update = AdamW { keep: (1.0 - decay) as f32, ..base };
        let range = tensor.range();
        state.weights[range.clone()]
            .par_chunks_mut(CHUNK)
            .zip(gradient[range.clone()].par_chunks(CHUNK))
            .zip(
                state.first_moment[range.clone()]
                    .par_chunks_mut(CHUNK)
                    .zip(state.second_moment[range].par_chunks_mut(CHUNK)),
            )
            .for_each(|((weights, gradient), (first, second))| {
                simd::adamw(&update, weights, gradient, first, second);
            });
    }
    norm
}
