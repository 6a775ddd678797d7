//! What is stored of a run's checkpoints, and who is reading one.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use looptrain_proto::Step;

use super::{CheckpointManifest, Checkpoints, MANIFEST};
use crate::Result;
use crate::record::unique;

/// A reader that has not let go after this time is dead.
const LONGEST_READ: Duration = Duration::from_secs(6 * 3600);

/// A file of a step's directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
}

/// What a step's directory holds, by name.
pub(super) type Files = BTreeMap<String, File>;

/// What is stored of one step.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The step.
    pub step: Step,
    /// Files, the manifest not counted.
    pub files: usize,
    /// Their size.
    pub bytes: u64,
    /// When the newest of them was written.
    pub modified: SystemTime,
    /// The manifest; `None` when it was never written, an error's text when it cannot be used.
    pub manifest: Option<std::result::Result<CheckpointManifest, String>>,
    /// Whether all parts are there in the right size.
    pub complete: bool,
}

/// A checkpoint that somebody reads; it is not removed until this is let go.
#[derive(Debug)]
#[must_use]
pub struct Hold<'a> {
    checkpoints: &'a Checkpoints,
    /// The note in the store, if it could be left there.
    key: Option<String>,
}

impl Hold<'_> {
    /// Lets the checkpoint go.
    pub async fn release(self) {
        if let Some(key) = self.key
            && let Err(error) = self.checkpoints.store.delete(&key).await
        {
            tracing::debug!(%error, "a note that a checkpoint is read stays for some hours");
        }
    }
}

impl Checkpoints {
    /// Keeps the checkpoint of `step` from being removed while it is read, for some hours at most.
    /// Workers of the run need not: nothing is removed while they load.
    pub async fn hold(&self, step: Step) -> Hold<'_> {
        let key = format!("{}/step-{:010}-{:016x}", self.readers(), step.0, unique());
        let noted = self.store.put(&key, "").await;
        if let Err(error) = &noted {
            // A store that can only be read is read without one.
            tracing::debug!(%error, "no note that a checkpoint is read");
        }
        Hold { checkpoints: self, key: noted.is_ok().then_some(key) }
    }

    /// The steps that somebody reads.
    pub(super) async fn held(&self, now: SystemTime) -> Result<Vec<Step>> {
        let notes = self.store.list(&self.readers()).await?;
        let steps = notes.iter().filter_map(|note| {
            let age = now.duration_since(note.modified).unwrap_or_default();
            let name = note.key.rsplit('/').next()?.strip_prefix("step-")?;
            let step = name.split('-').next()?.parse().ok()?;
            (age < LONGEST_READ).then_some(Step(step))
        });
        Ok(steps.collect())
    }

    fn readers(&self) -> String {
        format!("{}/readers", self.root)
    }

    /// Everything below the checkpoints, by step.
    pub(super) async fn files(&self) -> Result<BTreeMap<Step, Files>> {
        let mut files: BTreeMap<Step, Files> = BTreeMap::new();
        for object in self.store.list(&self.prefix()).await? {
            if let Some((step, file)) = self.split_key(&object.key) {
                let entry = File { bytes: object.size, modified: object.modified };
                files.entry(step).or_default().insert(file.to_owned(), entry);
            }
        }
        Ok(files)
    }

    /// What is stored of each step, ascending; parts are not read.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn inventory(&self) -> Result<Vec<Stored>> {
        let mut all = Vec::new();
        for (step, files) in self.files().await? {
            let manifest = match files.contains_key(MANIFEST) {
                true => Some(self.manifest(step).await.map_err(|error| error.to_string())),
                false => None,
            };
            let whole = |manifest: &CheckpointManifest| is_whole(manifest, &files);
            let complete = manifest.as_ref().and_then(|it| it.as_ref().ok()).is_some_and(whole);
            let parts = || files.iter().filter(|(name, _)| *name != MANIFEST).map(|(_, file)| file);
            all.push(Stored {
                step,
                files: parts().count(),
                bytes: parts().map(|file| file.bytes).sum(),
                modified: (files.values().map(|file| file.modified).max())
                    .unwrap_or(SystemTime::UNIX_EPOCH),
                manifest,
                complete,
            });
        }
        Ok(all)
    }
}

/// Whether all parts are there in the right size.
fn is_whole(manifest: &CheckpointManifest, files: &Files) -> bool {
    let there = |file: &str| files.get(file).map(|file| file.bytes);
    manifest.parts.iter().all(|part| there(&part.file) == Some(part.bytes))
}
