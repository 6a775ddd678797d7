//! What the dashboard shows beside the core's snapshot: history, the older part of it thinned out,
//! so that a long run does not fill the memory. Written by the runtime, read by HTTP handlers and by
//! whoever looks at the metrics; a lock is held for a copy at most.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use looptrain_proto::{Generation, Step};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::core::Snapshot;
use crate::history::{History, Steps, thin_evaluations};
use crate::ledger::{GoodputView, Ledger};
use crate::records::{EvaluationRecord, RunEvent, StepRecord};

/// Events that are kept for the page.
const EVENTS: usize = 200;

/// Generations that are kept for the page.
const GENERATIONS: usize = 200;

/// Losses that a reader of few gets.
const LOSSES: usize = 120;

/// How an event is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tone {
    Good,
    Bad,
    Plain,
}

impl Tone {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Bad => "bad",
            Self::Plain => "plain",
        }
    }
}

/// An event as the page shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) unix_ms: u64,
    /// In snake case.
    pub(crate) kind: String,
    pub(crate) text: String,
    pub(crate) tone: Tone,
}

/// A generation that formed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Formed {
    pub(crate) unix_ms: u64,
    pub(crate) generation: Generation,
    pub(crate) world: u32,
    /// The committed step it began from.
    pub(crate) step: Step,
    pub(crate) reason: String,
}

/// What is known of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CheckpointState {
    /// All of it is in the store.
    Written,
    /// It was read back, and is what was written.
    Verified,
    /// It was read back, and is not.
    Damaged,
}

/// A checkpoint in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointEntry {
    pub(crate) unix_ms: u64,
    pub(crate) step: Step,
    /// 0 when it is not known.
    pub(crate) bytes: u64,
    pub(crate) state: CheckpointState,
}

/// What of the board outlives its coordinator, beside steps and evaluations.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Chronicle {
    /// When this was written.
    pub(crate) kept_unix_ms: u64,
    pub(crate) ledger: Option<Ledger>,
    /// Newest first.
    pub(crate) events: VecDeque<Entry>,
    /// Oldest first.
    pub(crate) generations: VecDeque<Formed>,
    /// Ascending.
    pub(crate) checkpoints: Vec<CheckpointEntry>,
}

impl Chronicle {
    /// The newest checkpoint that is not known to be damaged.
    fn newest(&self) -> Option<&CheckpointEntry> {
        let good = |entry: &&CheckpointEntry| entry.state != CheckpointState::Damaged;
        self.checkpoints.iter().rfind(good)
    }

    /// What another coordinator wrote; what this release cannot read of it is left out.
    pub(crate) fn from_json(json: &Value, now_unix_ms: u64) -> Self {
        fn all<T: DeserializeOwned>(json: &Value) -> impl Iterator<Item = T> {
            let items = json.as_array().into_iter().flatten();
            items.filter_map(|item| T::deserialize(item).ok())
        }
        Self {
            kept_unix_ms: json["kept_unix_ms"].as_u64().unwrap_or(now_unix_ms).min(now_unix_ms),
            ledger: Ledger::from_json(&json["ledger"], now_unix_ms),
            events: all(&json["events"]).take(EVENTS).collect(),
            generations: all(&json["generations"]).take(GENERATIONS).collect(),
            checkpoints: all(&json["checkpoints"]).collect(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    steps: Steps,
    evaluations: Vec<EvaluationRecord>,
    chronicle: Chronicle,
    rewinds: u64,
    glance: Option<Arc<Snapshot>>,
    committed: Option<Instant>,
}

impl State {
    fn note(&mut self, entry: Entry) {
        let events = &mut self.chronicle.events;
        // A long wait must not push everything else off the page.
        events.pop_front_if(|newest| newest.text == entry.text);
        events.push_front(entry);
        events.truncate(EVENTS);
    }

    fn form(&mut self, formed: Formed) {
        let generations = &mut self.chronicle.generations;
        generations.push_back(formed);
        if generations.len() > GENERATIONS {
            generations.pop_front();
        }
    }

    fn save(&mut self, entry: CheckpointEntry) {
        let checkpoints = &mut self.chronicle.checkpoints;
        checkpoints.retain(|kept| kept.step != entry.step);
        checkpoints.push(entry);
        checkpoints.sort_by_key(|kept| kept.step);
    }
}

/// Shared between the runtime, the tasks beside it, and the dashboard.
#[derive(Debug)]
pub(crate) struct Board {
    state: Mutex<State>,
    started: Instant,
    /// Counts what has changed, for those who follow.
    changes: watch::Sender<u64>,
}

impl Default for Board {
    fn default() -> Self {
        Self::new(History::default(), Chronicle::default())
    }
}

/// The board's part of `/api/status`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Recent {
    pub(crate) evaluations: Vec<EvaluationRecord>,
    /// Newest first.
    pub(crate) events: Vec<Entry>,
    /// Oldest first.
    pub(crate) generations: Vec<Formed>,
    /// Ascending.
    pub(crate) checkpoints: Vec<CheckpointEntry>,
    pub(crate) goodput: Option<GoodputView>,
    /// Grows when steps are undone, so that readers of `/api/steps` start over.
    pub(crate) rewinds: u64,
    pub(crate) checkpoint_unix_ms: Option<u64>,
    pub(crate) now_unix_ms: u64,
}

impl Board {
    pub(crate) fn new(history: History, chronicle: Chronicle) -> Self {
        let History { steps, evaluations } = history;
        let mut state = State { evaluations, chronicle, ..State::default() };
        state.steps.extend(steps);
        let changes = watch::Sender::new(0);
        Self { state: Mutex::new(state), started: Instant::now(), changes }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; should it ever, the history is still worth showing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Wakes who follows, when something has changed.
    pub(crate) fn follow(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(crate) fn record(&self, event: &RunEvent) {
        let mut state = self.state();
        let now = unix_ms();
        let tone = match event {
            RunEvent::Committed(record) => {
                state.steps.push((**record).clone());
                state.committed = Some(Instant::now());
                if record.skipped.is_none() {
                    drop(state);
                    return self.changed();
                }
                Tone::Bad
            }
            RunEvent::Evaluated(record) => {
                state.evaluations.retain(|kept| kept.step < record.step);
                state.evaluations.push(record.clone());
                thin_evaluations(&mut state.evaluations);
                Tone::Plain
            }
            RunEvent::CheckpointSaved { step, bytes, .. } => {
                let written = CheckpointState::Written;
                let (step, bytes) = (*step, *bytes);
                state.save(CheckpointEntry { unix_ms: now, step, bytes, state: written });
                Tone::Good
            }
            RunEvent::Formed { generation, world, step, reason } => {
                let (generation, world, step) = (*generation, *world, *step);
                let reason = reason.clone();
                state.form(Formed { unix_ms: now, generation, world, step, reason });
                Tone::Good
            }
            RunEvent::CaughtUp { .. }
            | RunEvent::GateRecovered { .. }
            | RunEvent::LoopLossFalls { .. }
            | RunEvent::StoreBack { .. }
            | RunEvent::Finished { .. } => Tone::Good,
            RunEvent::WorkerLost { .. }
            | RunEvent::WorkerRefused { .. }
            | RunEvent::Rewound { .. }
            | RunEvent::CheckpointDelayed { .. }
            | RunEvent::CheckpointFailed { .. }
            | RunEvent::Straggles { .. }
            | RunEvent::GateCollapsed { .. }
            | RunEvent::LoopLossRises { .. }
            | RunEvent::StoreAway { .. }
            | RunEvent::Failed { .. } => Tone::Bad,
            RunEvent::WorkerJoined { .. }
            | RunEvent::Waiting { .. }
            | RunEvent::Draining { .. }
            | RunEvent::Pausing { .. }
            | RunEvent::Resumed
            | RunEvent::Stopping { .. } => Tone::Plain,
        };
        let (kind, text) = (event.kind(), event.to_string());
        state.note(Entry { unix_ms: now, kind, text, tone });
        drop(state);
        self.changed();
    }

    /// Notes what is no event of the run.
    pub(crate) fn note(&self, kind: &str, text: String, tone: Tone) {
        self.state().note(Entry { unix_ms: unix_ms(), kind: kind.to_owned(), text, tone });
        self.changed();
    }

    /// The history ends after step `from`; these steps of it were missing.
    pub(crate) fn go_on(&self, from: Step, lost: &[StepRecord]) {
        let mut state = self.state();
        let undone = state.steps.undo(from);
        state.evaluations.retain(|kept| kept.step <= from);
        state.rewinds += u64::from(undone > 0);
        state.steps.extend(lost.iter().cloned());
        drop(state);
        self.changed();
    }

    /// These are the run's checkpoints, of which `verified` has been read back and the `damaged` ones
    /// are not what was written.
    pub(crate) fn checkpoints_are(
        &self,
        there: &[Step],
        verified: Option<Step>,
        damaged: impl IntoIterator<Item = Step>,
    ) {
        let mut state = self.state();
        let now = unix_ms();
        let kept = std::mem::take(&mut state.chronicle.checkpoints);
        let known = |step: Step| kept.iter().find(|entry| entry.step == step).cloned();
        let new = |step| CheckpointEntry {
            unix_ms: now,
            step,
            bytes: 0,
            state: CheckpointState::Written,
        };
        let damaged: Vec<Step> = damaged.into_iter().collect();
        // One that was saved while they were listed may not be among them.
        let newest = there.last().copied().unwrap_or_default();
        let later: Vec<_> = kept.iter().filter(|entry| entry.step > newest).cloned().collect();
        let entries = there.iter().map(|&step| {
            let mut entry = known(step).unwrap_or_else(|| new(step));
            if verified == Some(step) {
                entry.state = CheckpointState::Verified;
            }
            if damaged.contains(&step) {
                entry.state = CheckpointState::Damaged;
            }
            entry
        });
        state.chronicle.checkpoints = entries.chain(later).collect();
        drop(state);
        self.changed();
    }

    /// How things are, for those who cannot wait for the runtime's answer.
    pub(crate) fn see(&self, snapshot: Snapshot, ledger: Ledger) {
        let mut state = self.state();
        state.glance = Some(Arc::new(snapshot));
        state.chronicle.ledger = Some(ledger);
    }

    /// How things were a moment ago.
    pub(crate) fn glance(&self) -> Option<Arc<Snapshot>> {
        self.state().glance.clone()
    }

    /// Reads the ledger.
    pub(crate) fn of_ledger<T>(&self, read: impl FnOnce(&Ledger) -> T) -> Option<T> {
        self.state().chronicle.ledger.as_ref().map(read)
    }

    /// Time since the newest commit, or since the start.
    pub(crate) fn commit_age(&self) -> Duration {
        self.state().committed.unwrap_or(self.started).elapsed()
    }

    /// Time since the newest checkpoint was written, or since the start.
    pub(crate) fn checkpoint_age(&self) -> Duration {
        let newest = self.state().chronicle.newest().map(|entry| entry.unix_ms);
        let age = |written| Duration::from_millis(unix_ms().saturating_sub(written));
        newest.map_or_else(|| self.started.elapsed(), age)
    }

    /// Size of the newest checkpoint, when that is known.
    pub(crate) fn checkpoint_size(&self) -> Option<u64> {
        self.state().chronicle.newest().map(|entry| entry.bytes).filter(|bytes| *bytes > 0)
    }

    /// What is to outlive this coordinator.
    pub(crate) fn chronicle(&self) -> Chronicle {
        Chronicle { kept_unix_ms: unix_ms(), ..self.state().chronicle.clone() }
    }

    pub(crate) fn recent(&self) -> Recent {
        let state = self.state();
        let chronicle = &state.chronicle;
        Recent {
            evaluations: state.evaluations.clone(),
            events: chronicle.events.iter().cloned().collect(),
            generations: chronicle.generations.iter().cloned().collect(),
            checkpoints: chronicle.checkpoints.clone(),
            goodput: chronicle.ledger.as_ref().map(Ledger::view),
            rewinds: state.rewinds,
            checkpoint_unix_ms: chronicle.newest().map(|entry| entry.unix_ms),
            now_unix_ms: unix_ms(),
        }
    }

    /// The newest events, newest first.
    pub(crate) fn events(&self, limit: usize) -> Vec<Entry> {
        self.state().chronicle.events.iter().take(limit).cloned().collect()
    }

    /// Losses of the latest steps, as far as they are known, in order.
    pub(crate) fn losses(&self) -> Vec<f64> {
        let state = self.state();
        let steps = state.steps.all();
        steps[steps.len().saturating_sub(LOSSES)..].iter().map(|record| record.loss).collect()
    }

    /// Grows when steps are undone.
    pub(crate) fn rewinds(&self) -> u64 {
        self.state().rewinds
    }

    /// At most `limit` of the steps that are kept behind `after`, in order.
    pub(crate) fn steps(&self, after: Step, limit: usize) -> Vec<StepRecord> {
        let state = self.state();
        let steps = state.steps.all();
        let from = steps.partition_point(|record| record.step <= after);
        steps[from..].iter().take(limit).cloned().collect()
    }

    /// The newest step that is kept.
    pub(crate) fn newest_step(&self) -> Step {
        self.state().steps.all().last().map(|record| record.step).unwrap_or_default()
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::STEPS;
    use crate::records::example;

    fn steps(board: &Board) -> Vec<u64> {
        board.steps(Step(0), usize::MAX).iter().map(|record| record.step.0).collect()
    }

    #[test]
    fn old_steps_thin_out_and_the_newest_stay() {
        let mut history = History::default();
        history.steps.extend((1..=30_000).map(|step| example(step, 1.0)));
        let board = Board::new(history, Chronicle::default());
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
    fn a_log_with_one_step_many_times_over_is_thinned_out_and_no_endless_work() {
        for step in [0, 1 << 40] {
            let mut history = History::default();
            history.steps.extend((0..3 * STEPS).map(|_| example(step, 1.0)));
            let board = Board::new(history, Chronicle::default());
            let kept = board.state().steps.all().len();
            assert!((1..=STEPS).contains(&kept), "{kept} are kept");
        }
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

    #[test]
    fn checkpoints_are_those_of_the_store_in_the_state_they_were_found() {
        let board = Board::default();
        for step in [10, 20, 30] {
            let (seconds, bytes, stall) = (0.1, step, 0.0);
            board.record(&RunEvent::CheckpointSaved { step: Step(step), seconds, bytes, stall });
        }
        // 10 is pruned; 5 was there before anybody kept a list.
        board.checkpoints_are(&[Step(5), Step(20), Step(30)], Some(Step(20)), [Step(30)]);
        let shown = board.recent().checkpoints;
        let shown: Vec<_> = shown.iter().map(|it| (it.step.0, it.bytes, it.state)).collect();
        use CheckpointState::{Damaged, Verified, Written};
        assert_eq!(shown, [(5, 0, Written), (20, 20, Verified), (30, 30, Damaged)]);
    }

    #[test]
    fn a_chronicle_is_the_same_after_it_was_written_and_read() {
        let board = Board::default();
        board.note("coordinator_started", "begun".into(), Tone::Plain);
        let (generation, world, step) = (Generation(1), 2, Step(0));
        board.record(&RunEvent::Formed { generation, world, step, reason: "first".into() });
        let mut json = serde_json::to_value(board.chronicle()).unwrap_or_default();
        // Of a release that knows more.
        json["events"][0]["more"] = 1.into();
        if let Some(events) = json["events"].as_array_mut() {
            events
                .push(serde_json::json!({ "unix_ms": 1, "kind": "k", "text": "t", "tone": "new" }));
        }
        let read = Chronicle::from_json(&json, u64::MAX);
        let again = Board::new(History::default(), read);
        assert_eq!(again.recent().events, board.recent().events);
        assert_eq!(again.recent().events[0].kind, "formed");
        assert_eq!(again.recent().generations, board.recent().generations);
    }
}
