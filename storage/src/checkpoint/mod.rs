//! Checkpoints: the state of a run at a committed step, split over files that ranks write side by
//! side.
//!
//! A checkpoint is `runs/<run>/checkpoints/step-NNNNNNNNNN/`: parts named
//! `state-0003-of-0008.safetensors` and `manifest.json`, put last. What has no
//! manifest is no checkpoint. The manifest holds the digest of every part and of all weights
//! together; a load checks both, so that a torn or damaged file is never trained on.
//!
//! A worker whose coordinator stays away makes a checkpoint alone and leaves `memory.binpb` in it:
//! what it knows of the latest steps, for a log whose last lines died with the coordinator.
//!
//! Any number of workers loads what any other number saved: parts are unions of whole tensors, and
//! the same state has the same bytes however it was computed. Weights bear their Hugging Face
//! names; the moments of AdamW stand beside them as `optim.m.NAME` and `optim.v.NAME`.
//!
//! Callers: workers save parts and load; the coordinator commits, chooses what to resume from, and
//! prunes.

mod branch;
mod codec;
mod digest;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod inventory;
mod load;
mod manifest;
mod pieces;
mod retention;
mod split;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use looptrain_proto::{Digest, Step};

pub use digest::{WeightsHasher, weights_digest};
pub use inventory::{Hold, Stored};
pub use load::SkippedCheckpoint;
pub use manifest::{CheckpointManifest, PartEntry};
pub use pieces::StoredTensor;
pub use retention::{Pruning, Retention};
pub use split::split_tensors;

use crate::{Error, Result, Store, model_prefix, run_prefix};

/// Prefix of the name of a tensor's first moment.
pub const FIRST_MOMENT: &str = "optim.m.";
/// Prefix of the name of a tensor's second moment.
pub const SECOND_MOMENT: &str = "optim.v.";

/// One named tensor of 32-bit floats, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Hugging Face name, or that behind [`FIRST_MOMENT`] or [`SECOND_MOMENT`].
    pub name: String,
    /// Length of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// As many values as the shape holds.
    pub data: Vec<f32>,
}

impl Tensor {
    /// Name, shape and data, as [`weights_digest`] takes them.
    #[must_use]
    pub fn view(&self) -> (&str, &[usize], &[f32]) {
        (&self.name, &self.shape, &self.data)
    }
}

/// The checkpoints of one run, or the one of a model that a run may begin from.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    store: Store,
    /// Where they are.
    root: String,
    /// Whose they are.
    run: String,
    /// Of all clones.
    known: Arc<Mutex<Known>>,
}

/// What is known of checkpoints that have been read back.
#[derive(Debug, Default)]
struct Known {
    /// The newest one that was found to be what was saved.
    verified: Option<Step>,
    /// Those that were not, and have been told of.
    bad: BTreeSet<Step>,
}

impl Checkpoints {
    /// Those of `run` in `store`; nothing is read yet.
    #[must_use]
    pub fn new(store: &Store, run: &str) -> Self {
        Self::below(store, run_prefix(run), run)
    }

    /// Weights under a name of their own, for runs to begin from: one checkpoint, of step 0, without
    /// moments; nothing is read yet.
    #[must_use]
    pub fn of_model(store: &Store, model: &str) -> Self {
        Self::below(store, model_prefix(model), model)
    }

    /// Where they are stored.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn below(store: &Store, root: String, run: &str) -> Self {
        Self { store: store.clone(), root, run: run.to_owned(), known: Arc::default() }
    }

    /// Writes part `part` of `parts` of the state after `step`, over an older try if there is one.
    /// `metadata` goes into the header of the file.
    ///
    /// # Errors
    /// When a tensor's shape and data disagree, or the store fails.
    ///
    /// # Panics
    /// When `part` is not below `parts`.
    pub async fn save_part(
        &self,
        step: Step,
        part: usize,
        parts: usize,
        tensors: impl Into<Arc<[Tensor]>>,
        metadata: BTreeMap<String, String>,
    ) -> Result<PartEntry> {
        assert!(part < parts, "part {part} of {parts}");
        let tensors = tensors.into();
        let file = format!("state-{part:04}-of-{parts:04}.safetensors");
        let key = self.part_key(step, &file);
        let count = tensors.len() as u64;
        let encode = move || codec::encode(&tensors, &metadata);
        let chunks = (self.store.blocking(encode))
            .await?
            .map_err(|reason| Error::Malformed { place: self.store.place(&key), reason })?;
        let bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let hashed = chunks.clone();
        let hash = move || {
            let mut hasher = blake3::Hasher::new();
            for chunk in &hashed {
                hasher.update(chunk);
            }
            Digest::from(hasher.finalize())
        };
        // The digest is for the manifest: the part goes up meanwhile.
        let (put, digest) =
            futures::join!(self.store.put_chunks(&key, chunks), self.store.blocking(hash));
        put?;
        Ok(PartEntry { file, bytes, digest: digest?, tensors: count })
    }

    /// Leaves beside the checkpoint of `step` what its writer knows of the latest steps: a log whose
    /// writer died may lack some. To be written before the manifest.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn save_memory(&self, step: Step, memory: Vec<u8>) -> Result<()> {
        self.store.put(&self.part_key(step, MEMORY), memory).await
    }

    /// What the writer of the checkpoint of `step` knew of the latest steps; `None` of one that a
    /// coordinator had made.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn memory(&self, step: Step) -> Result<Option<Bytes>> {
        self.store.get_opt(&self.part_key(step, MEMORY)).await
    }

    /// Makes the parts a checkpoint by writing its manifest, once all of them are found in the
    /// store in their right size.
    ///
    /// Committing the same weights again, in other parts or by a later generation, is fine and
    /// replaces the manifest: that is how a damaged checkpoint heals when its step is trained
    /// again.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the step has a checkpoint with other weights: two histories in one
    /// run. Also when a part is missing or has another size, or the store fails.
    pub async fn commit(&self, manifest: &CheckpointManifest) -> Result<()> {
        self.put_manifest(manifest).await?;
        // Whatever was wrong with what was there before.
        self.known().bad.remove(&manifest.step);
        Ok(())
    }

    async fn put_manifest(&self, manifest: &CheckpointManifest) -> Result<()> {
        let key = self.manifest_key(manifest.step);
        let malformed = |error: serde_json::Error| Error::Malformed {
            place: self.store.place(&key),
            reason: error.to_string(),
        };
        let json = serde_json::to_vec_pretty(manifest).map_err(malformed)?;
        self.check_parts(manifest).await?;
        if self.store.put_if_absent(&key, json.clone()).await? {
            return Ok(());
        }
        match self.manifest(manifest.step).await {
            Ok(there) if there == *manifest => Ok(()),
            Ok(there) if there.weights_digest != manifest.weights_digest => Err(Error::Conflict {
                place: self.store.place(&key),
                reason: format!(
                    "its weights are {}, the new ones {}; begin again with --fresh or under another run.name",
                    there.weights_digest, manifest.weights_digest
                ),
            }),
            // The same state, or a manifest that nobody can read.
            Ok(_) | Err(Error::Malformed { .. }) => self.store.put(&key, json).await,
            Err(error) => Err(error),
        }
    }

    /// Whether the parts that a manifest names are there in their right size. Each is asked for by
    /// its name: a listing may lack what was written a moment ago.
    async fn check_parts(&self, manifest: &CheckpointManifest) -> Result<()> {
        let checks: Vec<_> =
            manifest.parts.iter().map(|part| self.check_size(manifest.step, part)).collect();
        futures::stream::iter(checks).buffered(CONCURRENT_CHECKS).try_collect().await
    }

    pub(super) async fn check_size(&self, step: Step, part: &PartEntry) -> Result<()> {
        let key = self.part_key(step, &part.file);
        let place = self.store.place(&key);
        match self.store.size(&key).await? {
            None => Err(Error::NotFound { place }),
            Some(has) if has != part.bytes => {
                let says = part.bytes;
                let reason = format!("it has {has} bytes, the manifest says {says}");
                Err(Error::Malformed { place, reason })
            }
            Some(_) => Ok(()),
        }
    }

    /// The newest checkpoint that these clones have read back and found whole.
    #[must_use]
    pub fn verified(&self) -> Option<Step> {
        self.known().verified
    }

    /// Takes note that the checkpoint of `step` has been read back and is what was saved.
    pub fn trust(&self, step: Step) {
        let mut known = self.known();
        known.verified = known.verified.max(Some(step));
        known.bad.remove(&step);
    }

    /// Takes note that the checkpoint of `step` does not verify and that this has been told; false
    /// when it was known.
    pub fn distrust(&self, step: Step) -> bool {
        self.known().bad.insert(step)
    }

    /// Those that these clones know not to be what was saved.
    #[must_use]
    pub fn damaged(&self) -> Vec<Step> {
        self.known().bad.iter().copied().collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The steps that have a checkpoint, ascending. Whether it is whole is another question: see
    /// [`Checkpoints::newest_good`].
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self) -> Result<Vec<Step>> {
        let objects = self.store.list(&self.prefix()).await?;
        let mut steps: Vec<Step> = objects
            .iter()
            .filter_map(|object| match self.split_key(&object.key)? {
                (step, MANIFEST) => Some(step),
                _ => None,
            })
            .collect();
        steps.sort();
        Ok(steps)
    }

    /// The manifest of the checkpoint of `step`.
    ///
    /// # Errors
    /// When there is none, or it is not one of this run that this program can read.
    pub async fn manifest(&self, step: Step) -> Result<CheckpointManifest> {
        let key = self.manifest_key(step);
        let bytes = self.store.get(&key).await?;
        let malformed = |reason: String| Error::Malformed { place: self.store.place(&key), reason };
        let manifest: CheckpointManifest =
            serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        match manifest.complaint(&self.run, step) {
            Some(reason) => Err(malformed(reason)),
            None => Ok(manifest),
        }
    }

    fn prefix(&self) -> String {
        format!("{}/checkpoints", self.root)
    }

    fn directory(&self, step: Step) -> String {
        format!("{}/step-{:010}", self.prefix(), step.0)
    }

    fn part_key(&self, step: Step, file: &str) -> String {
        format!("{}/{file}", self.directory(step))
    }

    fn manifest_key(&self, step: Step) -> String {
        self.part_key(step, MANIFEST)
    }

    /// The step and file name of a key below the checkpoints.
    fn split_key<'a>(&self, key: &'a str) -> Option<(Step, &'a str)> {
        let (directory, file) =
            key.strip_prefix(&self.prefix())?.strip_prefix('/')?.split_once('/')?;
        Some((step_of(directory)?, file))
    }
}

/// The step whose directory this is.
fn step_of(directory: &str) -> Option<Step> {
    Some(Step(directory.strip_prefix("step-")?.parse().ok()?))
}

const MANIFEST: &str = "manifest.json";

/// A `looptrain.v1.Held`.
const MEMORY: &str = "memory.binpb";

/// Parts that are asked for at the same time.
const CONCURRENT_CHECKS: usize = 8;
