//! The durable notes of a run: its record and its checkpoints' manifests, written by one task in
//! order, so that the runtime never waits for the store. Order of writing: parts (by the
//! workers), manifest, record, and only then is anything old removed.

use std::sync::Arc;

use looptrain_proto::{Digest, Spec};
use looptrain_storage::{CheckpointManifest, Checkpoints, Error, Finished, PartEntry, Register};
use tokio::sync::{mpsc, oneshot};

use crate::core::{Event, ManifestDraft};
use crate::error::CoordinatorError;
use crate::runtime::Input;

/// Something to write down.
#[derive(Debug)]
pub(crate) enum Note {
    /// How the run's workers compute.
    Numerics(String),
    /// A checkpoint whose parts are all in the store.
    Manifest(ManifestDraft),
    /// The last note: answered when all notes are durable, among them, when the run is done, how
    /// it ended.
    Last(Option<Finished>, oneshot::Sender<Result<(), CoordinatorError>>),
}

/// The task's state.
pub(crate) struct Keeper {
    pub(crate) spec: Arc<Spec>,
    pub(crate) trajectory: Digest,
    pub(crate) register: Register,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) inputs: mpsc::Sender<Input>,
}

impl Keeper {
    /// Works until nobody has notes any more.
    pub(crate) async fn run(mut self, mut notes: mpsc::UnboundedReceiver<Note>) {
        while let Some(note) = notes.recv().await {
            match note {
                Note::Numerics(numerics) => {
                    let updated =
                        self.register.update(|record| record.numerics = Some(numerics)).await;
                    self.report("note how the workers compute", updated).await;
                }
                Note::Manifest(draft) => self.commit(draft).await,
                Note::Last(finished, reply) => {
                    let updated = match finished {
                        Some(finished) => {
                            self.register.update(|record| record.finished = Some(finished)).await
                        }
                        None => Ok(()),
                    };
                    // Whoever asked has gone away only if the process is ending.
                    let _ = reply.send(updated.map_err(CoordinatorError::of_store));
                }
            }
        }
    }

    async fn commit(&mut self, draft: ManifestDraft) {
        let step = draft.step;
        let part = |part: crate::core::SavedPart| PartEntry {
            file: part.file,
            bytes: part.bytes,
            digest: part.digest,
            tensors: part.tensors,
        };
        let manifest = CheckpointManifest {
            version: CheckpointManifest::VERSION,
            run: self.spec.run.name.clone(),
            step,
            cursor: draft.cursor,
            trajectory: self.trajectory,
            generation: draft.generation,
            weights_digest: draft.weights_digest,
            parts: draft.parts.into_iter().map(part).collect(),
        };
        if let Err(error) = self.checkpoints.commit(&manifest).await {
            let reason = error.to_string();
            return self.tell(Input::Event(Event::CheckpointRefused { step, reason })).await;
        }
        let updated = self.register.update(|record| record.last_checkpoint = Some(step)).await;
        self.report("note the newest checkpoint", updated).await;
        self.tell(Input::Event(Event::CheckpointWritten { step })).await;
        match self.checkpoints.prune(self.spec.checkpoint.keep, &[step]).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::debug!(?removed, "removed old checkpoints"),
            Err(error) => tracing::warn!(%error, "old checkpoints could not be removed"),
        }
    }

    /// A record that cannot be written is worth a warning, unless another coordinator holds it:
    /// then this one must stop.
    async fn report(&self, what: &str, result: Result<(), Error>) {
        match result {
            Ok(()) => {}
            Err(error @ Error::Fenced { .. }) => {
                self.tell(Input::Abort(CoordinatorError::of_store(error))).await;
            }
            Err(error) => tracing::warn!(%error, "could not {what} in the run record"),
        }
    }

    async fn tell(&self, input: Input) {
        // The runtime has gone away only if the process is ending.
        let _ = self.inputs.send(input).await;
    }
}
