//! What a worker can tell the next coordinator of its time with the last one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use looptrain_proto::v1::{Held, Prepared};
use looptrain_proto::{Generation, Rank};

use super::duties::Duties;
use crate::WorkerError;

/// Votes that a worker remembers: more than a coordinator that dies may have failed to log.
const REMEMBERED: usize = 1024;

/// The latest generation, and the votes on the latest steps.
#[derive(Debug, Default)]
pub struct Memory(Mutex<Past>);

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

    pub(super) fn remember_generation(&self, generation: Generation, rank: Rank, world: usize) {
        let mut past = self.past();
        (past.generation, past.rank, past.world) = (generation, rank, world as u32);
    }

    /// So many members hold the state that is being fetched.
    pub(super) fn remember_world(&self, world: usize) {
        self.past().world = world as u32;
    }

    /// The newest generation that this worker was told of, and its rank there.
    pub(super) fn place(&self) -> (Generation, Rank) {
        let past = self.past();
        (past.generation, past.rank)
    }

    pub(super) fn remember_vote(&self, vote: &Prepared) {
        let votes = &mut self.past().votes;
        // A step that is tried again was not committed before.
        while votes.back().is_some_and(|last| last.step >= vote.step) {
            votes.pop_back();
        }
        votes.push_back(vote.clone());
        if votes.len() > REMEMBERED {
            votes.pop_front();
        }
    }
}

/// What a worker brings to another session; `None` when it holds no state yet.
pub(crate) async fn brought(work: &impl Duties) -> Result<Option<Held>, WorkerError> {
    let holding = work.holding().await?;
    let past = work.memory().past();
    Ok(holding.held.map(|step| Held {
        generation: past.generation.0,
        world: past.world,
        step: step.0,
        prepared: holding.prepared.map(|step| step.0),
        recent: past.votes.iter().cloned().collect(),
        lineage: work.lineage().to_vec(),
    }))
}
