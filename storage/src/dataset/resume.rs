//! What an unfinished preparation leaves in the store so that it can be gone on with.
//!
//! Beside the shards lie `progress-TAG.json`, how far it has come, and `progress-tokens-00000-TAG.json`
//! and its like, the entries of 256 shards each: after each shard one of them and then the progress are
//! written, so that what is written does not grow with what is done. They go when the manifest is
//! there, and so does what other makers have left; see [`tidy`].

use std::collections::HashSet;

use looptrain_proto::Digest;
use serde::{Deserialize, Serialize};

use super::names::{Names, is_made};
use super::pack::Work;
use super::{Dataset, ShardEntry, Split, dataset_prefix};
use crate::{Result, Store};

/// Entries in a file.
const SEGMENT: u64 = 256;

/// `progress-TAG.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Digest of options and sources.
    pub(super) sources: Digest,
    pub(super) tokenizer: Digest,
    pub(super) work: Work,
}

impl Progress {
    pub(super) fn new(sources: Digest, tokenizer: Digest, work: Work) -> Self {
        Self { sources, tokenizer, work }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and digests have a JSON form")
    }
}

/// What lies in the store of a preparation.
pub(super) struct Left {
    pub(super) progress: Progress,
    pub(super) tokenizer: Vec<u8>,
    train: Vec<ShardEntry>,
    validation: Vec<ShardEntry>,
}

/// The shards of both splits so far.
#[derive(Default)]
pub(super) struct Entries {
    train: Vec<ShardEntry>,
    validation: Vec<ShardEntry>,
}

impl Entries {
    pub(super) fn split(&mut self, split: Split) -> &mut Vec<ShardEntry> {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
        }
    }

    /// The file of entries that the newest shard of a split belongs to, and its content.
    pub(super) fn segment(&mut self, names: &Names, split: Split) -> (String, Vec<u8>) {
        let entries = self.split(split);
        let segment = (entries.len() as u64).saturating_sub(1) / SEGMENT;
        let json = serde_json::to_vec(&entries[(segment * SEGMENT) as usize..]);
        (names.segment(split, segment), json.expect("names and digests have a JSON form"))
    }

    /// Everything that was written beside the shards, but for the tokenizer.
    pub(super) fn files(&mut self, names: &Names) -> Vec<String> {
        let mut files = vec![names.progress()];
        for split in [Split::Train, Split::Validation] {
            let segments = (self.split(split).len() as u64).div_ceil(SEGMENT);
            files.extend((0..segments).map(|segment| names.segment(split, segment)));
        }
        files
    }
}

impl Left {
    /// What a preparation of the same things has left of the dataset, when it can be gone on with:
    /// damaged files are as good as none.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn find(
        store: &Store,
        name: &str,
        names: &Names,
        sources: Digest,
    ) -> Result<Option<Self>> {
        let key = |file: &str| format!("{}/{file}", dataset_prefix(name));
        let Some(json) = store.get_opt(&key(&names.progress())).await? else { return Ok(None) };
        let Ok(progress) = serde_json::from_slice::<Progress>(&json) else { return Ok(None) };
        let tokenizer = store.get_opt(&key(&names.tokenizer())).await?;
        let Some(tokenizer) = tokenizer.filter(|json| Digest::of(json) == progress.tokenizer)
        else {
            return Ok(None);
        };
        if progress.sources != sources {
            return Ok(None);
        }
        let mut splits = [Vec::new(), Vec::new()];
        for (entries, split) in splits.iter_mut().zip([Split::Train, Split::Validation]) {
            let wanted = progress.work.split(split).shards;
            for segment in 0..wanted.div_ceil(SEGMENT) {
                let json = store.get_opt(&key(&names.segment(split, segment))).await?;
                let read = json.and_then(|json| serde_json::from_slice(&json).ok());
                let Some(read): Option<Vec<ShardEntry>> = read else { return Ok(None) };
                entries.extend(read);
            }
            // The entry of a shard is written before the progress that counts it.
            if (entries.len() as u64) < wanted {
                return Ok(None);
            }
            entries.truncate(wanted as usize);
        }
        let [train, validation] = splits;
        let left = Self { progress, tokenizer: tokenizer.to_vec(), train, validation };
        Ok(left.is_whole(store, name).await?.then_some(left))
    }

    /// Whether the shards that are to be kept are there, in their size.
    async fn is_whole(&self, store: &Store, name: &str) -> Result<bool> {
        let prefix = dataset_prefix(name);
        let listed = store.list(&prefix).await?;
        let sizes: std::collections::HashMap<_, _> =
            listed.iter().map(|object| (object.key.as_str(), object.size)).collect();
        let mut shards = self.train.iter().chain(&self.validation);
        Ok(shards.all(|shard| {
            sizes.get(format!("{prefix}/{}", shard.file).as_str()) == Some(&shard.bytes)
        }))
    }

    pub(super) fn entries(&self) -> Entries {
        Entries { train: self.train.clone(), validation: self.validation.clone() }
    }
}

/// Whether makers of any kind have left files where the dataset is to be.
///
/// # Errors
/// When the store fails.
pub(super) async fn is_begun(store: &Store, name: &str) -> Result<bool> {
    let prefix = format!("{}/", dataset_prefix(name));
    let listed = store.list(&dataset_prefix(name)).await?;
    Ok(listed.iter().any(|object| object.key.strip_prefix(&prefix).is_some_and(is_made)))
}

/// Removes what makers have left beside a dataset that is complete: files of theirs that its manifest
/// does not name, of which `known` are some that a listing may lack. Who is still making one under
/// this name is too late anyway, and says so when he ends. Without a manifest nothing goes.
///
/// # Errors
/// When the store fails.
pub(super) async fn tidy(store: &Store, name: &str, known: &[String]) -> Result<()> {
    let prefix = format!("{}/", dataset_prefix(name));
    let listed = store.list(&dataset_prefix(name)).await?;
    let listed = listed.iter().filter_map(|object| object.key.strip_prefix(&prefix));
    let files: HashSet<&str> = listed.chain(known.iter().map(String::as_str)).collect();
    // The one that stands now, whoever made it.
    let Some(dataset) = Dataset::open(store, name).await? else { return Ok(()) };
    let named: HashSet<&str> = dataset.manifest().files().collect();
    for file in files.into_iter().filter(|file| is_made(file) && !named.contains(file)) {
        store.delete(&format!("{prefix}{file}")).await?;
    }
    Ok(())
}
