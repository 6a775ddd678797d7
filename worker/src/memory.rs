//! What a worker can tell the next coordinator of its time with the last one.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use looptrain_proto::v1::{Held, Prepared, Trend};
use looptrain_proto::{Generation, Rank, Step};

/// Votes that a worker remembers: more than a coordinator that dies may have failed to log.
const REMEMBERED: usize = 1024;

/// The latest generation, and the votes on the latest steps: the worker's own, and those that it was told
/// of by members from which it fetched what they led to.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<Past>>);

#[derive(Debug, Default)]
struct Past {
    generation: Generation,
    rank: Rank,
    world: u32,
    /// In the order of their steps.
    votes: VecDeque<Prepared>,
}

impl Memory {
    fn past(&self) -> MutexGuard<'_, Past> {
        // Every change is one call that cannot panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn remember_generation(&self, generation: Generation, rank: Rank, world: usize) {
        let mut past = self.past();
        (past.generation, past.rank, past.world) = (generation, rank, world as u32);
    }

    /// So many members hold the state that is being fetched.
    pub(crate) fn remember_world(&self, world: usize) {
        self.past().world = world as u32;
    }

    /// The newest generation that this worker was told of, and its rank there.
    pub(crate) fn place(&self) -> (Generation, Rank) {
        let past = self.past();
        (past.generation, past.rank)
    }

    /// Remembers a vote, and no longer those on its step and later ones.
    pub fn remember_vote(&self, vote: Prepared) {
        let votes = &mut self.past().votes;
        // A step that is tried again was not committed before.
        while votes.back().is_some_and(|last| last.step >= vote.step) {
            votes.pop_back();
        }
        votes.push_back(vote);
        if votes.len() > REMEMBERED {
            votes.pop_front();
        }
    }

    /// The votes on those of these steps that are remembered, in order.
    pub fn votes(&self, steps: RangeInclusive<Step>) -> Vec<Prepared> {
        let past = self.past();
        let wanted = past.votes.iter().filter(|vote| steps.contains(&Step(vote.step)));
        wanted.cloned().collect()
    }

    /// The trend with `step` in it, as the vote on that said; nobody's under a spec that does not watch.
    pub(crate) fn trend_after(&self, step: Step) -> Option<Trend> {
        self.votes(step..=step).last()?.statistics.as_ref()?.trend
    }

    /// What a worker brings to another session that holds the state of `step`.
    pub(crate) fn held(&self, step: Step, prepared: Option<Step>, lineage: &[u8]) -> Held {
        let past = self.past();
        Held {
            generation: past.generation.0,
            world: past.world,
            step: step.0,
            prepared: prepared.map(|step| step.0),
            recent: past.votes.iter().cloned().collect(),
            lineage: lineage.to_vec(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn vote(step: u64, generation: u64) -> Prepared {
        Prepared { step, generation, ..Prepared::default() }
    }

    #[test]
    fn the_latest_vote_on_a_step_counts_and_the_oldest_are_forgotten() {
        let memory = Memory::default();
        for step in 1..=5 {
            memory.remember_vote(vote(step, 1));
        }
        memory.remember_vote(vote(4, 2));
        let seen = |steps| -> Vec<(u64, u64)> {
            memory.votes(steps).iter().map(|vote| (vote.step, vote.generation)).collect()
        };
        assert_eq!(seen(Step(3)..=Step(9)), [(3, 1), (4, 2)]);
        assert_eq!(seen(Step(4)..=Step(4)), [(4, 2)]);
        for step in 5..=2000 {
            memory.remember_vote(vote(step, 3));
        }
        let held = memory.held(Step(2000), Some(Step(2001)), b"one");
        assert_eq!((held.step, held.prepared, held.recent.len()), (2000, Some(2001), REMEMBERED));
        assert_eq!(held.recent.last().unwrap().step, 2000);
    }
}
