//! Training state as named tensors: what a checkpoint holds, split over ranks.
//!
//! A checkpoint has the weights under their Hugging Face names, and under `optim.m.` and
//! `optim.v.` before those names the moments of the optimizer. The list of all of them has one
//! order, weights first, so that every rank cuts it the same way.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use looptrain_model::{Layout, TensorEntry, TrainState};
use looptrain_proto::{Digest, Step};
use looptrain_storage::{
    Checkpoints, FIRST_MOMENT, PartEntry, SECOND_MOMENT, Tensor, split_tensors, weights_digest,
};

/// A checkpoint that is not of this run's model.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum StateError {
    #[error(
        "the checkpoint of step {step} is of another run ({theirs} instead of {ours}); use another run.name"
    )]
    OtherTrajectory { step: Step, theirs: Digest, ours: Digest },
    #[error(
        "the weights of models/{model} are {theirs}, initial.weights says {ours}; take what the import printed"
    )]
    OtherInitial { model: String, theirs: Digest, ours: Digest },
    #[error(
        "the tensors of models/{model} are not those of [model]; copy [model] from what the import printed"
    )]
    OtherShape { model: String },
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

/// A rank's part of a checkpoint, copied out of the state.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) tensors: Vec<Tensor>,
    /// The weights that are not in it, for the digest of all.
    others: Vec<Tensor>,
}

impl Part {
    /// Copies part `part` of `parts` of the state, and no more of it than its digest takes.
    ///
    /// # Panics
    /// When `part` is not below `parts`.
    pub(crate) fn copy(layout: &Layout, state: &TrainState, part: usize, parts: usize) -> Self {
        let mine = part_range(layout, part, parts);
        let all = all_tensors(layout, state);
        let weights = layout.tensors().len();
        let others = (0..weights).filter(|index| !mine.contains(index));
        Self {
            others: others.map(|index| copied(&all[index])).collect(),
            tensors: all[mine].iter().map(copied).collect(),
        }
    }

    /// Writes the part, and works out the digest of all weights meanwhile.
    pub(crate) async fn save(
        self,
        checkpoints: &Checkpoints,
        step: Step,
        part: usize,
        parts: usize,
        metadata: BTreeMap<String, String>,
    ) -> Result<(PartEntry, Digest), looptrain_storage::Error> {
        let tensors: Arc<[Tensor]> = self.tensors.into();
        let (mine, others) = (Arc::clone(&tensors), self.others);
        let hash = tokio::task::spawn_blocking(move || {
            weights_digest(mine.iter().chain(&others).map(Tensor::view))
        });
        let entry = checkpoints.save_part(step, part, parts, tensors, metadata).await?;
        let digest = hash.await.map_err(|_| looptrain_storage::Error::Interrupted)?;
        Ok((entry, digest))
    }
}

/// A tensor of the list of all: prefix of its name, the buffer that it is in, and where.
type Place<'a> = (&'static str, &'a [f32], &'a TensorEntry);

/// The list of all tensors.
fn all_tensors<'a>(layout: &'a Layout, state: &'a TrainState) -> Vec<Place<'a>> {
    let sources = [
        ("", &state.weights),
        (FIRST_MOMENT, &state.first_moment),
        (SECOND_MOMENT, &state.second_moment),
    ];
    let entries = |(prefix, buffer): (&'static str, &'a Vec<f32>)| {
        layout.tensors().iter().map(move |entry| (prefix, buffer.as_slice(), entry))
    };
    sources.into_iter().flat_map(entries).collect()
}

fn copied((prefix, buffer, entry): &Place<'_>) -> Tensor {
    Tensor {
        name: format!("{prefix}{}", entry.name),
        shape: entry.shape.clone(),
        data: buffer[entry.range()].to_vec(),
    }
}

/// Which tensors of the list are in part `part` of `parts`.
fn part_range(layout: &Layout, part: usize, parts: usize) -> Range<usize> {
    let sizes: Vec<u64> = (0..3)
        .flat_map(|_| layout.tensors().iter().map(|entry| (entry.len * size_of::<f32>()) as u64))
        .collect();
    split_tensors(&sizes, parts)[part].clone()
}

/// Puts the tensors of a checkpoint together; every tensor of the layout must be there, and no
/// other.
pub(crate) fn from_tensors(
    layout: &Layout,
    step: Step,
    tensors: Vec<Tensor>,
) -> Result<TrainState, StateError> {
    let [weights, first_moment, second_moment] =
        gather(layout, step, ["", FIRST_MOMENT, SECOND_MOMENT], tensors)?;
    Ok(TrainState { step, weights, first_moment, second_moment })
}

/// The state before step 1 with the weights of `model`; every one of the layout must be there, and
/// nothing else.
pub(crate) fn from_weights(
    layout: &Layout,
    model: &str,
    tensors: Vec<Tensor>,
) -> Result<TrainState, StateError> {
    let other = |_| StateError::OtherShape { model: model.to_owned() };
    let [weights] = gather(layout, Step(0), [""], tensors).map_err(other)?;
    let zeros = vec![0.0; weights.len()];
    Ok(TrainState { step: Step(0), weights, first_moment: zeros.clone(), second_moment: zeros })
}

/// A flat buffer of the tensors behind each prefix.
fn gather<const N: usize>(
    layout: &Layout,
    step: Step,
    prefixes: [&str; N],
    tensors: Vec<Tensor>,
) -> Result<[Vec<f32>; N], StateError> {
    let mut by_name: HashMap<String, Tensor> =
        tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let mut buffers = prefixes.map(|_| Vec::new());
    for (buffer, prefix) in buffers.iter_mut().zip(prefixes) {
        buffer.resize(layout.parameters(), 0.0);
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
    }
    match by_name.into_keys().min() {
        None => Ok(buffers),
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
            let mut tensors: Vec<Tensor> = (0..parts)
                .flat_map(|part| Part::copy(&layout, &state, part, parts).tensors)
                .collect();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            let again = from_tensors(&layout, Step(5), tensors).unwrap();
            assert!(again.weights == state.weights && again.first_moment == state.first_moment);
            assert!(again.second_moment == state.second_moment && again.step == state.step);
            assert_eq!(digest(&layout, &again.weights), digest(&layout, &state.weights));
        }
    }

    #[tokio::test]
    async fn every_rank_has_the_digest_of_all_weights_and_copies_no_weight_twice() {
        let (layout, state) = sample();
        let store = looptrain_storage::Store::open("memory://").unwrap();
        let checkpoints = Checkpoints::new(&store, "r");
        for parts in [1, 2, 3, 8] {
            for index in 0..parts {
                let part = Part::copy(&layout, &state, index, parts);
                let copies = part.tensors.iter().chain(&part.others);
                let mut names: Vec<&str> = copies.map(|tensor| tensor.name.as_str()).collect();
                let count = names.len();
                names.sort_unstable();
                names.dedup();
                assert_eq!(names.len(), count);
                assert!(part.others.is_empty() || parts > 1);
                let saved = part.save(&checkpoints, Step(5), index, parts, BTreeMap::new());
                assert_eq!(saved.await.unwrap().1, digest(&layout, &state.weights));
            }
        }
    }

    #[test]
    fn weights_to_begin_from_come_without_moments_and_are_all_there() {
        let (layout, state) = sample();
        let mut weights = Part::copy(&layout, &state, 0, 1).tensors;
        weights.retain(|tensor| !tensor.name.starts_with("optim."));
        let begun = from_weights(&layout, "m", weights.clone()).unwrap();
        assert!(begun.weights == state.weights && begun.step == Step(0));
        assert!(begun.first_moment.iter().chain(&begun.second_moment).all(|it| *it == 0.0));
        weights.pop();
        let error = from_weights(&layout, "m", weights).err().unwrap();
        assert_eq!(error, StateError::OtherShape { model: "m".into() });
    }

    #[test]
    fn a_checkpoint_of_another_model_is_told_by_the_tensor_that_differs() {
        let (layout, state) = sample();
        let whole = || Part::copy(&layout, &state, 0, 1).tensors;
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
