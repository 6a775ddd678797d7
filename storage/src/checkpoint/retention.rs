//! Which checkpoints stay.

use std::collections::BTreeMap;

use looptrain_proto::Step;

use super::{Checkpoints, MANIFEST};
use crate::Result;

impl Checkpoints {
    /// Removes all but the newest `keep` checkpoints (at least one) and those `in_use`; gives the
    /// removed steps.
    ///
    /// Should none of those that stay have all its parts in the right size, the next older one
    /// that does stays as well: a run always has something to return to. A manifest goes before
    /// its parts, so that nothing half removed looks whole.
    ///
    /// Parts without a manifest are what writers that died left behind, when they are older than
    /// both the newest checkpoint and all `in_use`: they go, too, without being counted. Newer ones
    /// are left alone: their save may be under way.
    ///
    /// # Errors
    /// When the store fails; some may be removed then.
    pub async fn prune(&self, keep: usize, in_use: &[Step]) -> Result<Vec<Step>> {
        let mut files: BTreeMap<Step, BTreeMap<String, u64>> = BTreeMap::new();
        for object in self.store.list(&self.prefix()).await? {
            if let Some((step, file)) = self.split_key(&object.key) {
                files.entry(step).or_default().insert(file.to_owned(), object.size);
            }
        }
        let (committed, unfinished): (Vec<_>, Vec<_>) =
            files.into_iter().rev().partition(|(_, files)| files.contains_key(MANIFEST));
        // Newest first. A run may have gone on from an older checkpoint than the newest.
        if let Some(&(newest, _)) = committed.first() {
            let reached = in_use.iter().copied().fold(newest, Step::min);
            for (step, files) in unfinished.iter().filter(|(step, _)| *step < reached) {
                tracing::debug!(run = self.run, %step, "removing a checkpoint that was never committed");
                self.remove(*step, files).await?;
            }
        }
        let mut removed = Vec::new();
        let mut kept = 0;
        let mut whole = false;
        for (step, files) in committed {
            let wanted = kept < keep.max(1) || in_use.contains(&step);
            if wanted || !whole {
                let is_whole = self.is_whole(step, &files).await;
                // An incomplete one beyond the number to keep is of no use to anybody.
                if wanted || is_whole {
                    kept += 1;
                    whole |= is_whole;
                    continue;
                }
            }
            self.remove(step, &files).await?;
            removed.push(step);
        }
        removed.sort();
        Ok(removed)
    }

    /// Removes the files of one step, a manifest before what it names.
    async fn remove(&self, step: Step, files: &BTreeMap<String, u64>) -> Result<()> {
        if files.contains_key(MANIFEST) {
            self.store.delete(&self.manifest_key(step)).await?;
        }
        for file in files.keys().filter(|file| *file != MANIFEST) {
            self.store.delete(&self.part_key(step, file)).await?;
        }
        Ok(())
    }

    /// Whether all parts are there in the right size; their content is not read.
    async fn is_whole(&self, step: Step, files: &BTreeMap<String, u64>) -> bool {
        let manifest = self.manifest(step).await;
        manifest.is_ok_and(|manifest| {
            manifest.parts.iter().all(|part| files.get(&part.file) == Some(&part.bytes))
        })
    }
}
