//! Which checkpoints stay.
//!
//! First a plan, then the removal: whoever must still be the run's coordinator to remove anything
//! looks in between, for the plan may take as long as it takes to read a checkpoint back.

use std::time::{Duration, SystemTime};

use looptrain_proto::Step;

use super::inventory::Files;
use super::{Checkpoints, MANIFEST, MEMORY, step_of};
use crate::{Error, Result};

/// What to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; at least one.
    pub keep: usize,
    /// Also those of steps that are multiples of this; 0 for none.
    pub keep_every_steps: u64,
    /// Files that no manifest names are left by dead writers once they are so old.
    pub grace: Duration,
}

/// What is to be removed.
#[derive(Clone, Debug, Default)]
pub struct Pruning {
    /// Checkpoints, ascending.
    pub checkpoints: Vec<Step>,
    /// Files of saves that came to nothing: step and name.
    pub orphans: Vec<(Step, String)>,
    /// Files of the checkpoints: step and names.
    files: Vec<(Step, Vec<String>)>,
    /// Below this step nobody saves any more.
    reached: Step,
    /// When what a writer was at is old enough.
    grace: Duration,
}

impl Checkpoints {
    /// Plans what `retention` has no use for, but never those `in_use` or being read, nor the newest
    /// that verifies: before anything goes, one of those that stay and are newer must have been
    /// read back. When none of them verifies, the next older one that does stays as well, so that a
    /// run always has something to return to.
    ///
    /// Parts without a manifest are what dead writers left behind, when they are older than
    /// [`Retention::grace`], the newest checkpoint and all `in_use`. Newer ones are left alone: their
    /// save may be under way. So are those in a checkpoint's directory that its manifest does
    /// not name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn plan(
        &self,
        retention: &Retention,
        in_use: &[Step],
        now: SystemTime,
    ) -> Result<Pruning> {
        let held = self.held(now).await?;
        // Newest first. A run may have gone on from an older checkpoint than the newest.
        let (committed, unfinished): (Vec<_>, Vec<_>) = (self.files().await?.into_iter().rev())
            .partition(|(_, files)| files.contains_key(MANIFEST));
        let Some(&(newest, _)) = committed.first() else { return Ok(Pruning::default()) };
        let aged = |file: &super::inventory::File| {
            now.duration_since(file.modified).is_ok_and(|age| age >= retention.grace)
        };
        let reached = in_use.iter().copied().fold(newest, Step::min);
        let mut plan = Pruning { reached, grace: retention.grace, ..Pruning::default() };
        for (step, files) in unfinished.iter().filter(|(step, _)| *step < reached) {
            // A listing may lack a manifest that is there.
            if files.values().all(aged)
                && self.store.size(&self.manifest_key(*step)).await?.is_none()
            {
                plan.orphans.extend(files.keys().map(|name| (*step, name.clone())));
            }
        }
        let wanted = |(index, (step, _)): (usize, &(Step, Files))| {
            let every = retention.keep_every_steps;
            index < retention.keep.max(1)
                || in_use.contains(step)
                || held.contains(step)
                || (every > 0 && step.0.is_multiple_of(every))
        };
        let mut stays: Vec<bool> = committed.iter().enumerate().map(wanted).collect();
        let newest_to_go = stays.iter().position(|stays| !stays);
        if let Some(newest_to_go) = newest_to_go {
            let steps: Vec<Step> = committed.iter().map(|(step, _)| *step).collect();
            if let Some(anchor) = self.anchor(&steps, newest_to_go).await? {
                stays[anchor] = true;
            }
        }
        for (index, (step, files)) in committed.iter().enumerate().rev() {
            if stays[index] {
                // Older ones have been looked at when they were among the newest.
                if index < retention.keep.max(1) {
                    let old = files.iter().filter(|(_, file)| aged(file)).map(|(name, _)| name);
                    plan.orphans.extend(self.unnamed(*step, old).await?);
                }
                continue;
            }
            let names: Vec<String> = files.keys().cloned().collect();
            plan.checkpoints.push(*step);
            plan.files.push((*step, names));
        }
        Ok(plan)
    }

    /// The newest of `steps` that verifies, by its index; those before `known` suffice when one of
    /// them is known to.
    async fn anchor(&self, steps: &[Step], known: usize) -> Result<Option<usize>> {
        let verified = self.verified();
        if let Some(index) = steps[..known].iter().position(|step| Some(*step) == verified) {
            return Ok(Some(index));
        }
        for (index, step) in steps.iter().enumerate() {
            match self.verify_parts(*step).await {
                Ok(()) => return Ok(Some(index)),
                // The store, and not the checkpoint: nothing is known, so nothing may go.
                Err(error) if self.store.is_to_blame(&error) => return Err(error),
                Err(error) if self.distrust(*step) => {
                    tracing::warn!(run = self.run, %step, "not to be relied on: {error}");
                }
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Those of `files` in the directory of `step` that its manifest does not name.
    async fn unnamed<'a>(
        &self,
        step: Step,
        files: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<(Step, String)>> {
        let of_manifest = |name: &&String| [MANIFEST, MEMORY].contains(&name.as_str());
        let mut files: Vec<&String> = files.filter(|name| !of_manifest(name)).collect();
        if files.is_empty() {
            return Ok(Vec::new());
        }
        match self.manifest(step).await {
            Ok(manifest) => files.retain(|name| manifest.parts.iter().all(|it| it.file != **name)),
            // Nobody knows what belongs to it.
            Err(Error::Malformed { .. } | Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        Ok(files.into_iter().map(|name| (step, name.clone())).collect())
    }

    /// Carries a plan out, but for checkpoints that somebody has begun to read since; gives the
    /// steps that are removed. A manifest goes before its parts, so that nothing half removed looks
    /// whole. Half-written files of earlier steps, which are no objects, go as orphans do.
    ///
    /// # Errors
    /// When the store fails; some may be removed then.
    pub async fn remove(&self, plan: &Pruning) -> Result<Vec<Step>> {
        for (step, file) in &plan.orphans {
            tracing::debug!(run = self.run, %step, file, "removing what a dead writer left");
            self.store.delete(&self.part_key(*step, file)).await?;
        }
        let mut removed = Vec::new();
        for (step, files) in &plan.files {
            if self.is_held(*step).await? {
                continue;
            }
            let manifest = self.manifest_key(*step);
            let was = self.store.get_opt(&manifest).await?;
            self.store.delete(&manifest).await?;
            // Who has found the manifest has left a note before; who comes now finds none.
            if self.is_held(*step).await?
                && let Some(was) = was
            {
                self.store.put_if_absent(&manifest, was).await?;
                continue;
            }
            for file in files.iter().filter(|file| *file != MANIFEST) {
                self.store.delete(&self.part_key(*step, file)).await?;
            }
            removed.push(*step);
        }
        let reached = plan.reached;
        let over = move |name: &str| step_of(name).is_some_and(|step| step < reached);
        self.store.sweep_some(&self.prefix(), plan.grace, over).await?;
        Ok(removed)
    }

    async fn is_held(&self, step: Step) -> Result<bool> {
        Ok(self.held(SystemTime::now()).await?.contains(&step))
    }

    /// Plans and removes at once; gives the removed steps.
    ///
    /// # Errors
    /// As [`Checkpoints::plan`] and [`Checkpoints::remove`].
    pub async fn prune(&self, retention: &Retention, in_use: &[Step]) -> Result<Vec<Step>> {
        let plan = self.plan(retention, in_use, SystemTime::now()).await?;
        self.remove(&plan).await
    }
}
