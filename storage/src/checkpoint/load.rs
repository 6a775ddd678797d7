//! Reading checkpoints back, trusting nothing: sizes, digests, duplicates and the weights as a
//! whole are checked.

use std::collections::HashSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use looptrain_proto::{Digest, Step};

use super::{CheckpointManifest, Checkpoints, PartEntry, Tensor, codec, weights_digest};
use crate::{Error, Result, blocking};

/// Parts read at the same time.
const CONCURRENT_PARTS: usize = 4;
const REMEDY: &str = "an older checkpoint will do";

/// A checkpoint that was passed over, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct SkippedCheckpoint {
    /// Its step.
    pub step: Step,
    /// What is wrong with it, naming the file.
    pub reason: String,
}

impl Checkpoints {
    /// The state of the checkpoint of `step`, tensors sorted by name.
    ///
    /// # Errors
    /// When there is none, or a part is missing or not what was saved; the error names it.
    pub async fn load(&self, step: Step) -> Result<(CheckpointManifest, Vec<Tensor>)> {
        let manifest = self.manifest(step).await?;
        let read = |bytes: Bytes| codec::decode(&bytes);
        let parts = self.parts(&manifest, read).await?;
        let mut tensors: Vec<Tensor> = parts.into_iter().flatten().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let malformed =
            |reason| Error::Malformed { place: self.store.place(&self.manifest_key(step)), reason };
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(malformed(format!("tensor `{}` is in two parts", pair[0].name)));
        }
        let (found, tensors) =
            blocking(move || (weights_digest(tensors.iter().map(Tensor::view)), tensors)).await?;
        if found != manifest.weights_digest {
            return Err(malformed(format!(
                "the weights of its parts are {found}, it says {}",
                manifest.weights_digest
            )));
        }
        Ok((manifest, tensors))
    }

    /// Checks every part of the checkpoint of `step` without keeping its tensors.
    ///
    /// # Errors
    /// As [`Checkpoints::load`].
    pub async fn verify(&self, step: Step) -> Result<CheckpointManifest> {
        let manifest = self.manifest(step).await?;
        let parts = self.parts(&manifest, |bytes: Bytes| codec::names(&bytes)).await?;
        let mut seen = HashSet::new();
        match parts.into_iter().flatten().find(|name| !seen.insert(name.clone())) {
            Some(name) => Err(Error::Malformed {
                place: self.store.place(&self.manifest_key(step)),
                reason: format!("tensor `{name}` is in two parts"),
            }),
            None => Ok(manifest),
        }
    }

    /// The newest checkpoint that verifies, with the newer ones that do not; `None` when the run
    /// has no checkpoint.
    ///
    /// # Errors
    /// [`Error::NoGoodCheckpoint`] when there are checkpoints and none verifies: to begin from
    /// nothing then is for a person to decide. Also when the store cannot be listed.
    pub async fn newest_good(
        &self,
    ) -> Result<Option<(CheckpointManifest, Vec<SkippedCheckpoint>)>> {
        let mut skipped: Vec<SkippedCheckpoint> = Vec::new();
        for step in self.list().await?.into_iter().rev() {
            match self.verify(step).await {
                Ok(manifest) => return Ok(Some((manifest, skipped))),
                Err(error) => {
                    let reason = error.to_string();
                    tracing::warn!(run = self.run, %step, reason, "passing over a checkpoint");
                    skipped.push(SkippedCheckpoint { step, reason });
                }
            }
        }
        match skipped.first() {
            None => Ok(None),
            Some(newest) => Err(Error::NoGoodCheckpoint {
                run: self.run.clone(),
                count: skipped.len(),
                step: newest.step,
                reason: newest.reason.clone(),
            }),
        }
    }

    /// Reads and checks all parts, each turned into a list by `read`.
    async fn parts<T: Send + 'static>(
        &self,
        manifest: &CheckpointManifest,
        read: impl Fn(Bytes) -> std::result::Result<Vec<T>, String> + Copy + Send + 'static,
    ) -> Result<Vec<Vec<T>>> {
        let reads: Vec<_> =
            manifest.parts.iter().map(|part| self.part(manifest.step, part, read)).collect();
        futures::stream::iter(reads).buffered(CONCURRENT_PARTS).try_collect().await
    }

    async fn part<T: Send + 'static>(
        &self,
        step: Step,
        part: &PartEntry,
        read: impl Fn(Bytes) -> std::result::Result<Vec<T>, String> + Send + 'static,
    ) -> Result<Vec<T>> {
        let key = self.part_key(step, &part.file);
        let place = self.store.place(&key);
        let bytes = self.store.get(&key).await?;
        if bytes.len() as u64 != part.bytes {
            let (has, says) = (bytes.len(), part.bytes);
            return Err(Error::Malformed {
                place,
                reason: format!("it has {has} bytes, the manifest says {says}; {REMEDY}"),
            });
        }
        let part = part.clone();
        blocking(move || {
            let (expected, found) = (part.digest, Digest::of(&bytes));
            if found != expected {
                let remedy = REMEDY.to_owned();
                return Err(Error::Corrupt { place, expected, found, remedy });
            }
            let items = read(bytes).and_then(|items| match items.len() as u64 == part.tensors {
                true => Ok(items),
                false => Err(format!(
                    "it has {} tensors, the manifest says {}",
                    items.len(),
                    part.tensors
                )),
            });
            items.map_err(|reason| Error::Malformed { place, reason })
        })
        .await?
    }
}
