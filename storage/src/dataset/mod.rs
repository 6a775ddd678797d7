//! Datasets: a token stream in shards, its tokenizer, and the manifest that makes them one thing.
//!
//! A dataset is `datasets/<name>/` in the store: a tokenizer, the Arrow IPC shards of its two splits,
//! and `manifest.json`, written last. Without a manifest there is no dataset, whatever else
//! lies there; with one, every other file is named in it with its blake3 digest, so that a reader
//! never trains on bytes that were not written.
//!
//! [`prepare`] makes a dataset from text; [`Dataset`] reads one. The same files and options give
//! byte-identical shards: no clock, no randomness, no dependence on thread timing.

mod blocks;
mod cache;
mod contents;
mod disk;
#[cfg(test)]
mod files_tests;
mod fit;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod hedge;
mod inspect;
mod local;
#[cfg(test)]
mod makers_tests;
mod making;
mod manifest;
mod names;
mod pack;
mod prepare;
#[cfg(test)]
mod prepare_tests;
mod read;
mod resume;
mod shard;
mod source;
mod synthetic;
#[cfg(test)]
mod testing;
mod tokenizer;
mod train_tokenizer;
mod tree;
mod verify;
mod words;

pub use blocks::{ReadCounts, Reading, ReadingOptions};
pub use fit::check_fit;
pub use inspect::{Bucket, Lengths, SampleText, inspect};
pub use manifest::{DatasetManifest, Input, ShardEntry, SourceSummary, Split, SplitManifest};
pub use prepare::{Origin, PrepareEvent, Recipe, prepare, prepare_from};
pub use read::{Dataset, read_sequences};
pub use shard::TokenType;
pub use source::Mano;
pub use synthetic::{Synthetic, synthetic};
pub use tokenizer::TextTokenizer;
pub use train_tokenizer::{
    InputSample, TrainedTokenizer, read_tokenizer, train_tokenizer, write_tokenizer,
};
pub use verify::{BadFile, verify};

/// Where everything of a dataset lives in its store.
#[must_use]
pub fn dataset_prefix(name: &str) -> String {
    format!("datasets/{name}")
}

fn manifest_key(name: &str) -> String {
    format!("{}/manifest.json", dataset_prefix(name))
}
