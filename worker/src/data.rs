//! The token sequences of a run: which sequence stands where, read from the store.
//!
//! [`Data::open`] checks once that the datasets go together and can serve every stage, so that a run
//! does not find out at its thousandth step, or never. After that a slot is a pure function of (spec, step,
//! slot number).

use std::ops::Range;
use std::sync::Arc;

use looptrain_model::{SlotBatch, document_starts};
use looptrain_proto::spec::Stage;
use looptrain_proto::{Spec, Step};
use looptrain_storage::{Dataset, Order, Reading, Split, Store, check_fit, read_sequences};

/// Data that is missing, does not fit the spec, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// There is no such dataset.
    #[error(
        "there is no dataset `{dataset}` in {store}; a worker reads the store of its coordinator, and the coordinator makes there what has a [datasets.source] in its spec"
    )]
    Missing {
        /// Name in the spec.
        dataset: String,
        /// URL of the store.
        store: String,
    },
    /// The tokenizer has more entries than the model.
    #[error(
        "dataset `{dataset}` has a vocabulary of {vocabulary}, more than model.vocab_size = {model}; raise that to at least {vocabulary}"
    )]
    Vocabulary {
        /// Name in the spec.
        dataset: String,
        /// Entries of its tokenizer.
        vocabulary: usize,
        /// Rows of the model's embedding.
        model: usize,
    },
    /// There is no such step in the spec.
    #[error("the spec has no step {0}")]
    NoSuchStep(Step),
    /// The store failed, datasets are of two tokenizers, or a stage needs more than there is.
    #[error(transparent)]
    Store(#[from] looptrain_storage::Error),
}

impl DataError {
    /// Whether the same may be read later: the store is at fault, and not what it holds.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Self::Store(error) if error.may_pass())
    }
}

/// One slot of one step, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) batch: SlotBatch,
    /// Index of the dataset in the spec and of the sequence in it, in the batch's order.
    pub(crate) sequences: Vec<(usize, u64)>,
}

/// The datasets of a run and the order of their sequences.
#[derive(Debug)]
pub(crate) struct Data {
    spec: Arc<Spec>,
    /// As in the spec.
    datasets: Vec<Dataset>,
    /// One per stage.
    orders: Vec<Order>,
}

impl Data {
    pub(crate) async fn open(
        spec: Arc<Spec>,
        store: &Store,
        reading: &Reading,
    ) -> Result<Self, DataError> {
        let mut datasets = Vec::new();
        for dataset in &spec.datasets {
            let name = dataset.name.clone();
            let opened = Dataset::open_with(store, &name, reading).await?;
            let missing =
                || DataError::Missing { dataset: name.clone(), store: store.url().to_owned() };
            let opened = opened.ok_or_else(missing)?;
            let (vocabulary, model) = (opened.manifest().vocabulary_size, spec.model.vocab_size);
            if vocabulary > model {
                return Err(DataError::Vocabulary { dataset: name, vocabulary, model });
            }
            datasets.push(opened);
        }
        check_fit(&spec, &datasets)?;
        let stages = 0..spec.stages.len();
        let orders = stages.map(|stage| Order::of_stage(&spec, stage, &datasets)).collect();
        Ok(Self { spec, datasets, orders })
    }

    /// One slot of one step.
    pub(crate) async fn slot(&self, step: Step, slot: u32) -> Result<Slot, DataError> {
        let at = self.spec.position(step).ok_or(DataError::NoSuchStep(step))?;
        let stage = &self.spec.stages[at.stage];
        let mixture = self.spec.mixture(at.stage);
        let (length, count) = (stage.sequence_length, stage.slot_sequences);
        let first = at.first_sequence + u64::from(slot) * count as u64;
        let drawn = (first..first + count as u64).map(|index| {
            let place = self.orders[at.stage].at(index);
            (mixture[place.part].0, place.sequence)
        });
        let sequences: Vec<_> = drawn.collect();
        let wanted: Vec<(&Dataset, u64)> =
            sequences.iter().map(|&(dataset, at)| (&self.datasets[dataset], at)).collect();
        let tokens = read_sequences(&wanted, Split::Train, length).await?;
        let datasets: Vec<&Dataset> = wanted.into_iter().map(|(dataset, _)| dataset).collect();
        Ok(Slot { batch: batch(stage, &datasets, tokens), sequences })
    }

    /// Memory that a slot of a step takes, if there is such a step.
    pub(crate) fn slot_bytes(&self, step: Step) -> Option<usize> {
        let stage = &self.spec.stages[self.spec.position(step)?.stage];
        let starts = if stage.document_masking { stage.sequence_length } else { 0 };
        let sequence = 4 * (stage.sequence_length + 1 + starts) + 16;
        Some(size_of::<Slot>() + stage.slot_sequences * sequence)
    }

    /// The sequences `range` of an evaluation of `all`, for the stage of `step`, each a batch of its own,
    /// so that a sequence's share of the loss does not depend on its neighbours.
    ///
    /// The evaluation's sequences are spread evenly over each validation split, so that a few long
    /// documents do not stand for all; several datasets take turns: index `i` belongs to the
    /// `i % n`-th of `n`. What a split does not hold is left out.
    pub(crate) async fn validation(
        &self,
        step: Step,
        range: Range<u64>,
        all: u64,
    ) -> Result<Vec<SlotBatch>, DataError> {
        let index = self.spec.stage_of(step);
        let stage = &self.spec.stages[index];
        let length = stage.sequence_length;
        let mixture = self.spec.mixture(index);
        let turns = mixture.len() as u64;
        let wanted = all.div_ceil(turns);
        let mut batches = Vec::new();
        for index in range.start..range.end.min(all) {
            let (dataset, turn) = (mixture[(index % turns) as usize].0, index / turns);
            let held = self.datasets[dataset].sequences(Split::Validation, length);
            let sequence = if wanted <= held { spread(turn, wanted, held) } else { turn };
            if sequence < held {
                let dataset = &self.datasets[dataset];
                let tokens = dataset.read_sequence(Split::Validation, length, sequence).await?;
                batches.push(batch(stage, &[dataset], tokens));
            }
        }
        Ok(batches)
    }
}

/// A batch of a stage: sequences of `datasets`, one after the other.
fn batch(stage: &Stage, datasets: &[&Dataset], tokens: Vec<u32>) -> SlotBatch {
    let (sequences, sequence_length) = (datasets.len(), stage.sequence_length);
    let mut starts = Vec::new();
    if stage.document_masking {
        starts.reserve(sequences * sequence_length);
        for (dataset, tokens) in datasets.iter().zip(tokens.chunks_exact(sequence_length + 1)) {
            let inputs = &tokens[..sequence_length];
            let end = dataset.manifest().end_of_text;
            starts.extend(document_starts(inputs, sequence_length, end));
        }
    }
    SlotBatch { tokens, sequences, sequence_length, starts }
}

/// The `index`-th of `count` places spread evenly over `length`.
fn spread(index: u64, count: u64, length: u64) -> u64 {
    (u128::from(index) * u128::from(length) / u128::from(count)) as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::spec::{self, MixturePart};
    use looptrain_storage::{Synthetic, synthetic};

    use super::*;
    use crate::testing::{tiny_spec, tiny_store};

    async fn refusal(change: impl FnOnce(&mut Spec)) -> String {
        let (spec, store) = tiny_store().await;
        let mut spec = (*spec).clone();
        change(&mut spec);
        Data::open(Arc::new(spec), &store, &Reading::default()).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn a_dataset_that_is_not_there_is_named_with_its_store() {
        let store = Store::open("memory://nothing-here").unwrap();
        let spec = Arc::new(tiny_spec("memory://nothing-here"));
        let text = Data::open(spec, &store, &Reading::default()).await.unwrap_err().to_string();
        assert!(text.contains("no dataset `text` in memory://nothing-here"), "{text}");
        assert!(text.contains("[datasets.source]") && !text.contains("prepare"), "{text}");
    }

    #[tokio::test]
    async fn what_does_not_fit_the_spec_is_found_before_the_first_step() {
        let text = refusal(|spec| spec.model.vocab_size = 270).await;
        assert!(text.contains("more than model.vocab_size = 270"), "{text}");
        let text = refusal(|spec| spec.stages[0].sequence_length = 100_000).await;
        assert!(text.contains("training sequences") && text.contains("`only`"), "{text}");
    }

    #[tokio::test]
    async fn datasets_of_two_tokenizers_are_not_mixed() {
        let (spec, store) = tiny_store().await;
        let what = Synthetic { tokens: 9000, shard_tokens: 9000, vocabulary_size: 300 };
        synthetic(&store, "other", what).await.unwrap();
        let mut spec = (*spec).clone();
        spec.datasets.push(spec::Dataset { name: "other".into(), source: None });
        let part = |name: &str| MixturePart { dataset: name.into(), weight: 1 };
        spec.stages[0].mixture = vec![part("text"), part("other")];
        let opened = Data::open(Arc::new(spec), &store, &Reading::default()).await;
        let text = opened.unwrap_err().to_string();
        assert!(text.contains("not the tokenizer of dataset `text`"), "{text}");
        assert!(text.contains("/datasets/other/tokenizer-"), "{text}");
    }

    #[tokio::test]
    async fn documents_of_a_stage_that_masks_them_begin_after_each_end() {
        let (mut spec, store) = tiny_store().await;
        let open = |spec: Arc<Spec>| async { Data::open(spec, &store, &Reading::default()).await };
        let plain = open(Arc::clone(&spec)).await.unwrap();
        assert!(plain.slot(Step(1), 0).await.unwrap().batch.starts.is_empty());
        Arc::make_mut(&mut spec).stages[0].document_masking = true;
        let data = open(Arc::clone(&spec)).await.unwrap();
        let end = data.datasets[0].manifest().end_of_text;
        let mut ends = 0;
        let mut check = |batch: &SlotBatch| {
            let length = batch.sequence_length;
            let starts = batch.starts.chunks_exact(length);
            for (tokens, starts) in batch.tokens.chunks_exact(length + 1).zip(starts) {
                for (at, start) in starts.iter().enumerate() {
                    let before = tokens[..at].iter().rposition(|token| *token == end);
                    assert_eq!(*start as usize, before.map_or(0, |end| end + 1));
                }
                ends += tokens[..length].iter().filter(|token| **token == end).count();
            }
            assert_eq!(batch.starts.len(), batch.sequences * length);
        };
        for step in 1..=4 {
            for slot in 0..spec.slots_of(Step(step)) {
                let found = data.slot(Step(step), slot).await.unwrap().batch;
                check(&found);
                let plain = plain.slot(Step(step), slot).await.unwrap().batch;
                assert_eq!(plain.tokens, found.tokens);
            }
        }
        let all = data.spec.evaluation.sequences;
        let batches = data.validation(Step(1), 0..u64::MAX, all).await.unwrap();
        batches.iter().for_each(&mut check);
        assert!(ends > 0, "documents end within sequences");
    }

    #[tokio::test]
    async fn an_evaluation_is_spread_over_the_split() {
        let (spec, store) = tiny_store().await;
        let data = Data::open(spec, &store, &Reading::default()).await.unwrap();
        let held = data.datasets[0].sequences(Split::Validation, 8);
        assert!(held >= 8, "the split has {held} sequences");
        let found = data.validation(Step(1), 0..u64::MAX, 4).await.unwrap();
        assert_eq!(found.len(), 4);
        for (turn, batch) in found.iter().enumerate() {
            let place = turn as u64 * held / 4;
            let expected = data.datasets[0].read_sequence(Split::Validation, 8, place).await;
            assert_eq!(batch.tokens, expected.unwrap());
        }
    }

    #[tokio::test]
    async fn validation_stops_at_its_end_however_much_is_asked_for() {
        let (spec, store) = tiny_store().await;
        let every = 1 << 40;
        let data = Data::open(spec, &store, &Reading::default()).await.unwrap();
        let all = data.datasets[0].sequences(Split::Validation, 8);
        let some = data.validation(Step(1), 0..3, every).await.unwrap();
        let rest = data.validation(Step(1), 3..all + 9, every).await.unwrap();
        assert_eq!(some.len(), 3);
        assert_eq!((some.len() + rest.len()) as u64, all);
        assert!(rest.iter().all(|batch| batch.sequences == 1 && batch.tokens.len() == 9));
    }
}
