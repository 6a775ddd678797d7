//! The manifest of a dataset: what is in it, and the digest of every file.

use looptrain_proto::{Digest, spec};
use serde::{Deserialize, Serialize};

use super::tokenizer::LARGEST_VOCABULARY;
use super::{TokenType, dataset_prefix};

/// The two parts of a dataset; no document is in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// What stages draw from.
    Train,
    /// What evaluations read.
    Validation,
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Train => "training",
            Self::Validation => "validation",
        })
    }
}

/// `manifest.json` of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetManifest {
    /// Version of this format: [`DatasetManifest::VERSION`].
    pub version: u32,
    /// Name of the dataset, as in its prefix.
    pub name: String,
    /// Entries of the tokenizer; every token is below it.
    pub vocabulary_size: usize,
    /// File name of the tokenizer beside the manifest.
    #[serde(default = "tokenizer_before")]
    pub tokenizer: String,
    /// Digest of that file.
    pub tokenizer_digest: Digest,
    /// The token after each document.
    #[serde(default)]
    pub end_of_text: u32,
    /// Width of a token in the shards.
    pub dtype: TokenType,
    /// The training split.
    pub train: SplitManifest,
    /// The validation split.
    pub validation: SplitManifest,
    /// Nats per validation token under the unigram model of the training split; see
    /// [`super::Dataset::unigram_loss`].
    #[serde(default)]
    pub unigram_loss: Option<f64>,
    /// Where the text came from.
    pub source: SourceSummary,
}

impl DatasetManifest {
    /// The version this program writes and reads.
    pub const VERSION: u32 = 1;

    /// One split of the dataset.
    #[must_use]
    pub fn split(&self, split: Split) -> &SplitManifest {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Names of all other files of the dataset.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        let shards = self.train.shards.iter().chain(&self.validation.shards);
        std::iter::once(self.tokenizer.as_str()).chain(shards.map(|shard| shard.file.as_str()))
    }

    /// Key of the tokenizer in the store.
    pub(super) fn tokenizer_key(&self) -> String {
        format!("{}/{}", dataset_prefix(&self.name), self.tokenizer)
    }

    /// Digest of what decides the tokens and their meaning: tokenizer, vocabulary, and the shards
    /// of both splits in their order. Name and provenance do not enter.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let shards = |split: &SplitManifest| {
            split.shards.iter().map(|shard| (shard.tokens, shard.digest)).collect::<Vec<_>>()
        };
        let decides = (
            self.tokenizer_digest,
            self.vocabulary_size,
            shards(&self.train),
            shards(&self.validation),
        );
        let text = serde_json::to_string(&decides).expect("digests and numbers have a JSON form");
        Digest::of(text.as_bytes())
    }

    /// What contradicts itself or what this program cannot read, if anything.
    pub(super) fn complaint(&self, name: &str) -> Option<String> {
        if self.version != Self::VERSION {
            return Some(format!(
                "it has format version {}, this program reads {}; prepare the dataset anew under another name",
                self.version,
                Self::VERSION
            ));
        }
        if self.name != name {
            return Some(format!("it belongs to the dataset `{}`", self.name));
        }
        // A file's name comes from outside and becomes a key.
        if let Some(file) = self.files().find(|file| file.contains('/')) {
            return Some(format!("it names the file `{file}`, which is elsewhere"));
        }
        if self.vocabulary_size > LARGEST_VOCABULARY {
            return Some(format!(
                "its vocabulary has {} entries, more than {LARGEST_VOCABULARY}",
                self.vocabulary_size
            ));
        }
        // The numbers come from outside, too, and may add up to more than there are.
        let sum = |split: &SplitManifest| {
            split.shards.iter().try_fold(0, |sum: u64, shard| sum.checked_add(shard.tokens))
        };
        let uneven = |split: &SplitManifest| sum(split) != Some(split.tokens);
        (uneven(&self.train) || uneven(&self.validation))
            .then(|| "its shards do not sum to its tokens".to_owned())
    }
}

/// What every tokenizer was called before its name had a tag.
fn tokenizer_before() -> String {
    "tokenizer.json".to_owned()
}

/// One split: its totals and its shards, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitManifest {
    /// Tokens, the end-of-text token after each document counted.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// The files that hold the tokens.
    pub shards: Vec<ShardEntry>,
}

/// One file of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name beside the manifest.
    pub file: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Documents that begin in it.
    pub documents: u64,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Digest of the file.
    pub digest: Digest,
}

/// What a dataset was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceSummary {
    /// The options of the spec.
    pub options: spec::Source,
    /// Files with fitting names that were looked at.
    pub files: u64,
    /// The first of them; a sample does not name its files.
    #[serde(default)]
    pub inputs: Vec<Input>,
    /// Digest of the names, sizes and times of all files, or of all texts of a sample.
    #[serde(default)]
    pub inputs_digest: Option<Digest>,
    /// Records that were read.
    #[serde(default)]
    pub records: u64,
    /// Records left out because they hold no text where it should be.
    #[serde(default)]
    pub malformed: u64,
    /// Records left out because their text is empty.
    #[serde(default)]
    pub empty: u64,
    /// Documents left out because another one has the same text.
    pub duplicates: u64,
    /// Files left out because they are empty, not UTF-8 text or cannot be read.
    pub unreadable: u64,
}

/// A file that a dataset was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Input {
    /// Where it lay.
    pub url: String,
    /// Its size.
    pub bytes: u64,
}

impl SourceSummary {
    /// Files that are named at most: a manifest is read whole.
    pub(super) const MAX_INPUTS: usize = 1000;

    /// The options that differ in `given`, as `KEY is GIVEN, was RECORDED`.
    pub(super) fn differences(&self, given: &spec::Source) -> Vec<String> {
        // By way of JSON, so that an option added to the spec is never forgotten here.
        let fields = |source| serde_json::to_value(source).expect("a source has a JSON form");
        let (given, recorded) = (fields(given), fields(&self.options));
        let recorded = recorded.as_object().into_iter().flatten();
        let differs = recorded.filter(|(key, recorded)| given[key.as_str()] != **recorded);
        differs.map(|(key, was)| format!("{key} is {}, was {was}", given[key.as_str()])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::manifest;
    use super::*;

    #[test]
    fn numbers_that_nothing_can_have_are_refused() {
        let good = manifest("text", 100, 20);
        assert_eq!(good.complaint("text"), None);
        // Both wrap around to what the split says.
        let mut wraps = good.clone();
        let mut more = wraps.train.shards[0].clone();
        (more.tokens, wraps.train.tokens) = (u64::MAX, 99);
        wraps.train.shards.push(more);
        assert!(wraps.complaint("text").is_some_and(|said| said.contains("do not sum")));
        let wide = DatasetManifest { vocabulary_size: usize::MAX, ..good };
        assert!(wide.complaint("text").is_some_and(|said| said.contains("vocabulary")));
    }

    #[test]
    fn the_digest_is_that_of_the_tokens_whatever_the_dataset_is_called() {
        let one = manifest("text", 100, 20);
        let mut renamed = DatasetManifest { name: "other".into(), ..one.clone() };
        renamed.unigram_loss = Some(1.0);
        renamed.source.options.max_bytes += 1;
        assert_eq!(renamed.digest(), one.digest());

        let changes: [fn(&mut DatasetManifest); 5] = [
            |manifest| manifest.tokenizer_digest = Digest::of(b"other"),
            |manifest| manifest.vocabulary_size += 1,
            |manifest| manifest.train.shards[0].digest = Digest::of(b"other"),
            |manifest| manifest.validation.shards[0].digest = Digest::of(b"other"),
            |manifest| manifest.train.shards.append(&mut manifest.validation.shards),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = one.clone();
            change(&mut changed);
            assert_ne!(changed.digest(), one.digest(), "change {index}");
        }
    }
}
