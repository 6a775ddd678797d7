//! What the store keeps of a run's past, without holding all of it: of steps long ago some are enough
//! for a curve.

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::Step;
use looptrain_storage::{Store, read_metrics_by_segment};

use crate::core::HIGHEST_GENERATION;
use crate::journal::{evaluation_key, evaluations_prefix};
use crate::records::{EvaluationRecord, StepRecord};

/// Steps that are kept: the newest half of them, and of older ones every second, fourth, eighth and
/// so on, as few as fit.
pub(crate) const STEPS: usize = 4000;

/// Evaluations that are kept, likewise.
const EVALUATIONS: usize = 1000;

/// Evaluations that are read at once.
const READERS: usize = 16;

/// Steps of a run in order, the older ones thinned out.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    records: Vec<StepRecord>,
    /// Of the older steps, those are kept that can be halved this often.
    doublings: u32,
}

impl Steps {
    pub(crate) fn all(&self) -> &[StepRecord] {
        &self.records
    }

    pub(crate) fn into_all(self) -> Vec<StepRecord> {
        self.records
    }

    pub(crate) fn push(&mut self, record: StepRecord) {
        self.records.push(record);
        self.thin();
    }

    pub(crate) fn extend(&mut self, records: impl IntoIterator<Item = StepRecord>) {
        records.into_iter().for_each(|record| self.push(record));
    }

    /// The steps behind this one are undone; how many of those that are kept.
    pub(crate) fn undo(&mut self, from: Step) -> usize {
        let kept = self.records.len();
        self.records.retain(|record| record.step <= from);
        kept - self.records.len()
    }

    fn thin(&mut self) {
        if self.records.len() <= STEPS {
            return;
        }
        let mut newest = self.records.split_off(self.records.len() - STEPS / 2);
        self.records.retain(|record| record.step.0.is_multiple_of(1 << self.doublings));
        while self.records.len() > STEPS / 4 {
            if self.doublings == u64::BITS - 1 {
                // One step many times over, out of a damaged log.
                self.records.truncate(STEPS / 4);
                break;
            }
            self.doublings += 1;
            self.records.retain(|record| record.step.0.is_multiple_of(1 << self.doublings));
        }
        self.records.append(&mut newest);
    }
}

/// Leaves out every second one of the older half when there are too many, so that what is long ago
/// is the sparsest.
pub(crate) fn thin_evaluations(evaluations: &mut Vec<EvaluationRecord>) {
    if evaluations.len() > EVALUATIONS {
        let mut newer = evaluations.split_off(EVALUATIONS / 2);
        let mut number = 0;
        evaluations.retain(|_| {
            number += 1;
            number % 2 == 1
        });
        evaluations.append(&mut newer);
    }
}

/// What earlier coordinators wrote.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// In order.
    pub(crate) steps: Vec<StepRecord>,
    pub(crate) evaluations: Vec<EvaluationRecord>,
}

/// Reads the history of a run: every step from `whole` on, and of those before it as many as [`Steps`]
/// keeps. Lines that do not parse are left out: they are for people, and nothing depends on them.
pub(crate) async fn read_history(
    store: &Store,
    run: &str,
    whole: Step,
) -> looptrain_storage::Result<History> {
    let (mut older, mut steps) = (Steps::default(), Vec::new());
    let take = |lines: Vec<serde_json::Value>| {
        let records = lines.into_iter().filter_map(|it| serde_json::from_value(it).ok());
        // The next generation is above that of the last line, whatever a damaged one says.
        let good = |record: &StepRecord| record.generation.0 <= HIGHEST_GENERATION;
        for record in records.filter(good) {
            match record.step < whole {
                true => older.push(record),
                false => steps.push(record),
            }
        }
    };
    read_metrics_by_segment(store, run, take).await?;
    let mut all = older.into_all();
    all.append(&mut steps);
    let listed = store.list(&evaluations_prefix(run)).await?;
    let reads = listed.into_iter().map(|object| async move { store.get(&object.key).await });
    let mut reads = futures::stream::iter(reads).buffered(READERS);
    let mut evaluations = Vec::new();
    while let Some(bytes) = reads.try_next().await? {
        evaluations.extend(serde_json::from_slice(&bytes).ok());
        thin_evaluations(&mut evaluations);
    }
    Ok(History { steps: all, evaluations })
}

/// The evaluation after a step; `None` when there is none, or it does not parse.
pub(crate) async fn read_evaluation(
    store: &Store,
    run: &str,
    step: Step,
) -> looptrain_storage::Result<Option<EvaluationRecord>> {
    let bytes = store.get_opt(&evaluation_key(run, step)).await?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_storage::MetricsLog;

    use super::*;
    use crate::records::example;

    #[tokio::test]
    async fn of_a_long_past_some_is_read_and_all_from_a_step_on() {
        let store = Store::open("memory://").unwrap();
        let mut log = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        let last = 5 * STEPS as u64;
        for step in 1..=last {
            log.append(&example(step, 1.0)).unwrap();
            if step % 1000 == 0 {
                log.seal().await.unwrap();
            }
        }
        let whole = last - 2 * STEPS as u64;
        let history = read_history(&store, "r", Step(whole)).await.unwrap();
        let steps: Vec<u64> = history.steps.iter().map(|record| record.step.0).collect();
        assert!(steps.is_sorted() && steps.len() <= 3 * STEPS + 1, "{}", steps.len());
        let newest: Vec<u64> = (whole..=last).collect();
        assert!(steps.ends_with(&newest));
        assert!(steps.len() - newest.len() > STEPS / 2, "and something of what was before");
    }

    #[test]
    fn evaluations_of_long_ago_are_the_sparsest() {
        let mut evaluations = Vec::new();
        for step in 1..=20 * EVALUATIONS as u64 {
            evaluations.push(EvaluationRecord::example(step));
            thin_evaluations(&mut evaluations);
        }
        let steps: Vec<u64> = evaluations.iter().map(|record| record.step.0).collect();
        assert!(steps.len() <= EVALUATIONS && steps.is_sorted());
        let newest: Vec<u64> = (19_750..=20_000).collect();
        assert!(steps.ends_with(&newest));
        assert!(steps[0] == 1 && steps[1] - steps[0] > 100, "{:?}", &steps[..5]);
    }
}
