//! What an unfinished preparation leaves in the store so that it can be gone on with.
//!
//! Beside the shards lie `progress.json`, how far it has come, and `progress-tokens-00000.json` and
//! its like, the entries of 256 shards each: after each shard one of them and then `progress.json` are
//! written, so that what is written does not grow with what is done. They go when the manifest is
//! there.

use looptrain_proto::Digest;
use serde::{Deserialize, Serialize};

use super::pack::Work;
use super::{ShardEntry, Split, dataset_prefix, manifest_key};
use crate::{Error, Result, Store};

/// Entries in a file.
const SEGMENT: u64 = 256;
/// Changes when the same documents would be packed into other bytes.
const VERSION: u32 = 1;

/// `progress.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) version: u32,
    /// Digest of options and sources.
    pub(super) sources: Digest,
    pub(super) tokenizer: Digest,
    pub(super) work: Work,
}

impl Progress {
    pub(super) fn new(sources: Digest, tokenizer: Digest, work: Work) -> Self {
        Self { version: VERSION, sources, tokenizer, work }
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
    pub(super) fn segment(&mut self, split: Split) -> (String, Vec<u8>) {
        let entries = self.split(split);
        let segment = (entries.len() as u64).saturating_sub(1) / SEGMENT;
        let json = serde_json::to_vec(&entries[(segment * SEGMENT) as usize..]);
        (segment_file(split, segment), json.expect("names and digests have a JSON form"))
    }

    /// Everything that was written beside the shards, but for the tokenizer.
    pub(super) fn files(&mut self) -> Vec<String> {
        let mut files = vec![PROGRESS_FILE.to_owned()];
        for split in [Split::Train, Split::Validation] {
            let segments = (self.split(split).len() as u64).div_ceil(SEGMENT);
            files.extend((0..segments).map(|segment| segment_file(split, segment)));
        }
        files
    }
}

pub(super) const PROGRESS_FILE: &str = "progress.json";

fn segment_file(split: Split, segment: u64) -> String {
    match split {
        Split::Train => format!("progress-tokens-{segment:05}.json"),
        Split::Validation => format!("progress-validation-{segment:05}.json"),
    }
}

impl Left {
    /// What a preparation of the dataset has left, when it can be gone on with: files of another
    /// version, or damaged ones, are as good as none.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn find(store: &Store, name: &str) -> Result<Option<Self>> {
        let key = |file: &str| format!("{}/{file}", dataset_prefix(name));
        let Some(json) = store.get_opt(&key(PROGRESS_FILE)).await? else { return Ok(None) };
        let Ok(progress) = serde_json::from_slice::<Progress>(&json) else { return Ok(None) };
        let Some(tokenizer) = store.get_opt(&key("tokenizer.json")).await? else { return Ok(None) };
        if progress.version != VERSION || Digest::of(&tokenizer) != progress.tokenizer {
            return Ok(None);
        }
        let mut splits = [Vec::new(), Vec::new()];
        for (entries, split) in splits.iter_mut().zip([Split::Train, Split::Validation]) {
            let wanted = progress.work.split(split).shards;
            for segment in 0..wanted.div_ceil(SEGMENT) {
                let json = store.get_opt(&key(&segment_file(split, segment))).await?;
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
        Ok(Some(Self { progress, tokenizer: tokenizer.to_vec(), train, validation }))
    }

    /// Makes sure that the shards that are to be kept are there, in their size.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn is_whole(&self, store: &Store, name: &str) -> Result<bool> {
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

/// Removes what a preparation with other options has left, but never a dataset.
///
/// # Errors
/// When the store fails, or there is a dataset by now.
pub(super) async fn clear(store: &Store, name: &str) -> Result<()> {
    if store.size(&manifest_key(name)).await?.is_some() {
        return Err(Error::Conflict {
            place: store.place(&manifest_key(name)),
            reason: "another preparation has made this dataset meanwhile; use it, or choose another name".into(),
        });
    }
    match store.delete_prefix(&dataset_prefix(name)).await {
        Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
