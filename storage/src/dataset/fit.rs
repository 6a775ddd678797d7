//! Whether there is enough text for what a spec wants.

use looptrain_proto::Spec;

use super::{Dataset, Split};
use crate::{Error, Result};

/// Checks that `datasets`, those of the spec in its order, hold enough for every stage: each
/// dataset of a stage's mixture a sequence of its length in either split, and all of them together
/// the training sequences of one step. After that data epochs repeat, which is no fault.
///
/// Callers: the operator's side before a run begins, and every worker when it opens its data.
///
/// # Errors
/// [`Error::TooSmall`], naming the stage, the datasets and what to change.
///
/// # Panics
/// When there are fewer datasets than in the spec.
pub fn check_fit(spec: &Spec, datasets: &[Dataset]) -> Result<()> {
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

fn names(datasets: &[&Dataset]) -> String {
    let names: Vec<String> =
        datasets.iter().map(|dataset| format!("`{}`", dataset.manifest().name)).collect();
    names.join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Reading;
    use super::super::testing::manifest;
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

    #[test]
    fn a_dataset_that_no_stage_draws_from_may_be_small() {
        let store = Store::open("memory://").unwrap();
        let mut spec = spec();
        spec.stages.remove(0);
        let datasets = [("a", 5), ("b", 0)].map(|(name, tokens)| {
            Dataset::new(&store, manifest(name, tokens, tokens), Reading::default())
        });
        check_fit(&spec, &datasets).unwrap();
    }
}
