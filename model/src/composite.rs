//! The gradient of a slot in plain Burn operations.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use looptrain_proto::spec;

use crate::{Engine, SlotBatch, SlotOutput, StageSettings};

/// The gradient of a slot from flat weights.
///
/// # Panics
/// If the weights are fewer than the layout's.
#[must_use]
pub fn gradient(
    model: &spec::Model,
    weights: &[f32],
    settings: &StageSettings,
    batch: &SlotBatch,
    _device: &Device,
) -> SlotOutput {
    let mut engine = Engine::new(model, rayon::current_num_threads());
    engine.load(weights);
    let found = Mutex::new(None);
    engine.gradients(
        settings,
        std::slice::from_ref(batch),
        &AtomicBool::new(false),
        &|_, output| {
            *found.lock().expect("nobody panics") = Some(output);
        },
    );
    found.into_inner().ok().flatten().expect("a slot was computed")
}
