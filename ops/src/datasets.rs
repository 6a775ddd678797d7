//! Before a run starts: its datasets are in the store and fit the spec.

use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use looptrain_proto::Spec;
use looptrain_storage::{Dataset, Split, Store, check_fit, prepare};

use crate::progress::PrepareProgress;

/// Opens each dataset of the spec, making those that are missing and have a source, and checks
/// that vocabulary, source and lengths fit.
///
/// # Errors
/// When a dataset is missing without a source, was made from another source, or does not fit the
/// model or a stage.
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
        if let Some(source) = &wanted.source {
            dataset.check_source(source)?;
        }
        datasets.push(dataset);
    }
    check_fit(spec, &datasets)?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A spec whose dataset is made from this crate's own sources.
    fn spec(overrides: &[&str]) -> Spec {
        let text = format!(
            r#"
            [run]
            name = "small"
            store = "memory://"
            [model]
            hidden_size = 16
            num_hidden_layers = 1
            num_attention_heads = 2
            intermediate_size = 24
            vocab_size = 300
            [[datasets]]
            name = "sources"
            [datasets.source]
            paths = ["{}/src"]
            max_bytes = 40000
            tokenizer_vocabulary = 300
            validation_fraction = 0.1
            [[stages]]
            name = "only"
            steps = 4
            sequence_length = 8
            slots = 4
            slot_sequences = 2
            loops = 2
            entropy_weight = 0.05
            learning_rate = {{ peak = 1e-2 }}
            "#,
            env!("CARGO_MANIFEST_DIR")
        );
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Spec::parse("small.toml", &text, &overrides).unwrap()
    }

    async fn refusal(store: &Store, overrides: &[&str]) -> String {
        format!("{:#}", ensure(store, &spec(overrides)).await.unwrap_err())
    }

    #[tokio::test]
    async fn an_edited_source_is_refused_after_the_vocabulary() {
        let store = Store::open("memory://").unwrap();
        let made = ensure(&store, &spec(&[])).await.unwrap();
        let again = ensure(&store, &spec(&[])).await.unwrap();
        assert_eq!(again[0].digest(), made[0].digest());

        let edited = refusal(&store, &["datasets.0.source.max_bytes=50000"]).await;
        assert!(edited.contains("max_bytes is 50000, was 40000"), "{edited}");
        let smaller = ["model.vocab_size=280", "datasets.0.source.tokenizer_vocabulary=280"];
        let smaller = refusal(&store, &smaller).await;
        assert!(smaller.contains("larger than model.vocab_size = 280"), "{smaller}");
    }

    #[tokio::test]
    async fn a_stage_that_needs_more_than_there_is_is_refused() {
        let store = Store::open("memory://").unwrap();
        let error = refusal(&store, &["stages.0.sequence_length=30000"]).await;
        assert!(
            error.contains("stages.0.sequence_length") && error.contains("`sources`"),
            "{error}"
        );
    }
}
