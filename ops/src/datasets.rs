//! Before a run starts: its datasets are in the store and fit the spec.

use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use looptrain_proto::Spec;
use looptrain_storage::{Dataset, Split, Store, prepare};

use crate::progress::PrepareProgress;

/// Opens each dataset of the spec, making those that are missing and have a source, and checks
/// that vocabulary and lengths fit.
///
/// # Errors
/// When a dataset is missing without a source, or does not fit the model or a stage.
pub(crate) async fn ensure(store: &Store, spec: &Spec) -> Result<Vec<Dataset>> {
    let mut datasets = Vec::new();
    for wanted in &spec.datasets {
        let name = &wanted.name;
        let dataset = match (Dataset::open(store, name).await?, &wanted.source) {
            (Some(dataset), _) => dataset,
            (None, Some(source)) => {
                let progress = Mutex::new(PrepareProgress::new(name));
                let show = |event| {
                    progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner).show(&event);
                };
                prepare(store, name, source, &show)
                    .await
                    .with_context(|| format!("cannot make dataset `{name}`"))?
            }
            (None, None) => bail!(
                "dataset `{name}` is not in {}; give it a [datasets.source] or prepare it there",
                store.url()
            ),
        };
        let (vocabulary, limit) = (dataset.manifest().vocabulary_size, spec.model.vocab_size);
        if vocabulary > limit {
            bail!(
                "dataset `{name}` has a vocabulary of {vocabulary}, larger than model.vocab_size = \
                 {limit}; raise that, or use another dataset"
            );
        }
        datasets.push(dataset);
    }
    for (index, stage) in spec.stages.iter().enumerate() {
        for (dataset, _) in spec.mixture(index) {
            for (split, what) in [(Split::Train, "training"), (Split::Validation, "validation")] {
                let dataset = &datasets[dataset];
                if dataset.sequences(split, stage.sequence_length) == 0 {
                    let manifest = dataset.manifest();
                    bail!(
                        "stages.{index}.sequence_length = {} is longer than the {what} text of \
                         dataset `{}` ({} tokens); lower it or add text",
                        stage.sequence_length,
                        manifest.name,
                        manifest.split(split).tokens
                    );
                }
            }
        }
    }
    Ok(datasets)
}

/// Lowers `evaluation.sequences` to what the validation splits hold.
pub(crate) fn clamp_evaluation(spec: &mut Spec, datasets: &[Dataset]) {
    for (index, stage) in spec.stages.iter().enumerate() {
        for (dataset, _) in spec.mixture(index) {
            let held = datasets[dataset].sequences(Split::Validation, stage.sequence_length);
            spec.evaluation.sequences = spec.evaluation.sequences.min(held);
        }
    }
}
