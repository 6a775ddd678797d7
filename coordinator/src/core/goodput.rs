//! Books the time of every worker in the ledger. Between two changes of what the run is doing all
//! members do the same, so time is booked when that changes; a step's when it is committed, for only
//! then is it known what it was.

use std::time::Duration;

use looptrain_proto::{Generation, Step, WorkerId};

use super::membership::Worker;
use super::step::Vote;
use super::{Core, Phase};
use crate::ledger::{Category, Ledger};

/// The ledger that a coordinator goes on with.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub(crate) ledger: Ledger,
    /// From the beginning of the run to that of this coordinator.
    pub(crate) zero: Duration,
    /// For how long nobody had kept the ledger by then.
    pub(crate) away: Duration,
}

impl Default for Books {
    fn default() -> Self {
        Self { ledger: Ledger::new(0), zero: Duration::ZERO, away: Duration::ZERO }
    }
}

/// What the run is doing, as far as the ledger asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stance {
    #[default]
    Waiting,
    /// For the first time under this coordinator, or again.
    Forming {
        generation: Generation,
        again: bool,
    },
    Step(Generation, Step),
    Evaluating,
    /// At a boundary, for the last checkpoint.
    Ending,
    /// At a boundary, for a checkpoint that lets somebody in.
    Holding,
    Paused,
    Ended,
}

/// The ledger's part of what is known of a worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Account {
    /// Until when its time is booked.
    booked: Duration,
    /// Whether it has had a place since then.
    placed: bool,
    /// It came back from the coordinator before this one, and has had no place under this one.
    returned: bool,
    /// How long it stood still for checkpoints, as far as that is not booked yet.
    stalled: Duration,
}

impl Account {
    /// That of a worker that joins now.
    pub(super) fn of_joiner(now: Duration, returned: bool) -> Self {
        Self { booked: now, placed: false, returned, stalled: Duration::ZERO }
    }
}

impl Core {
    /// The ledger; what is under way is not in it yet.
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.books.ledger
    }

    /// Seconds of all workers that are booked, or will be.
    #[cfg(test)]
    pub(super) fn accounted_for(&self) -> f64 {
        let open = |worker: &Worker| self.now.saturating_sub(worker.account.booked).as_secs_f64();
        let open: f64 = self.roster.iter().map(|(_, worker)| open(worker)).sum();
        self.books.ledger.total() + open
    }

    fn stance_now(&self) -> Stance {
        match &self.phase {
            Phase::Waiting => Stance::Waiting,
            Phase::Forming(_) => {
                Stance::Forming { generation: self.generation, again: self.formed }
            }
            Phase::Training(round) => Stance::Step(self.generation, round.step),
            Phase::Evaluating(_) => Stance::Evaluating,
            Phase::Holding if self.ending() => Stance::Ending,
            Phase::Holding if self.paused.is_some() => Stance::Paused,
            Phase::Holding => Stance::Holding,
            Phase::Ended { .. } => Stance::Ended,
        }
    }

    /// To be called after each event: books the time of all workers if it has changed what the run
    /// is doing.
    pub(super) fn keep_ledger(&mut self) {
        let stance = self.stance_now();
        if stance == self.stance {
            return;
        }
        if let Stance::Step(_, step) = self.stance
            && step > self.committed
            && !matches!(stance, Stance::Ended)
        {
            self.retried_steps += 1;
        }
        self.book_everybody();
        self.stance = stance;
        for worker in self.roster.ids() {
            let placed = self.rank_of(worker).is_some();
            let of_formed = !matches!(stance, Stance::Waiting | Stance::Forming { .. });
            if let Some(worker) = self.roster.get_mut(worker) {
                worker.account.placed = placed;
                worker.account.returned &= !(placed && of_formed);
            }
        }
    }

    /// Books what has passed of a long wait; a step is booked when it ends.
    pub(super) fn book_while_it_lasts(&mut self) {
        if !matches!(self.stance, Stance::Step(..)) {
            self.book_everybody();
        }
    }

    fn book_everybody(&mut self) {
        for worker in self.roster.ids() {
            self.book_worker(worker);
        }
    }

    /// Books the time of a worker up to now, by what the run was doing.
    pub(super) fn book_worker(&mut self, worker: WorkerId) {
        let now = self.now;
        let Some(known) = self.roster.get_mut(worker) else { return };
        let begin = std::mem::replace(&mut known.account.booked, now);
        let Some(category) = category_of(self.stance, known) else { return };
        self.book(category, begin, now);
    }

    /// Since when a worker that brings back its state has been away: since its session was lost, or
    /// since the coordinator before last wrote the ledger. Counted from the beginning of the run.
    pub(super) fn absent_since(&self, name: &str) -> Duration {
        let Books { zero, away, .. } = self.books;
        let gone = self.gone.get(name).map(|gone| zero + *gone);
        gone.unwrap_or_else(|| zero.saturating_sub(away))
    }

    /// A worker has come back with its state: it was there all the time.
    pub(super) fn book_return(&mut self, name: &str) {
        let begin = self.absent_since(name);
        let end = self.books.zero + self.now;
        self.gone.remove(name);
        self.books.ledger.book(Category::Recovering, begin, end);
    }

    /// A member reports how long it stood still to copy its state.
    pub(super) fn note_stall(&mut self, worker: WorkerId, stall: Duration) {
        if let Some(worker) = self.roster.get_mut(worker) {
            worker.account.stalled = worker.account.stalled.saturating_add(stall);
        }
    }

    /// Books the time of the members in a step that is committed now.
    pub(super) fn book_step(&mut self, step: Step, votes: &[Vote]) {
        let useful = match step > self.books.ledger.highest {
            true => Category::Productive,
            false => Category::Recomputed,
        };
        self.books.ledger.highest = self.books.ledger.highest.max(step);
        let now = self.now;
        for (member, vote) in self.members.clone().into_iter().zip(votes) {
            let Some(known) = self.roster.get_mut(member) else { continue };
            let begin = std::mem::replace(&mut known.account.booked, now);
            let span = now.saturating_sub(begin);
            let waited = duration(vote.sections.data_wait).min(span);
            // What does not fit was in a step before, whose time has been booked as useful: the next
            // ones make up for it.
            let stalled = known.account.stalled.min(span - waited);
            known.account.stalled -= stalled;
            let (stall_ends, wait_ends) = (begin + stalled, begin + stalled + waited);
            self.book(Category::CheckpointStall, begin, stall_ends);
            self.book(Category::DataWait, stall_ends, wait_ends);
            self.book(useful, wait_ends, now);
        }
    }

    fn book(&mut self, category: Category, begin: Duration, end: Duration) {
        let Books { ledger, zero, .. } = &mut self.books;
        ledger.book(category, *zero + begin, *zero + end);
    }
}

/// A worker's word for a time; none where that is no number of seconds.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// What the time of a worker was while the run was doing this; `None` when it is over.
fn category_of(stance: Stance, worker: &Worker) -> Option<Category> {
    let Account { placed, returned, .. } = worker.account;
    Some(match stance {
        Stance::Ended => return None,
        Stance::Waiting | Stance::Forming { .. } if returned => Category::Recovering,
        Stance::Waiting => Category::Waiting,
        _ if !placed && worker.follows => Category::Idle,
        _ if !placed => Category::StartUp,
        Stance::Forming { again: false, .. } => Category::StartUp,
        // A step that is committed has been booked before.
        Stance::Forming { .. } | Stance::Step(..) => Category::Recovering,
        Stance::Evaluating => Category::Productive,
        Stance::Ending => Category::CheckpointStall,
        Stance::Holding => Category::Waiting,
        Stance::Paused => Category::Idle,
    })
}
