//! Training state as named tensors: what a checkpoint holds, split over ranks.
//!
//! A checkpoint has the weights under their Hugging Face names, and under `optim.m.` and
//! `optim.v.` before those names the moments of the optimizer. The list of all of them has one
//! order, weights first, so that every rank cuts it the same way.

use std::collections::HashMap;

use looptrain_model::{Layout, TrainState};
use looptrain_proto::{Digest, Step};
use looptrain_storage::{FIRST_MOMENT, SECOND_MOMENT, Tensor, split_tensors, weights_digest};

/// A checkpoint that is not of this run's model.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum StateError {
    #[error(
        "the checkpoint of step {step} is of another run ({theirs} instead of {ours}); use another run.name"
    )]
    OtherTrajectory { step: Step, theirs: Digest, ours: Digest },
    #[error(
        "the checkpoint of step {step} is of another model: it has no tensor {name}; use another run.name"
    )]
    Missing { step: Step, name: String },
    #[error(
        "the checkpoint of step {step} is of another model: tensor {name} has the shape {theirs:?} instead of {ours:?}; use another run.name"
    )]
    Shape { step: Step, name: String, theirs: Vec<usize>, ours: Vec<usize> },
    #[error(
        "the checkpoint of step {step} is of another model: this one has no tensor {name}; use another run.name"
    )]
    Unknown { step: Step, name: String },
}

/// Digest of the weights, as the coordinator and the checkpoints compare it.
pub(crate) fn digest(layout: &Layout, weights: &[f32]) -> Digest {
    weights_digest(
        layout
            .tensors()
            .iter()
            .map(|entry| (entry.name.as_str(), entry.shape.as_slice(), &weights[entry.range()])),
    )
}

/// Copies part `part` of `parts` of the state.
///
/// # Panics
/// When `part` is not below `parts`.
pub(crate) fn part_tensors(
    layout: &Layout,
    state: &TrainState,
    part: usize,
    parts: usize,
) -> Vec<Tensor> {
    let sources = [
        ("", &state.weights),
        (FIRST_MOMENT, &state.first_moment),
        (SECOND_MOMENT, &state.second_moment),
    ];
    let all: Vec<_> = sources
        .iter()
        .flat_map(|(prefix, buffer)| layout.tensors().iter().map(move |e| (prefix, buffer, e)))
        .collect();
    let sizes: Vec<u64> =
        all.iter().map(|(.., entry)| (entry.len * size_of::<f32>()) as u64).collect();
    let range = split_tensors(&sizes, parts)[part].clone();
    all[range]
        .iter()
        .map(|(prefix, buffer, entry)| Tensor {
            name: format!("{prefix}{}", entry.name),
            shape: entry.shape.clone(),
            data: buffer[entry.range()].to_vec(),
        })
        .collect()
}

/// Puts the tensors of a checkpoint together; every tensor of the layout must be there, and no
/// other.
pub(crate) fn from_tensors(
    layout: &Layout,
    step: Step,
    tensors: Vec<Tensor>,
) -> Result<TrainState, StateError> {
    let mut by_name: HashMap<String, Tensor> =
        tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let mut gather = |prefix: &str| {
        let mut buffer = vec![0.0; layout.parameters()];
        for entry in layout.tensors() {
            let name = format!("{prefix}{}", entry.name);
            let Some(tensor) = by_name.remove(&name) else {
                return Err(StateError::Missing { step, name });
            };
            if tensor.shape != entry.shape || tensor.data.len() != entry.len {
                let (theirs, ours) = (tensor.shape, entry.shape.clone());
                return Err(StateError::Shape { step, name, theirs, ours });
            }
            buffer[entry.range()].copy_from_slice(&tensor.data);
        }
        Ok(buffer)
    };
    let state = TrainState {
        step,
        weights: gather("")?,
        first_moment: gather(FIRST_MOMENT)?,
        second_moment: gather(SECOND_MOMENT)?,
    };
    match by_name.into_keys().min() {
        None => Ok(state),
        Some(name) => Err(StateError::Unknown { step, name }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::tiny_spec;

    fn sample() -> (Layout, TrainState) {
        let model = tiny_spec("memory://").model;
        let layout = Layout::new(&model);
        let mut state = TrainState::initial(&model, 3);
        state.step = Step(5);
        for (index, value) in state.first_moment.iter_mut().enumerate() {
            *value = index as f32;
        }
        state.second_moment.iter_mut().for_each(|value| *value = 0.5);
        (layout, state)
    }

    #[test]
    fn the_parts_of_any_number_of_ranks_make_the_same_state() {
        let (layout, state) = sample();
        for parts in [1, 2, 3, 8] {
            let mut tensors: Vec<Tensor> =
                (0..parts).flat_map(|part| part_tensors(&layout, &state, part, parts)).collect();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            let again = from_tensors(&layout, Step(5), tensors).unwrap();
            assert!(again.weights == state.weights && again.first_moment == state.first_moment);
            assert!(again.second_moment == state.second_moment && again.step == state.step);
            assert_eq!(digest(&layout, &again.weights), digest(&layout, &state.weights));
        }
    }

    #[test]
    fn a_checkpoint_of_another_model_is_told_by_the_tensor_that_differs() {
        let (layout, state) = sample();
        let whole = || part_tensors(&layout, &state, 0, 1);
        let mut short = whole();
        let gone = short.pop().unwrap().name;
        let error = from_tensors(&layout, Step(5), short).err().unwrap();
        assert_eq!(error, StateError::Missing { step: Step(5), name: gone });

        let mut more = whole();
        more.push(Tensor { name: "extra".into(), shape: vec![1], data: vec![0.0] });
        let error = from_tensors(&layout, Step(5), more).err().unwrap();
        assert_eq!(error, StateError::Unknown { step: Step(5), name: "extra".into() });

        let mut wider = whole();
        wider[0].shape.push(2);
        let error = from_tensors(&layout, Step(5), wider).err().unwrap();
        assert!(error.to_string().contains("has the shape"), "{error}");
    }
}
