//! Between two steps: all members hold the committed state, and nothing is in flight but perhaps
//! an upload. Decides, in this order, whether to save, to evaluate, to end, to let the
//! last workers leave, to pause, to let spares in, or to go on with the next step.

use super::{Core, Phase};

impl Core {
    /// Whether this is the run's last boundary.
    pub(super) fn ending(&self) -> bool {
        self.committed >= self.total
            || self.stop.is_some()
            || self.spike.is_some()
            || self.is_far_enough(self.committed)
    }

    /// Takes the run on from a step boundary. To be called after a commit, when a generation has
    /// formed, when an evaluation is complete, and whenever what a holding run waits for may
    /// have come.
    pub(super) fn proceed(&mut self) {
        self.let_go();
        self.start_saving_if_due();
        if self.evaluation_is_due() {
            return self.start_evaluation();
        }
        if self.ending() {
            if self.state_is_in_reach() {
                return self.finish();
            }
            self.phase = Phase::Holding;
            let step = self.committed;
            return self.explain(format!("waiting for the checkpoint of step {step} to end"));
        }
        if self.all_leave() && (self.paused.is_some() || !self.is_taken_over()) {
            return self.part();
        }
        if let Some(reason) = &self.paused {
            let text = format!("paused at step {}: {reason}", self.committed);
            self.phase = Phase::Holding;
            self.explain(text);
            return self.let_spares_fetch();
        }
        if !self.let_spares_in() {
            self.plan();
        }
    }
}
