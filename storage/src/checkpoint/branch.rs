//! The checkpoint of one run as the first one of another.

use futures::{StreamExt, TryStreamExt};

use super::{CheckpointManifest, Checkpoints, PartEntry};
use crate::Result;

/// Parts that are copied at a time.
const CONCURRENT_COPIES: usize = 2;

impl Checkpoints {
    /// Copies the checkpoint `theirs` of `source`, part by part and a few megabytes at a time, and commits it
    /// as `ours`, whose parts are to be the same. Each part is what was saved, or this fails and there is
    /// no checkpoint here; interrupted, it may be done again. The caller holds the source.
    ///
    /// # Errors
    /// When a part is missing or damaged, or as [`Checkpoints::commit`].
    pub async fn adopt(
        &self,
        source: &Self,
        theirs: &CheckpointManifest,
        ours: &CheckpointManifest,
    ) -> Result<()> {
        let copies: Vec<_> =
            theirs.parts.iter().map(|part| self.copy_part(source, theirs, part)).collect();
        let copies = futures::stream::iter(copies).buffer_unordered(CONCURRENT_COPIES);
        copies.try_collect::<()>().await?;
        if let Some(memory) = source.memory(theirs.step).await? {
            self.save_memory(ours.step, memory.to_vec()).await?;
        }
        self.commit(ours).await
    }

    async fn copy_part(
        &self,
        source: &Self,
        theirs: &CheckpointManifest,
        part: &PartEntry,
    ) -> Result<()> {
        source.check_size(theirs.step, part).await?;
        let from = source.part_key(theirs.step, &part.file);
        let key = self.part_key(theirs.step, &part.file);
        let found = self.store.copy_large(&from, &key, part.bytes).await?;
        source.check_part(theirs.step, part, found)
    }
}
