//! Before a run starts: its datasets are in the store and fit the spec.

use std::collections::BTreeSet;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use looptrain_proto::Spec;
use looptrain_storage::{Dataset, Split, Store, check_fit, dataset_prefix, prepare};

use crate::progress::PrepareProgress;

/// Opens each dataset of the spec, making those that are missing and have a source, and checks
/// that vocabulary, tokenizer, source and lengths fit.
///
/// # Errors
/// When a dataset is missing without a source, was made from another source, or does not fit the
/// model, a stage or the other datasets.
pub(crate) async fn ensure(store: &Store, spec: &Spec) -> Result<Vec<Dataset>> {
    let mut found = Vec::new();
    for wanted in &spec.datasets {
        found.push(Dataset::open(store, &wanted.name).await?);
    }
    check_tokenizers(store, spec, &found)?;
    let mut datasets = Vec::new();
    for (wanted, found) in spec.datasets.iter().zip(found) {
        let name = &wanted.name;
        let dataset = match (found, &wanted.source) {
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

/// Refuses to make a dataset with a tokenizer of its own when the run draws from another one as well, which
/// has a tokenizer already or gets one before: making it takes its time, and it would not fit the other.
fn check_tokenizers(store: &Store, spec: &Spec, found: &[Option<Dataset>]) -> Result<()> {
    let parts = (0..spec.stages.len()).flat_map(|stage| spec.mixture(stage));
    let drawn: BTreeSet<usize> = parts.map(|(dataset, _)| dataset).collect();
    let is_made = |index: usize| found[index].is_none() && spec.datasets[index].source.is_some();
    for &index in &drawn {
        let source = spec.datasets[index].source.as_ref().filter(|_| is_made(index));
        if source.is_none_or(|source| source.tokenizer.is_some()) {
            continue;
        }
        let has_another =
            |other: usize| found[other].is_some() || (other < index && is_made(other));
        let Some(other) = drawn.iter().copied().find(|&it| it != index && has_another(it)) else {
            continue;
        };
        let [first, second] = [other, index].map(|it| &spec.datasets[it].name);
        let given = match &found[other] {
            Some(dataset) => {
                let (store, file) =
                    (store.url().trim_end_matches('/'), &dataset.manifest().tokenizer);
                Some(format!("{store}/{}/{file}", dataset_prefix(first)))
            }
            None => spec.datasets[other].source.as_ref().and_then(|it| it.tokenizer.clone()),
        };
        let remedy = match given {
            Some(given) => format!("write tokenizer = {given:?} into its [datasets.source]"),
            None => "write the same `tokenizer` into the [datasets.source] of both, such as the \
                     tokenizer-*.json beside a dataset that is there"
                .to_owned(),
        };
        bail!(
            "dataset `{second}` would be made with a tokenizer of its own, and the run draws from `{first}` as well; {remedy}"
        );
    }
    Ok(())
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
    use looptrain_proto::spec::MixturePart;

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

    /// A spec that draws from another dataset as well, whose own tokenizer would be a smaller one.
    fn mixed(tokenizer: Option<&str>) -> Spec {
        let mut spec = spec(&[]);
        let mut other = spec.datasets[0].clone();
        other.name = "other".into();
        let source = other.source.as_mut().unwrap();
        source.tokenizer_vocabulary = 280;
        source.tokenizer = tokenizer.map(str::to_owned);
        spec.datasets.push(other);
        let part = |name: &str| MixturePart { dataset: name.into(), weight: 1 };
        spec.stages[0].mixture = vec![part("sources"), part("other")];
        spec
    }

    #[tokio::test]
    async fn a_second_dataset_is_made_with_the_tokenizer_of_the_first_and_not_with_its_own() {
        let store = Store::open("memory://one-tokenizer").unwrap();
        let refusal = async || ensure(&store, &mixed(None)).await.unwrap_err().to_string();
        let error = refusal().await;
        assert!(error.contains("`other` would be made with a tokenizer of its own"), "{error}");
        assert!(error.contains("from `sources` as well; write the same `tokenizer`"), "{error}");
        assert!(Dataset::open(&store, "sources").await.unwrap().is_none(), "nothing is made");

        // The remedy of the next refusal is one.
        ensure(&store, &spec(&[])).await.unwrap();
        let error = refusal().await;
        let given = error.split('"').nth(1).unwrap();
        assert!(given.starts_with("memory://one-tokenizer/datasets/sources/tokenizer-"), "{error}");
        assert!(Dataset::open(&store, "other").await.unwrap().is_none(), "nothing is made");
        let made = ensure(&store, &mixed(Some(given))).await.unwrap();
        let [first, second] = [0, 1].map(|index| made[index].manifest().tokenizer_digest);
        assert_eq!(first, second);
    }

    #[tokio::test]
    async fn datasets_of_two_tokenizers_that_are_there_are_refused_once_stages_draw_from_both() {
        let store = Store::open("memory://").unwrap();
        let mut apart = mixed(None);
        apart.stages[0].mixture.truncate(1);
        ensure(&store, &apart).await.unwrap();
        let error = ensure(&store, &mixed(None)).await.unwrap_err().to_string();
        assert!(error.contains("datasets/other/tokenizer-"), "{error}");
        assert!(error.contains("it is not the tokenizer of dataset `sources`"), "{error}");
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
