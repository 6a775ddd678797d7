//! Where a run without members goes on: from what the workers that come back hold, or else from
//! its checkpoint.
//!
//! Workers outlive their coordinator, and keep the state of the last step they committed and the
//! update they prepared. A step is taken for committed when some worker holds it, when the log has
//! it, or when this coordinator committed it itself; workers that only prepared it commit it as
//! they form. If nobody is left that can get there, the step is done again: with
//! exact sums it comes out the same.

use std::collections::BTreeMap;

use looptrain_proto::v1::{self, Held, Prepared};
use looptrain_proto::{Digest, Generation, Step, WorkerId};

use super::step::Vote;
use super::{Action, Core};
use crate::records::{RunEvent, StepRecord};

/// No run forms so many, and there is always a next one.
pub(crate) const HIGHEST_GENERATION: u64 = 1 << 62;

impl Core {
    /// Decides which step the next generation starts from, and who can be in it.
    pub(super) fn go_back_or_on(&mut self) -> Vec<WorkerId> {
        let best = self.best_step_at_hand();
        if best != self.committed || !self.formed {
            self.go_on_from(best);
        }
        let able = |worker: &WorkerId| {
            self.state_is_in_reach() || self.held(*worker).is_some_and(|held| reaches(held, best))
        };
        let mut able: Vec<WorkerId> = self.roster.ids().into_iter().filter(able).collect();
        // Of more workers than may take part, those that need no help do.
        able.sort_by_key(|worker| !self.held(*worker).is_some_and(|held| reaches(held, best)));
        able.truncate(self.room_beside(0));
        able.sort_unstable();
        able
    }

    /// The newest step whose state somebody has.
    pub(super) fn best_step_at_hand(&self) -> Step {
        let newest = self.all_held().map(|held| held.step).max().unwrap_or_default();
        let decided = newest.max(self.committed.0).max(self.logged.0);
        let prepared = self.all_held().filter_map(|held| held.prepared);
        let prepared = prepared.filter(|step| *step <= decided);
        let saved = self.checkpoint.as_ref().map_or(0, |mark| mark.step.0);
        Step(newest.max(prepared.max().unwrap_or_default()).max(saved))
    }

    /// What a worker brought, unless it has been told to change it since.
    pub(super) fn held(&self, worker: WorkerId) -> Option<&Held> {
        self.roster.get(worker)?.join.held.as_ref()
    }

    fn all_held(&self) -> impl Iterator<Item = &Held> {
        self.roster.iter().filter_map(|(_, worker)| worker.join.held.as_ref())
    }

    /// The world that the workers which hold something come from; 0 when nobody does.
    pub(super) fn world_at_hand(&self) -> usize {
        self.all_held().map(|held| held.world as usize).max().unwrap_or_default()
    }

    /// How many workers come to hold the newest step at hand without help.
    pub(super) fn holders_at_hand(&self) -> usize {
        let best = self.best_step_at_hand();
        self.all_held().filter(|held| reaches(held, best)).count()
    }

    /// Makes `to` the committed step, and has the log end there.
    fn go_on_from(&mut self, to: Step) {
        let before = self.committed;
        self.stand_at(to);
        let newest = before.max(self.logged);
        if to < newest {
            // A spike comes again, and is judged again.
            self.spike = None;
            let reason = format!("no worker is left that holds step {newest}; it is done again");
            self.publish(RunEvent::Rewound { to, reason });
        }
        let unlogged = self.votes_at_hand().into_values().filter(|record| record.step <= to);
        let lost = unlogged.filter(|record| record.step > self.logged).collect();
        self.out.push(Action::GoOn { from: to, lost });
        self.logged = to;
    }

    /// Makes `to` the committed step.
    pub(super) fn stand_at(&mut self, to: Step) {
        let mark = self.checkpoint.clone().filter(|mark| mark.step == to);
        let votes = self.votes_at_hand();
        let logged = self.tail.iter().rfind(|record| record.step == to).cloned();
        let voted = || votes.get(&to).cloned();
        self.last.take_if(|last| last.step != to);
        self.last = (self.last.take().or(logged).or_else(voted))
            .or_else(|| mark.as_ref().and_then(|mark| mark.record.clone()));
        self.weights = mark.map(|mark| (mark.step, mark.weights_digest));
        self.evaluations.retain(|evaluation| evaluation.step <= to);
        self.committed = to;
        // What the coordinator before committed after it last wrote the ledger.
        self.books.ledger.highest = self.books.ledger.highest.max(to);
    }

    /// Records of the latest steps, from the votes that workers remember, also one that left no more
    /// than a checkpoint.
    fn votes_at_hand(&self) -> BTreeMap<Step, StepRecord> {
        (self.all_held().chain(&self.bequest))
            .flat_map(|held| held.recent.iter().filter_map(|vote| self.record_of(vote, held.world)))
            .map(|record| (record.step, record))
            .collect()
    }

    /// A step's record, from the vote of a rank: all it lacks is the other ranks' times.
    fn record_of(&self, vote: &Prepared, world: u32) -> Option<StepRecord> {
        let digest = Digest::from_bytes(&vote.digest).ok()?;
        let (statistics, sections) = (vote.statistics.clone()?, vote.sections.unwrap_or_default());
        let (computed_slots, detail) = (vote.computed_slots, vote.detail.clone());
        let vote_of_rank =
            Vote { digest, statistics, sections: sections.into(), computed_slots, detail };
        let record = StepRecord {
            generation: Generation(vote.generation),
            world,
            seconds: sections.data_wait + sections.compute + sections.reduce,
            ..self.record(Step(vote.step), digest, &[vote_of_rank])
        };
        Some(StepRecord { mfu: self.mfu(&record), ..record })
    }

    /// What a worker brought is of no meaning any more once it is told to change it.
    pub(super) fn forget_held(&mut self, worker: WorkerId) {
        if let Some(worker) = self.roster.get_mut(worker) {
            worker.join.held = None;
            worker.follows = false;
        }
    }

    /// Why a worker that brings a state from elsewhere, or one that cannot be, cannot take part: the
    /// run would go on from there.
    pub(super) fn held_is_ours(&self, join: &v1::Join) -> Result<(), String> {
        let Some(held) = &join.held else { return Ok(()) };
        let (name, total) = (&join.name, self.total.0);
        if held.lineage != self.lineage {
            return Err(format!(
                "worker {name} holds the state of another run, or of this one before it was begun \
                 anew; start it anew"
            ));
        }
        let newest = held.prepared.unwrap_or_default().max(held.step);
        if newest > total {
            return Err(format!(
                "worker {name} says it holds step {newest}, and the run has {total}; start it anew"
            ));
        }
        if held.generation > HIGHEST_GENERATION {
            let generation = held.generation;
            return Err(format!(
                "worker {name} says it was in generation {generation}, which no run comes to; \
                 start it anew"
            ));
        }
        Ok(())
    }
}

/// Whether a worker that holds this comes to hold `step` without help.
fn reaches(held: &Held, step: Step) -> bool {
    held.step == step.0 || held.prepared == Some(step.0)
}
