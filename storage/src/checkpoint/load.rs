//! Reading checkpoints back, trusting nothing: sizes, digests, duplicates and the weights as a
//! whole are checked. Parts are hashed as they come in, a few megabytes at a time.

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::{Digest, Step};

use super::digest::is_weight;
use super::{
    CheckpointManifest, Checkpoints, PartEntry, StoredTensor, Tensor, codec, weights_digest,
};
use crate::{Error, Result, read_record};

/// Parts read at the same time.
const CONCURRENT_PARTS: usize = 4;
pub(super) const REMEDY: &str = "an older checkpoint will do";

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
        let reads: Vec<_> = manifest.parts.iter().map(|part| self.part(step, part)).collect();
        let parts: Vec<Vec<Tensor>> =
            futures::stream::iter(reads).buffered(CONCURRENT_PARTS).try_collect().await?;
        let mut tensors: Vec<Tensor> = parts.into_iter().flatten().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(self.twice(step, &pair[0].name));
        }
        let hash = move || (weights_digest(tensors.iter().map(Tensor::view)), tensors);
        let (found, tensors) = self.store.blocking(hash).await?;
        self.check_weights(&manifest, found)?;
        self.trust(step);
        Ok((manifest, tensors))
    }

    /// Checks the checkpoint of `step` as a load does, keeping nothing of it: however large it is, it takes
    /// some megabytes of memory. The weights are read twice, the second time in their own order.
    ///
    /// # Errors
    /// As [`Checkpoints::load`].
    pub async fn verify(&self, step: Step) -> Result<CheckpointManifest> {
        let manifest = self.manifest(step).await?;
        self.hash_parts(&manifest).await?;
        let tensors = self.stored_tensors(&manifest).await?;
        let weights: Vec<_> = tensors.into_iter().filter(|it| is_weight(&it.name)).collect();
        self.read_weights(&manifest, &weights, |_, _| Ok::<_, Error>(())).await?;
        self.trust(step);
        Ok(manifest)
    }

    /// Checks that every part of the checkpoint of `step` is what was saved, keeping nothing of it.
    /// What the parts are put together to was agreed upon by those who saved them.
    pub(super) async fn verify_parts(&self, step: Step) -> Result<()> {
        self.hash_parts(&self.manifest(step).await?).await?;
        self.trust(step);
        Ok(())
    }

    async fn hash_parts(&self, manifest: &CheckpointManifest) -> Result<()> {
        let step = manifest.step;
        let checks: Vec<_> =
            manifest.parts.iter().map(|part| self.fetch(step, part, |_| {})).collect();
        futures::stream::iter(checks).buffered(CONCURRENT_PARTS).try_collect().await
    }

    pub(super) fn twice(&self, step: Step, tensor: &str) -> Error {
        let place = self.store.place(&self.manifest_key(step));
        Error::Malformed { place, reason: format!("tensor `{tensor}` is in two parts") }
    }

    /// The weights of the checkpoint of `step`, sorted by name. Of its parts the headers and the weights are
    /// read, a few megabytes at a time, and the weights are what was saved; of the moments nothing is known.
    ///
    /// # Errors
    /// When there is none, a part is missing or has another size, or the weights are not what was saved.
    pub async fn weights(&self, step: Step) -> Result<(CheckpointManifest, Vec<Tensor>)> {
        let (manifest, stored) = self.stored_weights(step).await?;
        let empty = |weight: &StoredTensor| Tensor {
            name: weight.name.clone(),
            shape: weight.shape.clone(),
            data: Vec::new(),
        };
        let mut tensors: Vec<Tensor> = stored.iter().map(empty).collect();
        let take = |index: usize, bytes: &[u8]| {
            let Tensor { shape, data, .. } = &mut tensors[index];
            if data.is_empty() {
                data.reserve_exact(shape.iter().product());
            }
            let words = bytes.chunks_exact(4);
            data.extend(words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])));
            Ok::<_, Error>(())
        };
        self.read_weights(&manifest, &stored, take).await?;
        Ok((manifest, tensors))
    }

    /// The newest checkpoint that verifies, with the newer ones that do not; `None` when the run
    /// has no checkpoint. The one that the run's record names is tried although the listing may
    /// lack it yet.
    ///
    /// # Errors
    /// [`Error::NoGoodCheckpoint`] when there are checkpoints and none verifies: to begin from
    /// nothing then is for a person to decide. Also when the store cannot be listed, or does not
    /// answer: that says nothing of its checkpoints.
    pub async fn newest_good(
        &self,
    ) -> Result<Option<(CheckpointManifest, Vec<SkippedCheckpoint>)>> {
        self.newest(async |step| self.verify(step).await).await
    }

    /// The weights of the newest checkpoint of which they are what was saved, chosen as
    /// [`Checkpoints::newest_good`] does, but whatever its moments are; for readers beside the run: none is
    /// removed while it is read.
    ///
    /// # Errors
    /// As [`Checkpoints::newest_good`].
    pub async fn newest_weights(
        &self,
    ) -> Result<Option<((CheckpointManifest, Vec<Tensor>), Vec<SkippedCheckpoint>)>> {
        let read = async |step| {
            let hold = self.hold(step).await;
            let read = self.weights(step).await;
            hold.release().await;
            read
        };
        self.newest(read).await
    }

    /// What `read` makes of the newest checkpoint of which it makes something.
    async fn newest<T>(
        &self,
        read: impl AsyncFn(Step) -> Result<T>,
    ) -> Result<Option<(T, Vec<SkippedCheckpoint>)>> {
        let mut skipped: Vec<SkippedCheckpoint> = Vec::new();
        let mut steps = self.list().await?;
        let recorded = read_record(&self.store, &self.run).await?;
        if let Some(step) = recorded.and_then(|record| record.last_checkpoint)
            && !steps.contains(&step)
            && self.store.size(&self.manifest_key(step)).await?.is_some()
        {
            steps.push(step);
            steps.sort();
        }
        for step in steps.into_iter().rev() {
            match read(step).await {
                Ok(found) => return Ok(Some((found, skipped))),
                // To go on from an older one would be to train again what is saved.
                Err(error) if self.store.is_to_blame(&error) => return Err(error),
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

    async fn part(&self, step: Step, part: &PartEntry) -> Result<Vec<Tensor>> {
        let place = self.store.place(&self.part_key(step, &part.file));
        let mut bytes = Vec::new();
        // What a manifest says may be anything; by the first chunk the store has said the same.
        let take = |chunk: &[u8]| {
            if bytes.is_empty() {
                bytes.reserve_exact(usize::try_from(part.bytes).unwrap_or_default());
            }
            bytes.extend_from_slice(chunk);
        };
        self.fetch(step, part, take).await?;
        let says = part.tensors;
        let decode = move || {
            let tensors = codec::decode(&bytes);
            let tensors = tensors.and_then(|tensors| match tensors.len() as u64 {
                has if has == says => Ok(tensors),
                has => Err(format!("it has {has} tensors, the manifest says {says}")),
            });
            tensors.map_err(|reason| Error::Malformed { place, reason })
        };
        self.store.blocking(decode).await?
    }

    /// Reads a part in chunks, in order, and checks that it is what the manifest says.
    async fn fetch(&self, step: Step, part: &PartEntry, mut take: impl FnMut(&[u8])) -> Result<()> {
        self.check_size(step, part).await?;
        let key = self.part_key(step, &part.file);
        let mut hasher = blake3::Hasher::new();
        let mut chunks = std::pin::pin!(self.store.stream(&key, part.bytes));
        while let Some(chunk) = chunks.try_next().await? {
            take(&chunk);
            let hash = move || {
                hasher.update(&chunk);
                hasher
            };
            hasher = self.store.blocking(hash).await?;
        }
        self.check_part(step, part, hasher.finalize().into())
    }

    /// Whether what was read of a part is what the manifest says.
    pub(super) fn check_part(&self, step: Step, part: &PartEntry, found: Digest) -> Result<()> {
        let expected = part.digest;
        if found == expected {
            return Ok(());
        }
        let place = self.store.place(&self.part_key(step, &part.file));
        Err(Error::Corrupt { place, expected, found, remedy: REMEDY.into() })
    }
}
