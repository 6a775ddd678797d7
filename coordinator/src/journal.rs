//! The run's metrics in the store: one JSON line a committed step, one object an evaluation, and one
//! object, the chronicle, for what else the status page shows (events, generations, the ledger).
//! Written by a task of its own; a store that is slow or away for a while delays what is written
//! and loses nothing, and training does not notice. Segments are written over and removed, which
//! nothing but this task guards: so it looks whether the run is still this coordinator's before it
//! does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::Step;
use looptrain_storage::{Error, MetricsLog, Store, Witness, run_prefix};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::board::{Board, Chronicle};
use crate::records::{EvaluationRecord, StepRecord};

/// Lines wait at most this long before they are written.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// The chronicle is written at most this often: it is written anew each time.
const CHRONICLE_EVERY: Duration = Duration::from_secs(5);

/// It is written at least this often, for the time of workers that wait passes, too.
const CHRONICLE_AT_LEAST: Duration = Duration::from_secs(60);

/// Something to write.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A committed step.
    Step(Box<StepRecord>),
    /// An evaluation.
    Evaluation(EvaluationRecord),
    /// A resume may start here: later lines go to another segment.
    Seal,
    /// Steps behind this one are undone.
    Rewind(Step),
    /// Write what is left, answer, and stop.
    Close(oneshot::Sender<()>),
}

pub(crate) fn evaluations_prefix(run: &str) -> String {
    format!("{}/evaluations", run_prefix(run))
}

pub(crate) fn evaluation_key(run: &str, step: Step) -> String {
    format!("{}/step-{:010}.json", evaluations_prefix(run), step.0)
}

pub(crate) fn chronicle_key(run: &str) -> String {
    format!("{}/chronicle.json", run_prefix(run))
}

/// Reads the chronicle of a run; an empty one when there is none, or what is there is no JSON, for
/// training does not depend on it.
pub(crate) async fn read_chronicle(
    store: &Store,
    run: &str,
    now_unix_ms: u64,
) -> looptrain_storage::Result<Chronicle> {
    let key = chronicle_key(run);
    let Some(bytes) = store.get_opt(&key).await? else { return Ok(Chronicle::default()) };
    match serde_json::from_slice(&bytes) {
        Ok(json) => Ok(Chronicle::from_json(&json, now_unix_ms)),
        Err(error) => {
            // For who wants to know what it was.
            store.put(&format!("{key}.damaged"), bytes).await?;
            let place = format!("{}/{key}", store.url());
            tracing::warn!(%error, "{place} is damaged and begun anew; a copy has .damaged behind its name");
            Ok(Chronicle::default())
        }
    }
}

/// What a run's coordinators noted for people beside steps and evaluations, as it is in the store
/// (`events`, newest first; `generations`; `checkpoints`; `ledger` with `seconds` by category); null when
/// there is nothing.
pub async fn read_chronicle_json(store: &Store, run: &str) -> serde_json::Value {
    let bytes = store.get_opt(&chronicle_key(run)).await.ok().flatten();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// The task's state.
pub(crate) struct Journal {
    store: Store,
    run: String,
    log: MetricsLog,
    witness: Witness,
    /// Steps behind this one are undone, and the log has not been cut back there yet.
    undone: Option<Step>,
    /// Steps that wait for the log to be cut back.
    steps: Vec<StepRecord>,
    /// Evaluations that are not in the store yet.
    evaluations: VecDeque<EvaluationRecord>,
    board: Arc<Board>,
    /// When the chronicle was last written.
    kept: Instant,
}

impl Journal {
    pub(crate) fn new(
        store: Store,
        run: String,
        log: MetricsLog,
        witness: Witness,
        board: Arc<Board>,
    ) -> Self {
        Self {
            store,
            run,
            log,
            witness,
            undone: None,
            steps: Vec::new(),
            evaluations: VecDeque::new(),
            board,
            kept: Instant::now(),
        }
    }

    /// Works until it is closed, or another coordinator has the run.
    pub(crate) async fn run(mut self, mut entries: mpsc::UnboundedReceiver<Entry>) {
        let mut flush = interval_at(Instant::now() + FLUSH_EVERY, FLUSH_EVERY);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changes = self.board.follow();
        loop {
            let entry = tokio::select! {
                biased;
                _ = flush.tick() => None,
                entry = entries.recv() => Some(entry),
            };
            let written = match entry {
                Some(None) => return,
                Some(Some(Entry::Close(done))) => {
                    warn_of(&self.flush().await);
                    warn_of(&self.keep_chronicle().await);
                    // Nobody waits for a process that is being killed.
                    let _ = done.send(());
                    return;
                }
                Some(Some(entry)) => self.take(entry).await,
                None => {
                    let flushed = self.flush().await;
                    let age = self.kept.elapsed();
                    let changed =
                        changes.has_changed().unwrap_or(false) || age >= CHRONICLE_AT_LEAST;
                    // Only when there is something new, and after what matters more.
                    if flushed.is_ok() && changed && age >= CHRONICLE_EVERY {
                        changes.mark_unchanged();
                        self.keep_chronicle().await
                    } else {
                        flushed
                    }
                }
            };
            if matches!(written, Err(Error::Fenced { .. })) {
                return;
            }
            warn_of(&written);
        }
    }

    async fn keep_chronicle(&mut self) -> looptrain_storage::Result<()> {
        self.kept = Instant::now();
        self.witness.still_mine().await?;
        match serde_json::to_vec(&self.board.chronicle()) {
            Ok(json) => self.store.put(&chronicle_key(&self.run), json).await?,
            Err(error) => tracing::warn!(%error, "the chronicle has no JSON form"),
        }
        Ok(())
    }

    async fn take(&mut self, entry: Entry) -> looptrain_storage::Result<()> {
        match entry {
            Entry::Step(record) if self.undone.is_some() => self.steps.push(*record),
            Entry::Step(record) => self.log.append(&record)?,
            Entry::Evaluation(record) => {
                self.evaluations.push_back(record);
                self.flush().await?;
            }
            // A log that has to be cut back begins a segment then.
            Entry::Seal if self.undone.is_some() => {}
            Entry::Seal => {
                self.witness.still_mine().await?;
                self.log.seal().await?;
            }
            Entry::Rewind(to) => {
                self.steps.retain(|record| record.step <= to);
                self.evaluations.retain(|record| record.step <= to);
                self.undone = Some(self.undone.map_or(to, |before| before.min(to)));
                self.flush().await?;
            }
            Entry::Close(_) => {}
        }
        Ok(())
    }

    /// Writes what is not written yet; what cannot be is kept for the next time.
    async fn flush(&mut self) -> looptrain_storage::Result<()> {
        if self.log.is_clean() && self.undone.is_none() && self.evaluations.is_empty() {
            return Ok(());
        }
        self.witness.still_mine().await?;
        self.log.flush().await?;
        if let Some(to) = self.undone {
            self.log = MetricsLog::open(&self.store, &self.run, to).await?;
            self.undone = None;
            for record in self.steps.drain(..) {
                self.log.append(&record)?;
            }
            self.log.flush().await?;
        }
        while let Some(record) = self.evaluations.front() {
            match serde_json::to_vec(record) {
                Ok(json) => self.store.put(&evaluation_key(&self.run, record.step), json).await?,
                Err(error) => tracing::warn!(%error, "an evaluation has no JSON form"),
            }
            self.evaluations.pop_front();
        }
        Ok(())
    }
}

fn warn_of(result: &looptrain_storage::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "metrics could not be written; they will be tried again");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use looptrain_proto::Digest;
    use looptrain_storage::{Register, RunRecord};

    use super::*;
    use crate::history::read_history;
    use crate::records::example;

    fn step(step: u64, loss: f64) -> Entry {
        Entry::Step(Box::new(example(step, loss)))
    }

    fn evaluation(step: u64) -> EvaluationRecord {
        EvaluationRecord::example(step)
    }

    async fn claim(store: &Store) -> Register {
        let record = RunRecord::new(Digest::of(b"spec"), "[run]".into(), &[]);
        Register::claim(store, "r", |_| Ok(record.clone())).await.unwrap()
    }

    async fn journal(store: &Store) -> Journal {
        let log = MetricsLog::open(store, "r", Step(0)).await.unwrap();
        let witness = claim(store).await.witness();
        Journal::new(store.clone(), "r".into(), log, witness, Arc::default())
    }

    async fn losses(store: &Store) -> Vec<(u64, f64)> {
        let history = read_history(store, "r", Step(0)).await.unwrap();
        history.steps.iter().map(|record| (record.step.0, record.loss)).collect()
    }

    /// A directory of a test, and the store in it.
    struct Scratch(PathBuf, Store);

    impl Scratch {
        fn new(test: &str) -> Self {
            let name = format!("looptrain-{test}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let store = Store::open(&format!("file://{}", path.display())).unwrap();
            std::fs::create_dir_all(path.join("runs/r/metrics")).unwrap();
            Self(path, store)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_cut_back_is_cut_back_later_and_loses_no_line() {
        let Scratch(path, store) = &Scratch::new("cut");
        let mut journal = journal(store).await;
        for at in 1..=4 {
            journal.take(step(at, 1.0)).await.unwrap();
            journal.take(Entry::Seal).await.unwrap();
        }
        // A directory that is its own child: nothing can be listed while it is there.
        let metrics = path.join("runs/r/metrics");
        std::os::unix::fs::symlink(&metrics, metrics.join("loop")).unwrap();
        assert!(journal.take(Entry::Rewind(Step(1))).await.is_err());
        journal.take(step(2, 2.0)).await.unwrap();
        journal.take(Entry::Seal).await.unwrap();
        assert!(journal.flush().await.is_err());
        journal.take(step(3, 2.0)).await.unwrap();
        std::fs::remove_file(metrics.join("loop")).unwrap();
        journal.flush().await.unwrap();
        journal.take(step(4, 2.0)).await.unwrap();
        journal.flush().await.unwrap();
        assert_eq!(losses(store).await, [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]);
    }

    #[tokio::test]
    async fn what_is_undone_while_the_store_is_away_is_not_written() {
        let store = Store::open("memory://").unwrap();
        let mut journal = journal(&store).await;
        for at in 1..=3 {
            journal.take(step(at, 1.0)).await.unwrap();
        }
        journal.undone = Some(Step(2));
        journal.take(step(3, 2.0)).await.unwrap();
        journal.take(Entry::Rewind(Step(1))).await.unwrap();
        journal.take(step(2, 3.0)).await.unwrap();
        journal.flush().await.unwrap();
        assert_eq!(losses(&store).await, [(1, 1.0), (2, 3.0)]);
    }

    #[tokio::test]
    async fn an_evaluation_that_the_store_refuses_is_written_at_the_next_flush() {
        let Scratch(path, store) = &Scratch::new("evaluations");
        let mut journal = journal(store).await;
        // A file where the store needs a directory.
        let blocked = path.join("runs/r/evaluations");
        std::fs::write(&blocked, "in the way").unwrap();
        assert!(journal.take(Entry::Evaluation(evaluation(5))).await.is_err());
        assert!(journal.take(Entry::Evaluation(evaluation(6))).await.is_err());
        std::fs::remove_file(&blocked).unwrap();
        journal.flush().await.unwrap();
        let history = read_history(store, "r", Step(0)).await.unwrap();
        assert_eq!(history.evaluations, [evaluation(5), evaluation(6)]);
    }

    #[tokio::test]
    async fn a_coordinator_that_was_replaced_writes_over_nothing() {
        let store = Store::open("memory://").unwrap();
        let mut old = journal(&store).await;
        for at in 1..=3 {
            old.take(step(at, 1.0)).await.unwrap();
        }
        old.flush().await.unwrap();
        old.take(step(4, 1.0)).await.unwrap();
        // It sleeps here, and the run goes on elsewhere.
        let mut new = journal(&store).await;
        new.take(Entry::Rewind(Step(0))).await.unwrap();
        new.take(step(1, 2.0)).await.unwrap();
        new.take(Entry::Seal).await.unwrap();
        for entry in
            [step(5, 1.0), Entry::Seal, Entry::Rewind(Step(0)), Entry::Evaluation(evaluation(5))]
        {
            let taken = old.take(entry).await;
            assert!(matches!(taken, Ok(()) | Err(Error::Fenced { .. })), "{taken:?}");
        }
        assert!(matches!(old.flush().await, Err(Error::Fenced { .. })));
        assert_eq!(losses(&store).await, [(1, 2.0)]);
        assert!(read_history(&store, "r", Step(0)).await.unwrap().evaluations.is_empty());
    }
}
