//! A snapshot of the run, for operators.

use looptrain_proto::{Generation, Incarnation, Rank, Step, WorkerId};
use serde::Serialize;

use super::{Core, Phase};
use crate::records::{EvaluationRecord, Section, SectionSeconds, StepRecord};

/// What the run looks like now.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) run: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) generation: Generation,
    pub(crate) step: Step,
    pub(crate) total_steps: Step,
    pub(crate) phase: &'static str,
    pub(crate) reason: String,
    pub(crate) stopping: bool,
    pub(crate) paused: bool,
    pub(crate) workers: Vec<WorkerView>,
    /// The newest committed step's record.
    pub(crate) last: Option<StepRecord>,
    pub(crate) evaluation: Option<EvaluationRecord>,
    pub(crate) checkpoint_step: Option<Step>,
    /// The step of the checkpoint in the making.
    pub(crate) saving_step: Option<Step>,
    /// Tokens of all committed steps.
    pub(crate) tokens: u64,
    pub(crate) tokens_per_second: f64,
    /// Steps that this coordinator planned and could not commit, for their generation ended.
    pub(crate) retried_steps: u64,
    /// Times under this coordinator that workers disagreed.
    pub(crate) divergences: u64,
}

/// One worker.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WorkerView {
    pub(crate) id: WorkerId,
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) process_id: u32,
    pub(crate) threads: u32,
    /// `None` for a worker without a place in the generation.
    pub(crate) rank: Option<Rank>,
    /// Slots of the step in flight.
    pub(crate) slots: u32,
    pub(crate) sections: SectionSeconds,
    pub(crate) slots_per_second: Option<f64>,
    /// The section in which it is slower than the others.
    pub(crate) straggles_in: Option<Section>,
    /// Without a place, but following the members' state.
    pub(crate) warm: bool,
    pub(crate) seconds_since_heard: f64,
}

impl Core {
    /// What the run looks like at `now`.
    pub(crate) fn snapshot(&self, now: std::time::Duration) -> Snapshot {
        let (phase, in_flight) = match &self.phase {
            Phase::Waiting => ("waiting", None),
            Phase::Forming(_) => ("forming", None),
            Phase::Training(round) => ("training", Some(round)),
            Phase::Evaluating(_) => ("evaluating", None),
            Phase::Holding if self.ending() => ("finishing", None),
            Phase::Holding if self.paused.is_some() => ("paused", None),
            Phase::Holding => ("waiting", None),
            Phase::Ended { failed: false } => ("finished", None),
            Phase::Ended { failed: true } => ("failed", None),
        };
        let reason = match &self.phase {
            Phase::Forming(forming) => {
                format!("{}; {} of {} ready", self.reason, forming.ready(), self.members.len())
            }
            _ => self.reason.clone(),
        };
        let warm = self.guests_that_fetched();
        let view = |(id, worker): (WorkerId, &super::membership::Worker)| {
            let rank = self.rank_of(id);
            let slots = rank.zip(in_flight).map_or(0, |(rank, round)| round.slots(rank));
            WorkerView {
                id,
                name: worker.join.name.clone(),
                host: worker.join.host.clone(),
                process_id: worker.join.process_id,
                threads: worker.join.threads,
                rank: rank.map(|rank| Rank(rank as u32)),
                slots,
                sections: worker.sections,
                slots_per_second: worker.history.speed(),
                straggles_in: worker.history.straggles_in(),
                warm: rank.is_none() && warm.contains(&id),
                seconds_since_heard: now.saturating_sub(worker.heard).as_secs_f64(),
            }
        };
        Snapshot {
            run: self.spec.run.name.clone(),
            incarnation: self.incarnation,
            generation: self.generation,
            step: self.committed,
            total_steps: self.total,
            phase,
            reason,
            stopping: self.stop.is_some(),
            paused: self.paused.is_some(),
            workers: self.roster.iter().map(view).collect(),
            last: self.last.clone(),
            evaluation: self.evaluations.last().cloned(),
            checkpoint_step: self.checkpoint.as_ref().map(|mark| mark.step),
            saving_step: self.saving.as_ref().map(|saving| saving.step()),
            tokens: self.spec.tokens_after(self.committed),
            tokens_per_second: self.pace.tokens_per_second(),
            retried_steps: self.retried_steps,
            divergences: self.divergences,
        }
    }
}
