//! The durable notes of a run: its record and its checkpoints' manifests, written by one task in
//! order, so that the runtime never waits for the store. Order of writing: parts (by the
//! workers), manifest, record, and only then is anything old removed, by a task of its own, the
//! [`Pruner`](crate::pruner::Pruner).
//!
//! The record's chain fences its own writes; manifests and removals are not part of it. So the
//! record is looked at before each of them, and every few seconds besides: a coordinator that has
//! been replaced leaves the run alone and ends.

use std::time::Duration;

use looptrain_proto::v1::Held;
use looptrain_proto::{Digest, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Error, Finished, PartEntry, Register, RunRecord,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;

use crate::core::{Event, Left, ManifestDraft, Mark};
use crate::error::CoordinatorError;
use crate::runtime::Input;

/// A coordinator that has been replaced notices at the latest after this time.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// In words that follow "could not".
const OWED: &str = "note what the store refused before";

/// A coordinator that stops waits so long for old checkpoints that it is removing.
const LAST_REMOVAL: Duration = Duration::from_secs(10);

/// Something to write down.
#[derive(Debug)]
pub(crate) enum Note {
    /// How the run's workers compute.
    Numerics(String),
    /// That the run is paused, and why, or that it goes on.
    Pause(Option<String>),
    /// Answered when the notes before have been tried: with why the store did not take them.
    Kept(oneshot::Sender<Result<(), String>>),
    /// A checkpoint whose parts are all in the store.
    Manifest(ManifestDraft),
    /// Somebody may have left a checkpoint of a later step than this.
    Find { behind: Step },
    /// The last note: answered when all notes are durable, among them, when the run is done, how
    /// it ended.
    Last(Option<Finished>, oneshot::Sender<Result<(), CoordinatorError>>),
}

/// The task's state.
pub(crate) struct Keeper {
    pub(crate) run: String,
    pub(crate) trajectory: Digest,
    pub(crate) register: Register,
    pub(crate) checkpoints: Checkpoints,
    /// What the record lacks.
    pub(crate) owed: Owed,
    pub(crate) inputs: mpsc::Sender<Input>,
    /// Hears of the newest checkpoint.
    pub(crate) newest: watch::Sender<Option<Step>>,
    /// Removes old ones; it has come to its end when nobody can tell it of a newer one and it has
    /// nothing more to do.
    pub(crate) pruner: JoinHandle<()>,
    /// Tells the pruner to come to its end with what it is removing.
    pub(crate) leave: CancellationToken,
}

/// What the store has refused so far: it comes with the next record.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owed {
    /// How the run's workers compute.
    numerics: Option<String>,
    /// Whether the run is paused, and why.
    pause: Option<Option<String>>,
    /// Why it was refused.
    reason: String,
}

impl Owed {
    fn is_none(&self) -> bool {
        self.numerics.is_none() && self.pause.is_none()
    }
}

/// What the worker knew of the latest steps that left this checkpoint without a coordinator. Without
/// it the log lacks some lines, and nothing else.
pub(crate) async fn read_memory(checkpoints: &Checkpoints, step: Step) -> Option<Held> {
    let read = checkpoints.memory(step).await.map_err(|error| error.to_string());
    let decoded = read.and_then(|bytes| bytes.map(|bytes| Held::from_bytes(&bytes)).transpose());
    decoded.unwrap_or_else(|error| {
        tracing::warn!(%step, error, "the step log lacks what its checkpoint should add to it");
        None
    })
}

/// The run has another coordinator, and the runtime has been told: what was begun ends here.
struct Replaced;

impl Keeper {
    /// Works until nobody has notes any more.
    pub(crate) async fn run(mut self, mut notes: mpsc::UnboundedReceiver<Note>) {
        let mut look = interval_at(Instant::now() + LOOK_EVERY, LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Who has been replaced works on until the runtime ends, for it may be waiting for the
            // answer to its last note; the store refuses what matters.
            let _ = tokio::select! {
                biased;
                note = notes.recv() => match note {
                    Some(note) => self.take(note).await,
                    None => return,
                },
                _ = look.tick() => {
                    let (what, mine) = match self.owed.is_none() {
                        false => (OWED, self.update(|_| {}).await),
                        true => ("look for another coordinator", self.register.still_mine().await),
                    };
                    self.unless_replaced(what, mine).await
                }
            };
        }
    }

    async fn take(&mut self, note: Note) -> Result<(), Replaced> {
        match note {
            Note::Numerics(numerics) => {
                self.owed.numerics = Some(numerics);
                let updated = self.update(|_| {}).await;
                self.unless_replaced("note how the workers compute", updated).await
            }
            Note::Pause(reason) => {
                self.owed.pause = Some(reason);
                let updated = self.update(|_| {}).await;
                self.unless_replaced("note whether the run is paused", updated).await
            }
            Note::Kept(reply) => {
                // Whoever asked may have hung up.
                let _ = reply.send(match self.owed.is_none() {
                    true => Ok(()),
                    false => Err(self.owed.reason.clone()),
                });
                Ok(())
            }
            Note::Manifest(draft) => self.commit(draft).await,
            Note::Find { behind } => self.find(behind).await,
            Note::Last(finished, reply) => {
                let over = finished.is_some();
                let updated = match finished {
                    Some(finished) => self.update(|record| record.finished = Some(finished)).await,
                    None if self.owed.is_none() => Ok(()),
                    None => match self.update(|_| {}).await {
                        Err(error) if !matches!(error, Error::Fenced { .. }) => {
                            tracing::warn!(%error, "could not {OWED}");
                            Ok(())
                        }
                        updated => updated,
                    },
                };
                self.end_pruning(over).await;
                // Whoever asked has gone away only if the process is ending.
                let _ = reply.send(updated.map_err(CoordinatorError::of_store));
                Ok(())
            }
        }
    }

    async fn commit(&mut self, draft: ManifestDraft) -> Result<(), Replaced> {
        let manifest = self.manifest(draft);
        let step = manifest.step;
        match self.write(&manifest).await {
            Ok(()) => {}
            Err(error @ Error::Fenced { .. }) => return self.abort(error).await,
            Err(error) => {
                let reason = error.to_string();
                self.tell(Input::Event(Event::CheckpointRefused { step, reason })).await;
                return Ok(());
            }
        }
        let updated = self.update(|record| record.last_checkpoint = Some(step)).await;
        self.unless_replaced("note the newest checkpoint", updated).await?;
        self.tell(Input::Event(Event::CheckpointWritten { step })).await;
        self.newest.send_replace(Some(step));
        Ok(())
    }

    /// Looks for the newest good checkpoint behind a step, which becomes the one to go on from.
    async fn find(&mut self, behind: Step) -> Result<(), Replaced> {
        let found = match self.newest_behind(behind).await {
            Ok(found) => found,
            Err(error) => {
                let reason = error.to_string();
                self.tell(Input::Event(Event::CheckpointFound(Err(reason)))).await;
                return Ok(());
            }
        };
        let left = match found {
            None => None,
            Some(CheckpointManifest { step, weights_digest, trend, .. }) => {
                let updated = self.update(|record| record.last_checkpoint = Some(step)).await;
                self.unless_replaced("note the newest checkpoint", updated).await?;
                self.newest.send_replace(Some(step));
                let memory = read_memory(&self.checkpoints, step).await;
                let mark = Mark { step, weights_digest, record: None, trend };
                Some(Box::new(Left { mark, memory }))
            }
        };
        self.tell(Input::Event(Event::CheckpointFound(Ok(left)))).await;
        Ok(())
    }

    async fn newest_behind(&self, step: Step) -> Result<Option<CheckpointManifest>, Error> {
        let there = self.checkpoints.list().await?;
        let damaged = self.checkpoints.damaged();
        for newer in there.into_iter().rev().take_while(|there| *there > step) {
            if damaged.contains(&newer) {
                continue;
            }
            match self.checkpoints.verify(newer).await {
                Ok(manifest) if manifest.trajectory == self.trajectory => {
                    return Ok(Some(manifest));
                }
                Ok(_) => tracing::warn!(step = %newer, "passing over a checkpoint of another spec"),
                Err(error) if self.checkpoints.store().is_to_blame(&error) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "passing over a checkpoint");
                    self.checkpoints.distrust(newer);
                }
            }
        }
        Ok(None)
    }

    /// Waits until what is old is gone: a run that is `over` has no other time for it. One that has
    /// been stopped has when it goes on, and waits only, and not for long, for what is being
    /// removed: the rest of a checkpoint whose manifest is gone would take room until it is old
    /// enough for an orphan.
    async fn end_pruning(&mut self, over: bool) {
        drop(std::mem::replace(&mut self.newest, watch::Sender::new(None)));
        // One that panicked has left something that is old.
        if over {
            let _ = (&mut self.pruner).await;
        } else {
            self.leave.cancel();
            let _ = timeout(LAST_REMOVAL, &mut self.pruner).await;
        }
    }

    /// Writes a changed record, with what the store refused to note before.
    async fn update(&mut self, change: impl FnOnce(&mut RunRecord)) -> Result<(), Error> {
        let Owed { numerics, pause, .. } = self.owed.clone();
        let change = |record: &mut RunRecord| {
            record.numerics = numerics.or(record.numerics.take());
            record.paused = pause.unwrap_or(record.paused.take());
            change(record);
        };
        match self.register.update(change).await {
            Ok(()) => self.owed = Owed::default(),
            Err(error) => {
                self.owed.reason = error.to_string();
                return Err(error);
            }
        }
        Ok(())
    }

    async fn write(&self, manifest: &CheckpointManifest) -> Result<(), Error> {
        self.register.still_mine().await?;
        self.checkpoints.commit(manifest).await
    }

    fn manifest(&self, draft: ManifestDraft) -> CheckpointManifest {
        let part = |part: crate::core::SavedPart| PartEntry {
            file: part.file,
            bytes: part.bytes,
            digest: part.digest,
            tensors: part.tensors,
        };
        CheckpointManifest {
            version: CheckpointManifest::VERSION,
            run: self.run.clone(),
            step: draft.step,
            cursor: draft.cursor,
            trajectory: self.trajectory,
            generation: draft.generation,
            weights_digest: draft.weights_digest,
            parts: draft.parts.into_iter().map(part).collect(),
            trend: draft.trend,
        }
    }

    /// What the store does not let this coordinator do is worth a warning, unless it is another
    /// coordinator's now: then this one must stop.
    async fn unless_replaced(&self, what: &str, result: Result<(), Error>) -> Result<(), Replaced> {
        match result {
            Ok(()) => Ok(()),
            Err(error @ Error::Fenced { .. }) => self.abort(error).await,
            Err(error) => {
                tracing::warn!(%error, "could not {what}");
                Ok(())
            }
        }
    }

    async fn abort(&self, error: Error) -> Result<(), Replaced> {
        self.tell(Input::Abort(CoordinatorError::of_store(error))).await;
        Err(Replaced)
    }

    async fn tell(&self, input: Input) {
        // The runtime has gone away only if the process is ending.
        let _ = self.inputs.send(input).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_storage::Store;

    use super::*;
    use crate::testing::{claim, pruner, saved};

    async fn keeper(store: &Store) -> (Keeper, mpsc::Receiver<Input>) {
        let (inputs, told) = mpsc::channel(8);
        let register = claim(store).await;
        let checkpoints = Checkpoints::new(store, "r");
        let (newest, newer) = watch::channel(None);
        let pruner = pruner(&checkpoints, &register, newer);
        let leave = pruner.leave.clone();
        let keeper = Keeper {
            run: "r".into(),
            trajectory: Digest::of(b"spec"),
            register,
            checkpoints,
            owed: Owed::default(),
            inputs,
            newest,
            pruner: tokio::spawn(pruner.run()),
            leave,
        };
        (keeper, told)
    }

    /// A checkpoint whose one part is in the store.
    async fn draft(checkpoints: &Checkpoints, step: u64) -> ManifestDraft {
        let CheckpointManifest { step, cursor, generation, weights_digest, parts, trend, .. } =
            saved(checkpoints, step).await;
        let part = |part: PartEntry| {
            let PartEntry { file, bytes, digest, tensors } = part;
            let stall = Duration::ZERO;
            crate::core::SavedPart { file, bytes, digest, tensors, weights_digest, stall }
        };
        let parts = parts.into_iter().map(part).collect();
        ManifestDraft { step, cursor, generation, weights_digest, parts, trend }
    }

    #[tokio::test]
    async fn a_checkpoint_is_noted_and_the_older_ones_are_gone_when_the_run_is_over() {
        let store = Store::open("memory://").unwrap();
        let (mut keeper, mut told) = keeper(&store).await;
        for step in [1, 2, 3] {
            let draft = draft(&keeper.checkpoints, step).await;
            assert!(keeper.commit(draft).await.is_ok());
            let Input::Event(Event::CheckpointWritten { step: written }) =
                told.recv().await.unwrap()
            else {
                panic!("it was written")
            };
            assert_eq!(written, Step(step));
            assert_eq!(keeper.register.current().last_checkpoint, Some(Step(step)));
        }
        let (reply, answer) = oneshot::channel();
        let finished =
            Finished { step: Step(3), loss: 1.0, weights_digest: Digest::of(b"weights") };
        assert!(keeper.take(Note::Last(Some(finished), reply)).await.is_ok());
        answer.await.unwrap().unwrap();
        assert_eq!(keeper.checkpoints.list().await.unwrap(), [Step(3)]);
    }

    #[tokio::test]
    async fn what_is_being_removed_when_a_run_is_stopped_goes_whole() {
        for pause in 0..40 {
            let directory = tempfile::tempdir().unwrap();
            let url = format!("file://{}", directory.path().display());
            let store = Store::open(&url).unwrap();
            let (mut keeper, mut told) = keeper(&store).await;
            for step in [1, 2] {
                let draft = draft(&keeper.checkpoints, step).await;
                assert!(keeper.commit(draft).await.is_ok());
                told.recv().await.unwrap();
            }
            // Another moment of the pruner's work each time.
            tokio::time::sleep(Duration::from_micros(100 * pause)).await;
            let (reply, answer) = oneshot::channel();
            assert!(keeper.take(Note::Last(None, reply)).await.is_ok());
            answer.await.unwrap().unwrap();
            keeper.pruner.abort();
            let stored = keeper.checkpoints.inventory().await.unwrap();
            assert!(stored.iter().all(|it| it.complete), "{pause}: {stored:?}");
        }
    }

    #[tokio::test]
    async fn a_checkpoint_does_not_wait_until_older_ones_are_gone() {
        let store = Store::open("memory://").unwrap();
        let (mut keeper, mut told) = keeper(&store).await;
        keeper.pruner.abort();
        keeper.pruner = tokio::spawn(std::future::pending());
        for step in [1, 2] {
            let draft = draft(&keeper.checkpoints, step).await;
            assert!(keeper.commit(draft).await.is_ok());
            told.recv().await.unwrap();
        }
        assert_eq!(keeper.checkpoints.list().await.unwrap(), [Step(1), Step(2)]);
    }

    #[tokio::test]
    async fn what_the_store_refused_to_note_of_the_numerics_comes_with_the_next_record() {
        let store = Store::open("memory://").unwrap();
        let (mut keeper, _told) = keeper(&store).await;
        keeper.owed.numerics = Some("avx2".into());
        let draft = draft(&keeper.checkpoints, 1).await;
        assert!(keeper.commit(draft).await.is_ok());
        assert_eq!(keeper.register.current().numerics.as_deref(), Some("avx2"));
        assert!(keeper.owed.is_none());
    }

    #[tokio::test]
    async fn a_pause_that_the_store_refuses_is_noted_later_and_whoever_asks_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("file://{}", directory.path().display())).unwrap();
        let (mut keeper, _told) = keeper(&store).await;
        let kept = async |keeper: &mut Keeper| {
            let (reply, answer) = oneshot::channel();
            assert!(keeper.take(Note::Kept(reply)).await.is_ok());
            answer.await.unwrap()
        };
        assert_eq!(kept(&mut keeper).await, Ok(()));
        // A file where the store needs a directory.
        let (records, aside) =
            (directory.path().join("runs/r/record"), directory.path().join("aside"));
        std::fs::rename(&records, &aside).unwrap();
        std::fs::write(&records, "in the way").unwrap();
        assert!(keeper.take(Note::Pause(Some("lunch".into()))).await.is_ok());
        assert!(kept(&mut keeper).await.unwrap_err().contains("record"));
        std::fs::remove_file(&records).unwrap();
        std::fs::rename(&aside, &records).unwrap();
        let (reply, answer) = oneshot::channel();
        assert!(keeper.take(Note::Last(None, reply)).await.is_ok());
        answer.await.unwrap().unwrap();
        assert_eq!(kept(&mut keeper).await, Ok(()));
        assert_eq!(claim(&store).await.current().paused.as_deref(), Some("lunch"));
    }

    #[tokio::test]
    async fn a_coordinator_that_has_been_replaced_makes_no_checkpoint() {
        let store = Store::open("memory://").unwrap();
        let (mut keeper, mut told) = keeper(&store).await;
        let first = draft(&keeper.checkpoints, 1).await;
        assert!(keeper.commit(first).await.is_ok());
        told.recv().await.unwrap();
        claim(&store).await;
        let second = draft(&keeper.checkpoints, 2).await;
        assert!(keeper.commit(second).await.is_err());
        assert_eq!(keeper.checkpoints.list().await.unwrap(), [Step(1)]);
        let Input::Abort(error) = told.recv().await.unwrap() else { panic!("it must stop") };
        assert!(matches!(error, CoordinatorError::Fenced { .. }), "{error}");
        assert!(told.try_recv().is_err(), "and nothing else");
    }

    #[tokio::test]
    async fn a_coordinator_that_has_been_replaced_notices_without_a_note() {
        let store = Store::open("memory://").unwrap();
        let (keeper, mut told) = keeper(&store).await;
        let (notes, receiver) = mpsc::unbounded_channel();
        claim(&store).await;
        let working = tokio::spawn(keeper.run(receiver));
        let told = tokio::time::timeout(20 * LOOK_EVERY, told.recv()).await.unwrap().unwrap();
        assert!(matches!(told, Input::Abort(CoordinatorError::Fenced { .. })));
        drop(notes);
        working.await.unwrap();
    }
}
