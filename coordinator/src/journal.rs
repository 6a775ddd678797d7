//! The run's metrics in the store: one JSON line a committed step, one object an evaluation.
//! Written by a task of its own; a store that is slow or away for a while delays lines and loses
//! none, and training does not notice.

use std::time::Duration;

use looptrain_proto::Step;
use looptrain_storage::{MetricsLog, Store, read_metrics, run_prefix};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::records::{EvaluationRecord, StepRecord};

/// Lines wait at most this long before they are written.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// Something to write.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A committed step.
    Step(StepRecord),
    /// An evaluation.
    Evaluation(EvaluationRecord),
    /// A resume may start here: later lines go to another segment.
    Seal,
    /// Steps behind this one are undone.
    Rewind(Step),
    /// Write what is left, answer, and stop.
    Close(oneshot::Sender<()>),
}

/// What an earlier coordinator wrote, up to `until`.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) steps: Vec<StepRecord>,
    pub(crate) evaluations: Vec<EvaluationRecord>,
}

fn evaluations_prefix(run: &str) -> String {
    format!("{}/evaluations", run_prefix(run))
}

fn evaluation_key(run: &str, step: Step) -> String {
    format!("{}/step-{:010}.json", evaluations_prefix(run), step.0)
}

/// Reads the history of a run. Lines that do not parse are left out: they are for people, and
/// nothing depends on them.
pub(crate) async fn read_history(
    store: &Store,
    run: &str,
    until: Step,
) -> looptrain_storage::Result<History> {
    let lines = read_metrics(store, run).await?;
    let parse = |line| serde_json::from_value::<StepRecord>(line).ok();
    let mut steps: Vec<StepRecord> = lines.into_iter().filter_map(parse).collect();
    steps.retain(|record| record.step <= until);
    let mut evaluations = Vec::new();
    for object in store.list(&evaluations_prefix(run)).await? {
        let bytes = store.get(&object.key).await?;
        evaluations.extend(serde_json::from_slice::<EvaluationRecord>(&bytes).ok());
    }
    evaluations.retain(|record| record.step <= until);
    Ok(History { steps, evaluations })
}

/// The task's state.
pub(crate) struct Journal {
    pub(crate) store: Store,
    pub(crate) run: String,
    pub(crate) log: MetricsLog,
}

impl Journal {
    /// Works until it is closed.
    pub(crate) async fn run(mut self, mut entries: mpsc::UnboundedReceiver<Entry>) {
        let mut flush = interval_at(Instant::now() + FLUSH_EVERY, FLUSH_EVERY);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let entry = tokio::select! {
                entry = entries.recv() => entry,
                _ = flush.tick() => {
                    warn_of(self.log.flush().await);
                    continue;
                }
            };
            match entry {
                None => return,
                Some(Entry::Step(record)) => warn_of(self.log.append(&record)),
                Some(Entry::Evaluation(record)) => self.write_evaluation(&record).await,
                Some(Entry::Seal) => warn_of(self.log.seal().await),
                Some(Entry::Rewind(to)) => {
                    warn_of(self.log.flush().await);
                    match MetricsLog::open(&self.store, &self.run, to).await {
                        Ok(log) => self.log = log,
                        Err(error) => warn_of(Err(error)),
                    }
                }
                Some(Entry::Close(done)) => {
                    warn_of(self.log.flush().await);
                    // Nobody waits for a process that is being killed.
                    let _ = done.send(());
                    return;
                }
            }
        }
    }

    async fn write_evaluation(&self, record: &EvaluationRecord) {
        match serde_json::to_vec(record) {
            Ok(json) => {
                warn_of(self.store.put(&evaluation_key(&self.run, record.step), json).await)
            }
            Err(error) => tracing::warn!(%error, "an evaluation has no JSON form"),
        }
    }
}

fn warn_of(result: looptrain_storage::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "metrics could not be written; they will be tried again");
    }
}
