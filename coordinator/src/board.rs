//! What the dashboard shows beside the core's snapshot: history that only grows. Written by the
//! runtime, read by HTTP handlers; a lock is held for a copy at most.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use looptrain_proto::Step;
use serde::Serialize;

use crate::journal::History;
use crate::records::{EvaluationRecord, RunEvent, StepRecord};

/// Events that are kept for the page.
const EVENTS: usize = 200;

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
    evaluations: Vec<EvaluationRecord>,
    events: VecDeque<Entry>,
    rewinds: u64,
    checkpoint_unix_ms: Option<u64>,
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
        Self { state: Mutex::new(State { steps, evaluations, ..State::default() }) }
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
                state.steps.push(record.clone());
                return;
            }
            RunEvent::Evaluated(record) => {
                state.evaluations.retain(|kept| kept.step < record.step);
                state.evaluations.push(record.clone());
                "plain"
            }
            RunEvent::Rewound { to, .. } => {
                state.steps.retain(|kept| kept.step <= *to);
                state.evaluations.retain(|kept| kept.step <= *to);
                state.rewinds += 1;
                "bad"
            }
            RunEvent::CheckpointSaved { .. } => {
                state.checkpoint_unix_ms = Some(now);
                "good"
            }
            RunEvent::Formed { .. } | RunEvent::Finished { .. } => "good",
            RunEvent::WorkerLost { .. }
            | RunEvent::WorkerRefused { .. }
            | RunEvent::CheckpointFailed { .. }
            | RunEvent::Failed { .. } => "bad",
            RunEvent::WorkerJoined { .. } | RunEvent::Stopping { .. } => "plain",
        };
        state.events.push_front(Entry { unix_ms: now, text: event.to_string(), tone });
        state.events.truncate(EVENTS);
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

    /// At most `limit` steps behind `after`, in order.
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
