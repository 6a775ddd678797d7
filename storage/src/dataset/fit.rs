//! Whether the datasets of a spec go together, and hold enough text for what it wants.

use std::collections::BTreeSet;

use looptrain_proto::Spec;

use super::{Dataset, Split, manifest_key};
use crate::{Error, Result};

/// Checks that `datasets`, those of the spec in its order, go together: those that any stage draws
/// from have one tokenizer and one token after each document. And that they hold enough for every
/// stage: each dataset of a stage's mixture a sequence of its length in either split, and all of
/// them together the training sequences of one step. After that data epochs repeat, which is no
/// fault.
///
/// Callers: the operator's side before a run begins, and every worker when it opens its data.
///
/// # Errors
/// [`Error::Malformed`], naming a dataset that is of another tokenizer than the first one, and
/// [`Error::TooSmall`], naming the stage and its datasets; both say what to change.
///
/// # Panics
/// When there are fewer datasets than in the spec.
pub fn check_fit(spec: &Spec, datasets: &[Dataset]) -> Result<()> {
    check_tokenizers(spec, datasets)?;
    for (index, stage) in spec.stages.iter().enumerate() {
        let parts: Vec<&Dataset> =
            spec.mixture(index).iter().map(|&(dataset, _)| &datasets[dataset]).collect();
        let too_small = |parts: &[&Dataset], split, needed, available| Error::TooSmall {
            stage: stage.name.clone(),
            index,
            needed,
            split,
            sequence_length: stage.sequence_length,
            datasets: names(parts),
            available,
        };
        for split in [Split::Train, Split::Validation] {
            if let Some(part) =
                parts.iter().find(|part| part.sequences(split, stage.sequence_length) == 0)
            {
                return Err(too_small(&[*part], split, 1, 0));
            }
        }
        let available: u64 =
            parts.iter().map(|part| part.sequences(Split::Train, stage.sequence_length)).sum();
        if available < stage.step_sequences() {
            return Err(too_small(&parts, Split::Train, stage.step_sequences(), available));
        }
    }
    Ok(())
}

/// Whether a token means the same in all datasets that stages draw from. Nothing else would show that it
/// does not: the model would learn a mixture of both meanings.
fn check_tokenizers(spec: &Spec, datasets: &[Dataset]) -> Result<()> {
    let parts = (0..spec.stages.len()).flat_map(|stage| spec.mixture(stage));
    let drawn: BTreeSet<usize> = parts.map(|(dataset, _)| dataset).collect();
    let mut drawn = drawn.into_iter().map(|dataset| datasets[dataset].manifest());
    let Some(first) = drawn.next() else { return Ok(()) };
    let place = |key: String| {
        let store = &spec.run.store;
        let slash = if store.ends_with('/') { "" } else { "/" };
        format!("{store}{slash}{key}")
    };
    let malformed =
        |key: String, reason: String| Err(Error::Malformed { place: place(key), reason });
    for other in drawn {
        if other.tokenizer_digest != first.tokenizer_digest {
            let (name, tokenizer) = (&first.name, place(first.tokenizer_key()));
            return malformed(
                other.tokenizer_key(),
                format!(
                    "it is not the tokenizer of dataset `{name}`, from which the run draws as well; make `{}` anew under another name with that one, {tokenizer}: `tokenizer` in its [datasets.source], or --tokenizer of `looptrain data prepare`",
                    other.name
                ),
            );
        }
        if other.end_of_text != first.end_of_text {
            let (ends, name, end) = (other.end_of_text, &first.name, first.end_of_text);
            return malformed(
                manifest_key(&other.name),
                format!(
                    "its documents end with token {ends}, those of dataset `{name}`, from which the run draws as well, with token {end}; make `{}` anew under another name with that one: `end_of_text` in its [datasets.source], or --end-of-text of `looptrain data prepare`",
                    other.name
                ),
            );
        }
    }
    Ok(())
}

fn names(datasets: &[&Dataset]) -> String {
    let names: Vec<String> =
        datasets.iter().map(|dataset| format!("`{}`", dataset.manifest().name)).collect();
    names.join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::Digest;

    use super::super::testing::manifest;
    use super::super::{DatasetManifest, Reading};
    use super::*;
    use crate::Store;

    /// Two stages, of 8 tokens by 6 sequences from `a` and `b`, and of 4 tokens by 1 from `a`.
    fn spec() -> Spec {
        let text = r#"
            [run]
            name = "fit"
            store = "memory://"
            [model]
            hidden_size = 16
            num_hidden_layers = 1
            num_attention_heads = 2
            intermediate_size = 24
            vocab_size = 1000
            [[datasets]]
            name = "a"
            [[datasets]]
            name = "b"
            [[stages]]
            name = "both"
            steps = 4
            sequence_length = 8
            slots = 3
            slot_sequences = 2
            loops = 2
            entropy_weight = 0.05
            learning_rate = { peak = 1e-2 }
            mixture = [{ dataset = "b", weight = 1 }, { dataset = "a", weight = 3 }]
            [[stages]]
            name = "short"
            steps = 4
            sequence_length = 4
            slots = 1
            slot_sequences = 1
            loops = 2
            entropy_weight = 0.05
            learning_rate = { peak = 1e-2 }
            mixture = [{ dataset = "a", weight = 1 }]
        "#;
        Spec::parse("fit.toml", text, &[]).unwrap()
    }

    /// Checks datasets of so many (training, validation) tokens.
    fn check(a: (u64, u64), b: (u64, u64)) -> std::result::Result<(), String> {
        let store = Store::open("memory://").unwrap();
        let dataset = |name, (train, validation)| {
            Dataset::new(&store, manifest(name, train, validation), Reading::default())
        };
        check_fit(&spec(), &[dataset("a", a), dataset("b", b)]).map_err(|error| error.to_string())
    }

    #[test]
    fn exactly_enough_is_enough() {
        // 6 sequences of 8 tokens: 5 and 1; each split ends with a last target.
        assert_eq!(check((41, 9), (9, 9)), Ok(()));
        assert_eq!(check((9, 9), (41, 9)), Ok(()));
    }

    #[test]
    fn one_token_too_few_for_a_step_is_refused() {
        let error = check((40, 9), (9, 9)).unwrap_err();
        assert_eq!(
            error,
            "stage `both` needs at least 6 training sequences of 8 tokens, but there are 5 in `b`, `a`; lower stages.0.sequence_length or stages.0.slots, or add text"
        );
    }

    #[test]
    fn every_dataset_of_a_mixture_needs_a_sequence_in_either_split() {
        let error = check((100, 9), (8, 9)).unwrap_err();
        assert!(error.contains("1 training sequences") && error.contains("0 in `b`;"), "{error}");
        let error = check((100, 8), (100, 9)).unwrap_err();
        assert!(error.contains("1 validation sequences") && error.contains("0 in `a`;"), "{error}");
    }

    /// Checks two datasets that are large enough, of which the second is changed.
    fn check_changed(
        spec: &Spec,
        change: impl FnOnce(&mut DatasetManifest),
    ) -> std::result::Result<(), String> {
        let store = Store::open("memory://").unwrap();
        let (first, mut second) = (manifest("a", 100, 100), manifest("b", 100, 100));
        change(&mut second);
        let datasets =
            [first, second].map(|manifest| Dataset::new(&store, manifest, Reading::default()));
        check_fit(spec, &datasets).map_err(|error| error.to_string())
    }

    #[test]
    fn datasets_that_a_run_draws_from_have_one_tokenizer_and_one_end_of_text() {
        assert_eq!(check_changed(&spec(), |_| ()), Ok(()));
        let error = check_changed(&spec(), |second| {
            second.tokenizer_digest = Digest::of(b"other");
            second.tokenizer = "tokenizer-1.json".into();
        });
        assert_eq!(
            error.unwrap_err(),
            "memory://datasets/b/tokenizer-1.json cannot be used: it is not the tokenizer of dataset `a`, from which the run draws as well; make `b` anew under another name with that one, memory://datasets/a/tokenizer.json: `tokenizer` in its [datasets.source], or --tokenizer of `looptrain data prepare`"
        );
        let error = check_changed(&spec(), |second| second.end_of_text = 2).unwrap_err();
        assert!(
            error.starts_with("memory://datasets/b/manifest.json cannot be used")
                && error.contains("token 2, those of dataset `a`")
                && error.contains("with token 0; make `b` anew"),
            "{error}"
        );
    }

    #[test]
    fn a_run_has_one_tokenizer_though_each_stage_draws_from_one_dataset() {
        let mut spec = spec();
        spec.stages[0].mixture.truncate(1);
        let error = check_changed(&spec, |second| second.tokenizer_digest = Digest::of(b"other"));
        assert!(error.unwrap_err().contains("it is not the tokenizer of dataset `a`"));
    }

    #[test]
    fn a_dataset_that_no_stage_draws_from_may_be_small_and_of_another_tokenizer() {
        let store = Store::open("memory://").unwrap();
        let mut spec = spec();
        spec.stages.remove(0);
        let [first, mut second] =
            [("a", 5), ("b", 0)].map(|(name, tokens)| manifest(name, tokens, tokens));
        second.tokenizer_digest = Digest::of(b"other");
        let datasets =
            [first, second].map(|manifest| Dataset::new(&store, manifest, Reading::default()));
        check_fit(&spec, &datasets).unwrap();
    }
}
