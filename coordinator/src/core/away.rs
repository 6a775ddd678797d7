//! Workers that wait for the object store. While it is away (it does not answer this coordinator either, or
//! has failed all members) everybody waits, which is nobody's fault and ends when it is back: deadlines stand
//! still, and nobody is sent away. Who waits while others, or this coordinator, are answered has a fault of
//! its own or is merely slow, and the deadlines of [`super::patience`] hold.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::{Generation, WorkerId};

use super::{Action, Core, Phase};
use crate::records::RunEvent;

/// A worker says about every five seconds that it still waits.
const FRESH: Duration = Duration::from_secs(15);

/// How long the run waits before people are told.
const NOTABLE: Duration = Duration::from_secs(15);

/// How often the store is looked at while somebody waits for it.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The word of a member that waits.
#[derive(Debug)]
pub(super) struct Wait {
    /// When it said so last.
    pub(super) told: Duration,
    /// For what, and what the store says.
    pub(super) detail: String,
    /// The store has failed it; else it takes its time.
    pub(super) failed: bool,
}

/// What is known of waits for the store.
#[derive(Debug, Default)]
pub(super) struct Away {
    /// Members that wait.
    waiting: BTreeMap<WorkerId, Wait>,
    /// Somebody is looking whether the store answers.
    looking: bool,
    /// No earlier than then does somebody look again.
    look_at: Duration,
    /// What the store told this coordinator, when that was an error.
    said: Option<String>,
    /// When deadlines began to stand still, until the store has answered.
    since: Option<Duration>,
    /// They do no longer, and nobody knows yet whether the store has answered.
    lingers: bool,
    /// The store has answered: somebody has what it waited for.
    answered: bool,
    /// People have been told that they do.
    told: bool,
    /// Why the run was where it is before.
    reason: String,
    /// How long deadlines stood still while the step in flight was under way.
    of_step: Duration,
}

impl Away {
    /// A worker did what it was asked to do.
    pub(super) fn is_over_for(&mut self, worker: WorkerId) {
        self.answered |= self.waiting.remove(&worker).is_some();
    }

    /// A worker is gone.
    pub(super) fn forget(&mut self, worker: WorkerId) {
        self.waiting.remove(&worker);
    }

    /// Nobody is asked any more for what was asked before.
    pub(super) fn is_over(&mut self) {
        self.waiting.clear();
    }

    pub(super) fn step_begins(&mut self) {
        self.of_step = Duration::ZERO;
    }

    /// How long the step in flight was held up, which has come to its end.
    pub(super) fn step_ends(&mut self) -> Duration {
        self.answered = true;
        std::mem::take(&mut self.of_step)
    }

    /// What a member waits for that the store has failed.
    pub(super) fn failed(&self, worker: WorkerId) -> Option<&str> {
        self.waiting.get(&worker).filter(|wait| wait.failed).map(|wait| wait.detail.as_str())
    }
}

impl Core {
    pub(super) fn on_waiting(&mut self, worker: WorkerId, generation: Generation, wait: Wait) {
        // It may have been told of a newer generation meanwhile.
        if self.current_rank(worker, generation).is_err() {
            return;
        }
        // At the beginning of a generation only some may need the store, for what the others hold.
        let forming = matches!(self.phase, Phase::Forming(_)) && !self.holds_the_state(worker);
        if forming && wait.failed && self.members.iter().any(|it| self.holds_the_state(*it)) {
            let reason = format!("it waits for {}, which the others do not need", wait.detail);
            return self.expel_and_reform(&[worker], &reason);
        }
        self.away.waiting.insert(worker, wait);
        self.look_at_the_store();
    }

    pub(super) fn on_store_seen(&mut self, seen: Result<(), String>) {
        self.away.looking = false;
        self.away.look_at = self.now + LOOK_EVERY;
        self.away.said = seen.err();
    }

    fn look_at_the_store(&mut self) {
        if !self.away.looking && self.now >= self.away.look_at {
            self.away.looking = true;
            self.out.push(Action::LookAtStore);
        }
    }

    /// Whether deadlines stand still for the time `since` the last look.
    pub(super) fn is_held_up_by_the_store(&mut self, since: Duration) -> bool {
        let now = self.now;
        self.away.waiting.retain(|_, wait| now.saturating_sub(wait.told) < FRESH);
        let somebody = !self.away.waiting.is_empty();
        if somebody {
            self.look_at_the_store();
        } else {
            self.away.said = None;
        }
        let everybody = self.members.iter().all(|member| self.away.failed(*member).is_some());
        let held_up = somebody && (everybody || self.away.said.is_some());
        if held_up {
            self.away.of_step += since;
            let detail = self.what_is_waited_for();
            if self.away.since.is_none() || self.away.lingers {
                self.away.since.get_or_insert(now);
                self.away.reason.clone_from(&self.reason);
            }
            self.explain(format!("waiting for the store: {detail}"));
            let lasts = self.away.since.is_some_and(|then| now.saturating_sub(then) >= NOTABLE);
            if lasts && !std::mem::replace(&mut self.away.told, true) {
                let names = self.roster.names(self.away.waiting.keys().copied());
                self.publish(RunEvent::StoreAway { names, detail });
            }
            (self.away.answered, self.away.lingers) = (false, false);
        } else if let Some(then) = self.away.since {
            if !std::mem::replace(&mut self.away.lingers, true) {
                // Calls that were under way come to their ends by and by.
                self.roster.restart_patience();
                let before = std::mem::take(&mut self.away.reason);
                if self.reason.starts_with("waiting for the store: ") {
                    self.explain(before);
                }
            }
            // Nobody may wait because somebody died, and all begin anew.
            if self.away.answered {
                self.away.since = None;
                let seconds = now.saturating_sub(then).as_secs_f64();
                if std::mem::take(&mut self.away.told) {
                    self.publish(RunEvent::StoreBack { seconds });
                }
            }
        }
        held_up
    }

    /// What one of those that wait waits for, and what the store says.
    fn what_is_waited_for(&self) -> String {
        let mut waits = self.away.waiting.values();
        let wait = waits.clone().find(|wait| wait.failed).or_else(|| waits.next());
        let detail = wait.map_or("", |wait| wait.detail.as_str());
        match &self.away.said {
            Some(said) => format!("{detail} (the coordinator: {said})"),
            None => detail.to_owned(),
        }
    }
}
