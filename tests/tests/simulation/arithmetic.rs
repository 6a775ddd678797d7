//! Training without a model. Weights are a hash; the gradient of a step is a hash of the weights and
//! of the slots that were summed, so a slot that is left out or counted twice, a step that is done
//! on other weights, or two steps in another order give another end.

use looptrain_proto::v1::{StepStatistics, Trend};
use looptrain_proto::{Digest, Spec, Step};
use looptrain_storage::{Tensor, weights_digest};

/// Tensors of a state; as many as there may be parts of a checkpoint, or more.
const TENSORS: usize = 8;

/// The weights before the first step.
pub(crate) fn initial(spec: &Spec) -> Digest {
    Digest::of(format!("seed {}", spec.run.seed).as_bytes())
}

/// The reduced gradient of a step over `slots`, in any order.
pub(crate) fn gradient(weights: Digest, step: Step, slots: &[u64]) -> Digest {
    let mut slots = slots.to_vec();
    slots.sort_unstable();
    Digest::of(format!("{weights} step {step} slots {slots:?}").as_bytes())
}

/// In place of the gradient of a step that is skipped, wherever updates go.
pub(crate) const SKIPPED: Digest = Digest([0xff; 32]);

/// The weights after an update.
pub(crate) fn apply(weights: Digest, gradient: Digest) -> Digest {
    if gradient == SKIPPED {
        return weights;
    }
    Digest::of(format!("{weights} {gradient}").as_bytes())
}

/// The weights as a checkpoint holds them, sorted by name.
pub(crate) fn tensors(weights: Digest) -> Vec<Tensor> {
    let chunks = weights.0.chunks(weights.0.len() / TENSORS).enumerate();
    chunks
        .map(|(index, bytes)| Tensor {
            name: format!("w.{index}"),
            shape: vec![bytes.len()],
            data: bytes.iter().map(|byte| f32::from(*byte)).collect(),
        })
        .collect()
}

/// Back from [`tensors`], in their order.
pub(crate) fn from_tensors(tensors: &[Tensor]) -> Option<Digest> {
    let bytes: Vec<u8> =
        tensors.iter().flat_map(|tensor| &tensor.data).map(|value| *value as u8).collect();
    Digest::from_bytes(&bytes).ok()
}

/// What a run calls the digest of these weights.
pub(crate) fn vouch(weights: Digest) -> Digest {
    weights_digest(tensors(weights).iter().map(Tensor::view))
}

/// What must come out, step by step: computed once, without a network.
#[derive(Debug)]
pub(crate) struct Truth {
    /// By step, from 0.
    weights: Vec<Digest>,
    /// By step; that of step 0 stands for nothing.
    gradients: Vec<Digest>,
    /// By step; before the first there is none.
    trends: Vec<Option<Trend>>,
}

/// Steps that are spikes.
pub(crate) const SPIKES: [u64; 2] = [23, 66];

/// What a worker says of a step beside its trend.
pub(crate) fn statistics(spec: &Spec, step: Step) -> StepStatistics {
    let stage = &spec.stages[spec.stage_of(step)];
    StepStatistics {
        // One in each stage is far above the others.
        loss: if SPIKES.contains(&step.0) { 99.0 } else { 8.0 - step.0 as f64 / 16.0 },
        loss_per_loop: vec![8.0; stage.loops],
        exit_pdf: vec![1.0 / stage.loops as f64; stage.loops],
        entropy: 0.5,
        grad_norm: 1.0,
        tokens: stage.step_tokens(),
        ..StepStatistics::default()
    }
}

impl Truth {
    pub(crate) fn of(spec: &Spec) -> Self {
        let mut weights = vec![initial(spec)];
        let mut gradients = vec![Digest([0; 32])];
        let mut trends = vec![None];
        let guard = spec.optimizer.spikes.clone().unwrap_or_default();
        for step in (1..=spec.total_steps().0).map(Step) {
            let slots: Vec<u64> = (0..slots_of(spec, step)).collect();
            let before = weights[weights.len() - 1];
            let reduced = gradient(before, step, &slots);
            gradients.push(reduced);
            let update = if SPIKES.contains(&step.0) { SKIPPED } else { reduced };
            weights.push(apply(before, update));
            let trend: Trend = trends[trends.len() - 1].unwrap_or_default();
            trends.push(Some(trend.with(&guard, spec.stage_of(step), &statistics(spec, step))));
        }
        Self { weights, gradients, trends }
    }

    /// Where loss and gradient norm have been after a step.
    pub(crate) fn trend(&self, step: Step) -> Option<Trend> {
        self.trends.get(step.0 as usize).copied().flatten()
    }

    pub(crate) fn weights(&self, step: Step) -> Option<Digest> {
        self.weights.get(step.0 as usize).copied()
    }

    pub(crate) fn gradient(&self, step: Step) -> Option<Digest> {
        self.gradients.get(step.0 as usize).copied()
    }
}

pub(crate) fn slots_of(spec: &Spec, step: Step) -> u64 {
    spec.position(step).map_or(0, |at| u64::from(spec.stages[at.stage].slots))
}
