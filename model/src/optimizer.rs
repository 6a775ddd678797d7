//! Global-norm clipping and AdamW in one pass over the flat buffers.

use looptrain_proto::Step;
use looptrain_proto::spec::{self, Objective};
use rayon::prelude::*;

use crate::cpu::simd::{self, AdamW};
use crate::{Layout, TensorEntry, TrainState};

/// Elements per task and per partial sum: fixed, so that the norm's sum keeps its shape.
const CHUNK: usize = 1 << 14;

/// Euclidean norm in double precision, summed chunk by chunk.
#[must_use]
pub(crate) fn global_norm(gradient: &[f32]) -> f64 {
    let partial: Vec<f64> = gradient.par_chunks(CHUNK).map(simd::sum_of_squares).collect();
    partial.iter().sum::<f64>().sqrt()
}

/// What decides how far a step goes, beside the gradient.
pub(crate) struct StepSize<'a> {
    pub(crate) settings: &'a spec::Optimizer,
    /// The step that the update leads to.
    pub(crate) step: Step,
    pub(crate) learning_rate: f64,
}

impl StepSize<'_> {
    /// The numbers of an update with a gradient of that norm, of tensors that do not decay.
    pub(crate) fn clipped(&self, norm: f64) -> AdamW {
        let Self { settings, step, learning_rate } = self;
        let steps = step.0 as f64;
        let clip = if norm > settings.clip_norm { settings.clip_norm / norm } else { 1.0 };
        AdamW {
            clip: clip as f32,
            beta1: settings.beta1 as f32,
            beta2: settings.beta2 as f32,
            epsilon: settings.epsilon as f32,
            step_size: (learning_rate / (1.0 - settings.beta1.powf(steps))) as f32,
            inverse_root: (1.0 / (1.0 - settings.beta2.powf(steps)).sqrt()) as f32,
            keep: 1.0,
        }
    }

    /// Those of a tensor that decays, or does not.
    pub(crate) fn of_tensor(&self, base: &AdamW, decays: bool) -> AdamW {
        let decay = if decays { self.learning_rate * self.settings.weight_decay } else { 0.0 };
        AdamW { keep: (1.0 - decay) as f32, ..*base }
    }
}

/// One update in place: clip by global norm, then decoupled weight decay and Adam with bias
/// correction (Loshchilov and Hutter, arXiv 1711.05101), of what the objective trains; the rest stays to
/// the bit, moments too. Advances `state.step` and returns the norm before clipping.
///
/// # Panics
/// If the gradient has other elements than the objective trains.
pub(crate) fn update(
    layout: &Layout,
    state: &mut TrainState,
    gradient: &[f32],
    settings: &spec::Optimizer,
    objective: Objective,
    learning_rate: f64,
) -> f64 {
    let trained = layout.trained(objective);
    assert_eq!(gradient.len(), trained.len(), "a gradient has the elements that are trained");
    let norm = global_norm(gradient);
    state.step = state.step.next();
    let size = StepSize { settings, step: state.step, learning_rate };
    let base = size.clipped(norm);
    let is_trained = |tensor: &&TensorEntry| trained.contains(&tensor.offset);
    for tensor in layout.tensors().iter().filter(is_trained) {
        let update = size.of_tensor(&base, tensor.decay);
        let range = tensor.range();
        let gradient = &gradient[range.start - trained.start..range.end - trained.start];
        state.weights[range.clone()]
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
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
