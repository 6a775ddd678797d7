//! Reading a dataset: sequences out of shards, of which no more is fetched than the blocks that hold
//! them; see [`super::blocks`].

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::{StreamExt, iter};
use looptrain_proto::{Digest, spec};
use tokio::sync::OnceCell;

use super::blocks::{Piece, Reading, ShardFile};
use super::local::{LocalFault, LocalFile};
use super::shard::{self, Tokens};
use super::{DatasetManifest, Split, TextTokenizer, dataset_prefix, manifest_key};
use crate::{Error, Result, Store, Tries, blocking};

/// Sequences that are found at once; reads of the store are bounded for all together.
const AT_ONCE: usize = 32;

/// A dataset in a store. Cheap to clone; clones share what is in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    manifest: DatasetManifest,
    /// First token of every shard within its split.
    train_starts: Vec<u64>,
    validation_starts: Vec<u64>,
    reading: Reading,
    tokenizer: OnceCell<TextTokenizer>,
}

impl Dataset {
    /// The dataset `name`, `None` when there is no manifest.
    ///
    /// # Errors
    /// When the store fails or the manifest is not one this program can read.
    pub async fn open(store: &Store, name: &str) -> Result<Option<Self>> {
        Self::open_with(store, name, &Reading::default()).await
    }

    /// As [`Dataset::open`], to be read as `reading` says, together with others.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub async fn open_with(store: &Store, name: &str, reading: &Reading) -> Result<Option<Self>> {
        let key = manifest_key(name);
        let Some(bytes) = store.get_opt(&key).await? else { return Ok(None) };
        let malformed = |reason: String| Error::Malformed { place: store.place(&key), reason };
        let manifest: DatasetManifest =
            serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        match manifest.complaint(name) {
            Some(reason) => Err(malformed(reason)),
            None => Ok(Some(Self::new(store, manifest, reading.clone()))),
        }
    }

    pub(super) fn new(store: &Store, manifest: DatasetManifest, reading: Reading) -> Self {
        let starts = |split| {
            let mut next = 0;
            let shards = manifest.split(split).shards.iter();
            shards.map(|shard| (next, next += shard.tokens).0).collect()
        };
        Self {
            inner: Arc::new(Inner {
                train_starts: starts(Split::Train),
                validation_starts: starts(Split::Validation),
                store: store.clone(),
                manifest,
                reading,
                tokenizer: OnceCell::new(),
            }),
        }
    }

    /// What is in the dataset.
    #[must_use]
    pub fn manifest(&self) -> &DatasetManifest {
        &self.inner.manifest
    }

    /// What pins a run to this dataset: [`DatasetManifest::digest`].
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.manifest().digest()
    }

    /// Whether the dataset was made with the options `given`. Options are compared as they are
    /// written, not the files that they find: those may have changed since, and look different
    /// from elsewhere.
    ///
    /// # Errors
    /// [`Error::OtherSource`] with the options that differ.
    pub fn check_source(&self, given: &spec::Source) -> Result<()> {
        let manifest = self.manifest();
        let differences = manifest.source.differences(given);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::OtherSource {
            dataset: manifest.name.clone(),
            place: self.inner.store.place(&dataset_prefix(&manifest.name)),
            differences: differences.join(", "),
        })
    }

    /// The tokenizer that made the tokens; read once.
    ///
    /// # Errors
    /// When it cannot be read or is not the one of the manifest.
    pub async fn tokenizer(&self) -> Result<TextTokenizer> {
        let read = || async {
            let bytes = self.tokenizer_json().await?;
            let end = self.manifest().end_of_text;
            blocking(move || TextTokenizer::with_end_of_text(&bytes, end)).await?
        };
        self.inner.tokenizer.get_or_try_init(read).await.cloned()
    }

    /// The `tokenizer.json` that the text was tokenized with.
    ///
    /// # Errors
    /// When it is missing, or not the one that the manifest names.
    pub async fn tokenizer_json(&self) -> Result<Bytes> {
        let key = self.manifest().tokenizer_key();
        let bytes = self.inner.store.get(&key).await?;
        let (expected, found) = (self.manifest().tokenizer_digest, Digest::of(&bytes));
        if found != expected {
            return Err(self.corrupt(&key, expected, found));
        }
        Ok(bytes)
    }

    /// Sequences of `sequence_length` tokens (and one more, the last target) in a split: they
    /// overlap by that one token, so there are (tokens - 1) / `sequence_length`.
    #[must_use]
    pub fn sequences(&self, split: Split, sequence_length: usize) -> u64 {
        let tokens = self.manifest().split(split).tokens;
        tokens.saturating_sub(1).checked_div(sequence_length as u64).unwrap_or(0)
    }

    /// Tokens `[index * L, index * L + L + 1)` of a split, for L = `sequence_length`.
    ///
    /// # Errors
    /// When there is no such sequence, or a shard cannot be read or is damaged.
    pub async fn read_sequence(
        &self,
        split: Split,
        sequence_length: usize,
        index: u64,
    ) -> Result<Vec<u32>> {
        read_sequences(&[(self, index)], split, sequence_length).await
    }

    /// What holds the same sequence.
    async fn find_sequence(
        &self,
        split: Split,
        sequence_length: usize,
        index: u64,
    ) -> Result<Sequence> {
        let sequences = self.sequences(split, sequence_length);
        if index >= sequences {
            return Err(Error::OutOfRange {
                place: format!("the {split} split of dataset `{}`", self.manifest().name),
                index,
                sequences,
                sequence_length,
            });
        }
        let starts = match split {
            Split::Train => &self.inner.train_starts,
            Split::Validation => &self.inner.validation_starts,
        };
        let mut missing = sequence_length as u64 + 1;
        let mut position = index * sequence_length as u64;
        let mut pieces = Vec::with_capacity(2);
        // The last shard that begins at or before the position; empty shards are passed over.
        let mut shard = starts.partition_point(|&start| start <= position) - 1;
        while missing > 0 {
            let first = position - starts[shard];
            let here = missing.min(self.manifest().split(split).shards[shard].tokens - first);
            if here > 0 {
                self.find(split, shard, first, here, &mut pieces).await?;
            }
            missing -= here;
            shard += 1;
            position = starts.get(shard).copied().unwrap_or(position);
        }
        Ok(Sequence { dataset: self.clone(), split, sequence_length, index, pieces })
    }

    /// Adds what holds some tokens of a shard to `out`.
    async fn find(
        &self,
        split: Split,
        index: usize,
        first: u64,
        count: u64,
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        let Inner { store, manifest, reading, .. } = &*self.inner;
        let entry = &manifest.split(split).shards[index];
        let dataset = dataset_prefix(&manifest.name);
        let key = format!("{dataset}/{}", entry.file);
        let shard = ShardFile {
            store,
            key: &key,
            digest: entry.digest,
            bytes: entry.bytes,
            tokens: entry.tokens,
            dtype: manifest.dtype,
            dataset: &dataset,
        };
        reading.pieces(shard, first, count, out).await
    }

    /// Nats per token of the validation split under the unigram model of the training split, with
    /// one added to every count: what a model that knows only token frequencies reaches.
    ///
    /// # Errors
    /// When the manifest does not say and the shards cannot be read.
    pub async fn unigram_loss(&self) -> Result<f64> {
        if let Some(loss) = self.manifest().unigram_loss {
            return Ok(loss);
        }
        let (train, validation) =
            (self.count(Split::Train).await?, self.count(Split::Validation).await?);
        Ok(unigram_loss(&train, &validation))
    }

    async fn count(&self, split: Split) -> Result<Vec<u64>> {
        let mut counts = vec![0_u64; self.manifest().vocabulary_size];
        let shards = 0..self.manifest().split(split).shards.len();
        let mut shards = iter(shards.map(|index| self.whole(split, index))).buffered(2);
        let mut tokens = Vec::new();
        while let Some(shard) = shards.try_next().await? {
            tokens.clear();
            shard.extend(&mut tokens, 0, shard.len());
            for &token in &tokens {
                // `whole` has checked that tokens are in the vocabulary.
                counts[token as usize] += 1;
            }
        }
        Ok(counts)
    }

    /// All tokens of a shard, for those who want all of them.
    async fn whole(&self, split: Split, index: usize) -> Result<Tokens> {
        let Inner { store, manifest, .. } = &*self.inner;
        let entry = manifest.split(split).shards[index].clone();
        let key = format!("{}/{}", dataset_prefix(&manifest.name), entry.file);
        let bytes = store.get(&key).await?;
        let (found, bytes) = blocking(move || (Digest::of(&bytes), bytes)).await?;
        if found != entry.digest {
            return Err(self.corrupt(&key, entry.digest, found));
        }
        let vocabulary = manifest.vocabulary_size;
        let tokens = blocking(move || {
            let tokens = shard::decode(&bytes)?;
            if tokens.len() as u64 != entry.tokens {
                let (has, says) = (tokens.len(), entry.tokens);
                return Err(format!("it has {has} tokens, the manifest says {says}"));
            }
            match tokens.largest() {
                Some(token) if token as usize >= vocabulary => {
                    Err(format!("token {token} is not in the vocabulary of {vocabulary}"))
                }
                _ => Ok(tokens),
            }
        });
        let malformed = |reason| Error::Malformed { place: store.place(&key), reason };
        tokens.await?.map_err(malformed)
    }

    fn corrupt(&self, key: &str, expected: Digest, found: Digest) -> Error {
        let store = &self.inner.store;
        let remedy = remedy(store, &dataset_prefix(&self.manifest().name));
        Error::Corrupt { place: store.place(key), expected, found, remedy }
    }
}

/// Some sequences, of any datasets, one after the other.
///
/// # Errors
/// As [`Dataset::read_sequence`], for the first that fails.
pub async fn read_sequences(
    wanted: &[(&Dataset, u64)],
    split: Split,
    sequence_length: usize,
) -> Result<Vec<u32>> {
    let find = |(dataset, index): (Dataset, u64)| async move {
        dataset.find_sequence(split, sequence_length, index).await
    };
    let wanted: Vec<_> = wanted.iter().map(|&(dataset, index)| (dataset.clone(), index)).collect();
    let found: Vec<Sequence> = iter(wanted).map(find).buffered(AT_ONCE).try_collect().await?;
    let is_local = |piece: &Piece| matches!(piece, Piece::Local { .. });
    let local = found.iter().any(|sequence| sequence.pieces.iter().any(is_local));
    let copy = move || {
        let mut tokens = Vec::with_capacity(found.len() * (sequence_length + 1));
        let mut scratch = Vec::new();
        for sequence in &found {
            sequence.append_to(&mut tokens, &mut scratch)?;
        }
        Ok(tokens)
    };
    // Together, for each way to another thread and back takes longer than a read from memory.
    if local { blocking(copy).await? } else { copy() }
}

/// A sequence of a dataset, and what holds it.
#[derive(Debug)]
struct Sequence {
    dataset: Dataset,
    split: Split,
    sequence_length: usize,
    index: u64,
    pieces: Vec<Piece>,
}

impl Sequence {
    /// Appends its tokens to `out`; reads local files.
    fn append_to(&self, out: &mut Vec<u32>, scratch: &mut Vec<u8>) -> Result<()> {
        let begin = out.len();
        for piece in &self.pieces {
            match piece {
                Piece::Block { dtype, bytes } => dtype.extend(out, bytes),
                Piece::Local { file, first, count } => {
                    let read = file.append(*first, *count, out, scratch);
                    let reads = read.map_err(|fault| self.failed(file, fault))?;
                    self.dataset.inner.reading.count(reads);
                }
            }
        }
        let Inner { store, manifest, .. } = &*self.dataset.inner;
        let vocabulary = manifest.vocabulary_size;
        match out[begin..].iter().max() {
            Some(&token) if token as usize >= vocabulary => {
                let Self { split, sequence_length, index, .. } = self;
                let reason = format!(
                    "token {token} is not in the vocabulary of {vocabulary}, in the {split} sequence {index} of {sequence_length} tokens; prepare the dataset again"
                );
                let place = store.place(&dataset_prefix(&manifest.name));
                Err(Error::Malformed { place, reason })
            }
            _ => Ok(()),
        }
    }

    fn failed(&self, file: &LocalFile, fault: LocalFault) -> Error {
        let Inner { store, manifest, .. } = &*self.dataset.inner;
        match fault {
            LocalFault::Io(error) => {
                let (operation, place) = ("read", file.name().to_owned());
                let (reason, tries) = (error.to_string(), Tries::default());
                Error::Operation { operation, place, reason, tries }
            }
            LocalFault::Damaged { block, expected, found } => {
                let (begin, length) = file.place(block);
                let place = format!("{} (bytes {begin} to {})", file.name(), begin + length - 1);
                let remedy = remedy(store, &dataset_prefix(&manifest.name));
                Error::Corrupt { place, expected: Digest(expected), found: Digest(found), remedy }
            }
        }
    }
}

/// What to do about a damaged file of a dataset.
pub(super) fn remedy(store: &Store, dataset: &str) -> String {
    format!(
        "restore the file, or delete {} and start again to prepare the dataset anew",
        store.place(dataset)
    )
}

/// Cross-entropy of the validation counts under the smoothed training counts.
pub(super) fn unigram_loss(train: &[u64], validation: &[u64]) -> f64 {
    let total = (train.iter().sum::<u64>() + train.len() as u64) as f64;
    let nats = |(&seen, &count): (&u64, &u64)| count as f64 * (total / (seen + 1) as f64).ln();
    let tokens = validation.iter().sum::<u64>().max(1);
    train.iter().zip(validation).map(nats).sum::<f64>() / tokens as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ReadingOptions, ShardEntry, SplitManifest, TokenType, testing};
    use super::*;

    /// A dataset of `tokens` in shards of `shard_tokens`, the validation split alike.
    async fn dataset(tokens: &[u32], shard_tokens: usize, memory: usize) -> (Store, Dataset) {
        let reading = Reading::new(ReadingOptions { memory, disk: None });
        let store = Store::open("memory://").unwrap();
        let mut splits = [SplitManifest::default(), SplitManifest::default()];
        for (split, name) in splits.iter_mut().zip(["tokens", "validation"]) {
            for (index, tokens) in tokens.chunks(shard_tokens).enumerate() {
                let bytes =
                    shard::encode(TokenType::U16, tokens, &vec![false; tokens.len()]).unwrap();
                let file = format!("{name}-{index:05}.arrow");
                split.shards.push(ShardEntry {
                    file: file.clone(),
                    tokens: tokens.len() as u64,
                    documents: 0,
                    bytes: bytes.len() as u64,
                    digest: Digest::of(&bytes),
                });
                split.tokens += tokens.len() as u64;
                store.put(&format!("datasets/d/{file}"), bytes).await.unwrap();
            }
        }
        let [train, validation] = splits;
        let manifest = DatasetManifest { train, validation, ..testing::manifest("d", 0, 0) };
        store
            .put("datasets/d/manifest.json", serde_json::to_vec(&manifest).unwrap())
            .await
            .unwrap();
        let dataset = Dataset::new(&store, manifest, reading);
        (store, dataset)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_sequence_is_the_same_however_the_stream_is_cut_into_shards(
            length in 1_usize..300, shard_tokens in 1_usize..80, sequence_length in 1_usize..60,
            memory in prop::sample::select(vec![0, 4096, 1 << 20]),
        ) {
            let tokens: Vec<u32> = (0..length as u32).map(|i| i * 7 % 1000).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (_, dataset) = dataset(&tokens, shard_tokens, memory).await;
                let sequences = dataset.sequences(Split::Train, sequence_length);
                assert_eq!(sequences as usize, (length - 1) / sequence_length);
                for index in 0..sequences {
                    let read =
                        dataset.read_sequence(Split::Train, sequence_length, index).await.unwrap();
                    let start = index as usize * sequence_length;
                    assert_eq!(read, tokens[start..=start + sequence_length]);
                }
            });
        }
    }

    #[tokio::test]
    async fn a_sequence_past_the_end_is_refused() {
        let (_, dataset) = dataset(&[1; 100], 50, 1000).await;
        let error = dataset.read_sequence(Split::Validation, 33, 3).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the validation split of dataset `d` has 3 sequences of 33 tokens; there is no number 3"
        );
    }

    #[tokio::test]
    async fn a_damaged_shard_is_named_with_both_digests_and_a_remedy() {
        // Shards of different tokens: what is known of one is not taken for the other.
        let tokens: Vec<u32> = (0..100).collect();
        let (store, dataset) = dataset(&tokens, 50, 1000).await;
        let key = "datasets/d/tokens-00001.arrow";
        let mut bytes = store.get(key).await.unwrap().to_vec();
        let expected = Digest::of(&bytes);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let found = Digest::of(&bytes);
        store.put(key, bytes).await.unwrap();
        dataset.read_sequence(Split::Train, 10, 0).await.unwrap();
        let error = dataset.read_sequence(Split::Train, 10, 7).await.unwrap_err().to_string();
        for part in [key, &expected.to_string(), &found.to_string(), "restore the file"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[tokio::test]
    async fn a_tokenizer_that_is_not_the_one_of_the_manifest_is_refused() {
        let (store, dataset) = dataset(&[1; 100], 50, 1000).await;
        assert!(matches!(dataset.tokenizer().await, Err(Error::NotFound { .. })));
        store.put("datasets/d/tokenizer.json", "{ }").await.unwrap();
        let error = dataset.tokenizer().await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("datasets/d/tokenizer.json"), "{error}");
    }

    #[tokio::test]
    async fn a_shard_with_foreign_tokens_is_refused() {
        let (_, dataset) = dataset(&[1000; 100], 50, 1000).await;
        let error = dataset.read_sequence(Split::Train, 10, 0).await.unwrap_err().to_string();
        assert!(error.contains("token 1000 is not in the vocabulary"), "{error}");
    }

    #[tokio::test]
    async fn the_unigram_loss_is_that_of_token_frequencies() {
        // 1000 entries, 3/4 of the tokens are 5: (301 of 1400), (101 of 1400) after smoothing.
        let tokens: Vec<u32> = (0..400).map(|i| if i % 4 == 0 { 9 } else { 5 }).collect();
        let (_, dataset) = dataset(&tokens, 64, 1000).await;
        let expected = -(0.75 * (301.0_f64 / 1400.0).ln() + 0.25 * (101.0_f64 / 1400.0).ln());
        assert!((dataset.unigram_loss().await.unwrap() - expected).abs() < 1e-12);
    }

    #[tokio::test]
    async fn a_dataset_is_there_once_its_manifest_is() {
        let store = Store::open("memory://").unwrap();
        store.put("datasets/d/tokens-00000.arrow", "half").await.unwrap();
        assert!(Dataset::open(&store, "d").await.unwrap().is_none());
        let (store, made) = dataset(&[1; 100], 50, 1000).await;
        let opened = Dataset::open(&store, "d").await.unwrap().unwrap();
        assert_eq!(opened.manifest(), made.manifest());

        let mut newer = made.manifest().clone();
        newer.version = 9;
        store.put("datasets/d/manifest.json", serde_json::to_vec(&newer).unwrap()).await.unwrap();
        let error = Dataset::open(&store, "d").await.unwrap_err().to_string();
        assert!(error.contains("manifest.json") && error.contains("version 9"), "{error}");
        store.put("datasets/d/manifest.json", "{").await.unwrap();
        assert!(matches!(Dataset::open(&store, "d").await, Err(Error::Malformed { .. })));
    }
}
