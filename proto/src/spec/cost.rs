//! What training costs, in floating-point operations.

use super::{Model, Objective, Spec, Stage};
use crate::Step;

/// Floating-point operations of a token, forward and backward, as the model needs them: nothing that is
/// computed again, and of attention the causal half, as if sequences were one document. A multiplication
/// and an addition are two; backward takes twice as many as forward, and a stage that trains the exit
/// gate has none.
#[must_use]
pub fn operations_per_token(model: &Model, stage: &Stage) -> f64 {
    let [d, f, v] =
        [model.hidden_size, model.intermediate_size, model.vocab_size].map(|n| n as f64);
    let [layers, loops, length] =
        [model.num_hidden_layers, stage.loops, stage.sequence_length].map(|n| n as f64);
    let matrices = loops * (layers * (4.0 * d * d + 3.0 * d * f) + v * d);
    let attention = 2.0 * loops * layers * d * (length + 1.0) / 2.0;
    let passes = match stage.objective {
        Objective::Language => 3.0,
        Objective::ExitGate => 1.0,
    };
    2.0 * passes * (matrices + attention)
}

impl Spec {
    /// Floating-point operations of a step: [`operations_per_token`] for all its tokens.
    #[must_use]
    pub fn step_operations(&self, step: Step) -> f64 {
        let stage = &self.stages[self.stage_of(step)];
        self.tokens_of(step) as f64 * operations_per_token(&self.model, stage)
    }
}
