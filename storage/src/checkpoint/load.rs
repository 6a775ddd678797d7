//! Reading checkpoints back, trusting nothing: sizes, digests, duplicates and the weights as a
//! whole are checked.

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::{Digest, Step};

use super::digest::is_weight;
use super::{CheckpointManifest, Checkpoints, PartEntry, Tensor, codec, weights_digest};
use crate::{Error, Result};

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
        self.read(step, |_| true).await
    }

    /// Checks the checkpoint of `step` as a load does, keeping no more of it than its weights;
    /// parts are read whole, a few at a time.
    ///
    /// # Errors
    /// As [`Checkpoints::load`].
    pub async fn verify(&self, step: Step) -> Result<CheckpointManifest> {
        Ok(self.read(step, is_weight).await?.0)
    }

    /// The checked state; tensors that are not `wanted`, moments only, come without data.
    async fn read(
        &self,
        step: Step,
        wanted: fn(&str) -> bool,
    ) -> Result<(CheckpointManifest, Vec<Tensor>)> {
        let manifest = self.manifest(step).await?;
        let reads: Vec<_> =
            manifest.parts.iter().map(|part| self.part(step, part, wanted)).collect();
        let parts: Vec<Vec<Tensor>> =
            futures::stream::iter(reads).buffered(CONCURRENT_PARTS).try_collect().await?;
        let mut tensors: Vec<Tensor> = parts.into_iter().flatten().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let malformed =
            |reason| Error::Malformed { place: self.store.place(&self.manifest_key(step)), reason };
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(malformed(format!("tensor `{}` is in two parts", pair[0].name)));
        }
        let hash = move || (weights_digest(tensors.iter().map(Tensor::view)), tensors);
        let (found, tensors) = self.store.blocking(hash).await?;
        if found != manifest.weights_digest {
            return Err(malformed(format!(
                "the weights of its parts are {found}, it says {}; {REMEDY}",
                manifest.weights_digest
            )));
        }
        Ok((manifest, tensors))
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
                    tracing::debug!(run = self.run, %step, reason, "passing over a checkpoint");
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

    async fn part(
        &self,
        step: Step,
        part: &PartEntry,
        wanted: fn(&str) -> bool,
    ) -> Result<Vec<Tensor>> {
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
        let PartEntry { digest: expected, tensors: says, .. } = *part;
        let decode = move || {
            let found = Digest::of(&bytes);
            if found != expected {
                let remedy = REMEDY.to_owned();
                return Err(Error::Corrupt { place, expected, found, remedy });
            }
            let tensors = codec::decode(&bytes, wanted);
            let tensors = tensors.and_then(|tensors| match tensors.len() as u64 {
                has if has == says => Ok(tensors),
                has => Err(format!("it has {has} tensors, the manifest says {says}")),
            });
            tensors.map_err(|reason| Error::Malformed { place, reason })
        };
        self.store.blocking(decode).await?
    }
}
