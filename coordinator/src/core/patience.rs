//! Answers that do not come. A worker whose heartbeats go on but which is stuck would hold the run
//! for ever, so every answer has a deadline.
//!
//! Who has not answered when others have is sent away. In a step that only holds for a single one:
//! a rank that is stuck keeps others in the all-reduce, and nobody can tell whose fault it is, unless
//! one of them has said that the store fails it ([`super::away`]). Then, and when nobody has answered
//! at all, the generation is formed again, for whoever still can answers that; and everybody gets twice
//! the time, in case it was too short. When nobody answers even that, all are sent away, and the run
//! goes back to its checkpoint.

use std::time::Duration;

use looptrain_proto::{Step, WorkerId};

use super::{Core, Phase};

/// How much longer than the last step a step or an evaluation may take.
const FACTOR: u32 = 10;

/// Any step may take this long.
const STEP: Duration = Duration::from_secs(60);

/// The first step of a generation or a stage may: caches are cold, and shares have changed.
const FIRST_STEP: Duration = Duration::from_secs(600);

/// Any evaluation may take this long.
const EVALUATION: Duration = Duration::from_secs(600);

/// Forming a ring and getting the state may: a checkpoint can be large and its store slow.
const READY: Duration = Duration::from_secs(600);

/// A member that does not answer for this long while a ring forms explains why it breaks.
const MUTE: Duration = Duration::from_secs(60);

/// Times in a row that a generation may be stuck before the run gives up.
const MAX_STALLS: u32 = 3;

impl Core {
    /// Looks after the members whose answers are overdue.
    pub(super) fn on_tick_in_patience(&mut self) {
        let (mut overdue, what) = self.awaited();
        let (awake, patience) = (self.awake, self.patience());
        overdue.retain(|worker| self.roster.wait(*worker, awake) > patience);
        let (late, world, seconds) = (overdue.len(), self.members.len(), patience.as_secs());
        let in_a_step = matches!(self.phase, Phase::Training(_));
        if late == 0 {
            return;
        }
        // The store answers this coordinator, so whoever it fails has kept the others waiting.
        let starved: Vec<WorkerId> =
            overdue.iter().copied().filter(|id| self.away.failed(*id).is_some()).collect();
        let one = starved.first().and_then(|id| self.away.failed(*id));
        if let Some(detail) = one.filter(|_| starved.len() < world) {
            let reason = format!(
                "it has not {what} within {seconds} s: it waits for {detail}, while the store answers the \
                 coordinator"
            );
            return self.expel_and_reform(&starved, &reason);
        }
        if late < world && (late == 1 || !in_a_step) {
            let reason = format!("it has not {what} within {seconds} s");
            return self.expel_and_reform(&overdue, &reason);
        }
        self.stall(&format!("{late} of {world} workers have not {what} within {seconds} s"));
    }

    /// Whether the ring cannot form because a member is stuck; its deadline will come.
    pub(super) fn is_forming_with_a_mute(&mut self) -> bool {
        let awake = self.awake;
        let (awaited, _) = self.awaited();
        matches!(self.phase, Phase::Forming(_))
            && awaited.into_iter().any(|worker| self.roster.wait(worker, awake) > MUTE)
    }

    /// The members that have not answered, and what they have not done.
    fn awaited(&self) -> (Vec<WorkerId>, String) {
        let ranks = |awaits: &dyn Fn(usize, WorkerId) -> bool| {
            let members = self.members.iter().copied().enumerate();
            members.filter(|(rank, id)| awaits(*rank, *id)).map(|(_, id)| id).collect()
        };
        match &self.phase {
            Phase::Forming(forming) => {
                let what = format!("become ready for generation {}", self.generation);
                (ranks(&|_, id| forming.awaits(id)), what)
            }
            Phase::Training(round) => {
                (ranks(&|rank, _| round.awaits(rank)), format!("voted on step {}", round.step))
            }
            Phase::Evaluating(exam) => {
                let what = format!("evaluated step {}", exam.step());
                (ranks(&|rank, _| exam.awaits(rank)), what)
            }
            Phase::Waiting | Phase::Holding | Phase::Ended { .. } => (Vec::new(), String::new()),
        }
    }

    /// How long an answer may take in this phase.
    fn patience(&self) -> Duration {
        let patience = match &self.phase {
            Phase::Training(round) => self.step_patience(round.step),
            Phase::Evaluating(exam) => self.evaluation_patience(exam.step()),
            _ => READY,
        };
        let timeout = Duration::from_secs_f64(self.spec.cluster.worker_timeout);
        patience.max(timeout).saturating_mul(1 << self.stalls)
    }

    fn step_patience(&self, step: Step) -> Duration {
        let Some(last) = &self.last else { return FIRST_STEP };
        let stages = [step, last.step].map(|step| self.spec.stage_of(step));
        if last.generation == self.generation && stages[0] == stages[1] {
            return STEP.max(self.many_steps(1.0));
        }
        let growth = f64::from(last.world) / f64::from(self.world().max(1));
        FIRST_STEP.max(self.many_steps(growth.max(1.0)))
    }

    fn evaluation_patience(&self, step: Step) -> Duration {
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let step_sequences = stage.step_tokens() as f64 / stage.sequence_length as f64;
        EVALUATION.max(self.many_steps(self.spec.evaluation.sequences as f64 / step_sequences))
    }

    /// [`FACTOR`] times the last step's time, times `share`.
    fn many_steps(&self, share: f64) -> Duration {
        let seconds = self.last.as_ref().map_or(0.0, |last| last.seconds * share);
        Duration::try_from_secs_f64(seconds).unwrap_or_default().saturating_mul(FACTOR)
    }

    /// The members are stuck, and it is not known who is at fault.
    fn stall(&mut self, reason: &str) {
        if self.stalls == MAX_STALLS {
            return self.fail(format!(
                "{reason}, nor in {MAX_STALLS} earlier tries; look for a network that loses large \
                 messages, a store that does not answer, or a machine too slow for the spec"
            ));
        }
        self.stalls += 1;
        if matches!(self.phase, Phase::Forming(_)) && self.stalls > 1 {
            for worker in self.members.clone() {
                self.expel(worker, reason);
            }
            return self.after_loss(reason);
        }
        self.reform(reason);
    }
}
