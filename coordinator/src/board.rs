//! What the dashboard shows beside the core's snapshot: history, the older part of it thinned out,
//! so that a long run does not fill the memory. Written by the runtime, read by HTTP handlers; a
//! lock is held for a copy at most.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use looptrain_proto::Step;
use serde::Serialize;

use crate::journal::History;
use crate::records::{EvaluationRecord, RunEvent, StepRecord};

/// Events that are kept for the page.
const EVENTS: usize = 200;

/// Steps that are kept for the page: the newest half of them, and of older ones every second,
/// fourth, eighth and so on, as few as fit.
const STEPS: usize = 4000;

/// An event as the page shows it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) unix_ms: u64,
    pub(crate) text: String,
    /// `good`, `bad` or `plain`.
    pub(crate) tone: &'static str,
}

#[derive(Debug, Default)]
struct State {
    steps: Vec<StepRecord>,
    /// Of the older steps, those are kept that can be halved this often.
    doublings: u32,
    evaluations: Vec<EvaluationRecord>,
    events: VecDeque<Entry>,
    rewinds: u64,
    checkpoint_unix_ms: Option<u64>,
}

impl State {
    fn thin(&mut self) {
        if self.steps.len() <= STEPS {
            return;
        }
        let mut newest = self.steps.split_off(self.steps.len() - STEPS / 2);
        self.steps.retain(|record| record.step.0.is_multiple_of(1 << self.doublings));
        while self.steps.len() > STEPS / 4 {
            self.doublings += 1;
            self.steps.retain(|record| record.step.0.is_multiple_of(1 << self.doublings));
        }
        self.steps.append(&mut newest);
    }
}

/// Shared between the runtime and the dashboard.
#[derive(Debug, Default)]
pub(crate) struct Board {
    state: Mutex<State>,
}

/// The board's part of `/api/status`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Recent {
    pub(crate) evaluations: Vec<EvaluationRecord>,
    /// Newest first.
    pub(crate) events: Vec<Entry>,
    /// Grows when steps are undone, so that readers of `/api/steps` start over.
    pub(crate) rewinds: u64,
    pub(crate) checkpoint_unix_ms: Option<u64>,
    pub(crate) now_unix_ms: u64,
}

impl Board {
    pub(crate) fn new(history: History) -> Self {
        let History { steps, evaluations } = history;
        let mut state = State { steps, evaluations, ..State::default() };
        state.thin();
        Self { state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; should it ever, the history is still worth showing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, event: &RunEvent) {
        let mut state = self.state();
        let now = unix_ms();
        let tone = match event {
            RunEvent::Committed(record) => {
                state.steps.push((**record).clone());
                state.thin();
                if record.skipped.is_none() {
                    return;
                }
                "bad"
            }
            RunEvent::Evaluated(record) => {
                state.evaluations.retain(|kept| kept.step < record.step);
                state.evaluations.push(record.clone());
                "plain"
            }
            RunEvent::CheckpointSaved { .. } => {
                state.checkpoint_unix_ms = Some(now);
                "good"
            }
            RunEvent::Formed { .. }
            | RunEvent::CaughtUp { .. }
            | RunEvent::GateRecovered { .. }
            | RunEvent::LoopLossFalls { .. }
            | RunEvent::Finished { .. } => "good",
            RunEvent::WorkerLost { .. }
            | RunEvent::WorkerRefused { .. }
            | RunEvent::Rewound { .. }
            | RunEvent::CheckpointDelayed { .. }
            | RunEvent::CheckpointFailed { .. }
            | RunEvent::Straggles { .. }
            | RunEvent::GateCollapsed { .. }
            | RunEvent::LoopLossRises { .. }
            | RunEvent::Failed { .. } => "bad",
            RunEvent::WorkerJoined { .. }
            | RunEvent::Waiting { .. }
            | RunEvent::Draining { .. }
            | RunEvent::Pausing { .. }
            | RunEvent::Resumed
            | RunEvent::Stopping { .. } => "plain",
        };
        let text = event.to_string();
        // A long wait must not push everything else off the page.
        state.events.pop_front_if(|newest| newest.text == text);
        state.events.push_front(Entry { unix_ms: now, text, tone });
        state.events.truncate(EVENTS);
    }

    /// The history ends after step `from`; these steps of it were missing.
    pub(crate) fn go_on(&self, from: Step, lost: &[StepRecord]) {
        let mut state = self.state();
        let shown = state.steps.len();
        state.steps.retain(|kept| kept.step <= from);
        state.evaluations.retain(|kept| kept.step <= from);
        state.rewinds += u64::from(state.steps.len() < shown);
        state.steps.extend_from_slice(lost);
        state.thin();
    }

    pub(crate) fn recent(&self) -> Recent {
        let state = self.state();
        Recent {
            evaluations: state.evaluations.clone(),
            events: state.events.iter().cloned().collect(),
            rewinds: state.rewinds,
            checkpoint_unix_ms: state.checkpoint_unix_ms,
            now_unix_ms: unix_ms(),
        }
    }

    /// At most `limit` of the steps that are kept behind `after`, in order.
    pub(crate) fn steps(&self, after: Step, limit: usize) -> Vec<StepRecord> {
        let state = self.state();
        let from = state.steps.partition_point(|record| record.step <= after);
        state.steps[from..].iter().take(limit).cloned().collect()
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::example;

    fn steps(board: &Board) -> Vec<u64> {
        board.steps(Step(0), usize::MAX).iter().map(|record| record.step.0).collect()
    }

    #[test]
    fn old_steps_thin_out_and_the_newest_stay() {
        let mut history = History::default();
        history.steps.extend((1..=30_000).map(|step| example(step, 1.0)));
        let board = Board::new(history);
        assert!(steps(&board).len() <= STEPS);
        for step in 30_001..=60_000 {
            board.record(&RunEvent::Committed(Box::new(example(step, 1.0))));
        }
        let kept = steps(&board);
        assert!(kept.len() <= STEPS && kept.is_sorted(), "{} are kept", kept.len());
        let newest = &kept[kept.len() - STEPS / 2..];
        assert_eq!(newest, (58_001..=60_000).collect::<Vec<_>>());
        let gaps = [0].iter().chain(&kept).zip(&kept).map(|(before, step)| step - before);
        assert!(gaps.max() <= Some(64), "all of the run is there");
    }

    #[test]
    fn a_wait_that_lasts_is_one_event() {
        let board = Board::default();
        for here in [0, 0, 1, 1, 1] {
            board.record(&RunEvent::Waiting { here, wanted: 2 });
        }
        let texts: Vec<String> =
            board.recent().events.into_iter().map(|entry| entry.text).collect();
        assert_eq!(
            texts,
            ["waiting for workers: 1 of 2 are here", "waiting for workers: 0 of 2 are here"]
        );
    }
}
