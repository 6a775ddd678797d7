//! What training changes: weights and AdamW's moments.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::SeedableRng;
use looptrain_proto::{Step, spec};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::Layout;

/// Weights and optimizer state after a committed step, as flat buffers in [`Layout`] order.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainState {
    /// The committed step.
    pub step: Step,
    /// Parameters.
    pub weights: Vec<f32>,
    /// AdamW's mean of gradients.
    pub first_moment: Vec<f32>,
    /// AdamW's mean of squared gradients.
    pub second_moment: Vec<f32>,
}

impl TrainState {
    /// The state before step 1: matrices Normal(0, `initializer_range`), norms 1, gate bias 0.
    ///
    /// Each tensor has a random stream of its own, keyed by seed and name, so its values depend on
    /// neither the other tensors nor the order they are made in.
    #[must_use]
    pub fn initial(model: &spec::Model, seed: u64) -> Self {
        let layout = Layout::new(model);
        let mut weights = vec![0.0; layout.parameters()];
        let mut rest = weights.as_mut_slice();
        let mut places = Vec::new();
        for tensor in layout.tensors() {
            let (values, after) = std::mem::take(&mut rest).split_at_mut(tensor.len);
            places.push((tensor, values));
            rest = after;
        }
        places.into_par_iter().for_each(|(tensor, values)| match tensor.shape.len() {
            1 if tensor.name.ends_with(".bias") => {}
            1 => values.fill(1.0),
            _ => fill_normal(values, seed, &tensor.name, model.initializer_range),
        });
        let zeros = vec![0.0; layout.parameters()];
        Self { step: Step(0), weights, first_moment: zeros.clone(), second_moment: zeros }
    }
}

fn fill_normal(values: &mut [f32], seed: u64, name: &str, deviation: f64) {
    let mut key = blake3::Hasher::new_derive_key("looptrain initial weights v1");
    key.update(&seed.to_le_bytes());
    key.update(name.as_bytes());
    let mut stream = ChaCha8Rng::from_seed(*key.finalize().as_bytes());
    for value in values {
        let normal: f64 = StandardNormal.sample(&mut stream);
        *value = (normal * deviation) as f32;
    }
}
