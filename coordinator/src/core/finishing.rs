//! How a run ends: at its last step, on request at a step boundary, or with an error.

use looptrain_proto::Step;
use looptrain_proto::v1::Finish;

use super::{Action, Core, Directive, Phase};
use crate::records::{Outcome, RunEvent};

impl Core {
    pub(super) fn on_stop(&mut self, reason: String) {
        if self.stop.is_some() {
            return;
        }
        self.stop = Some(reason.clone());
        self.publish(RunEvent::Stopping { reason });
        match self.phase {
            Phase::Waiting => self.settle(),
            Phase::Holding => self.proceed(),
            // The step, the formation or the evaluation in flight is brought to its end first.
            _ => {}
        }
    }

    /// Does not commit the step that has been voted on: it is a spike, and the run ends before it.
    pub(super) fn end_before(&mut self, step: Step, why: &str) {
        let last = self.committed;
        self.spike = Some(format!(
            "step {step} is a spike and is not committed: {why}. The run ends at step {last}, with a \
             checkpoint; under this spec it would end there again. Have another run branch off, here \
             or earlier, with another learning rate, past this data (skip_steps) or with \
             optimizer.spikes.action = \"skip\": `looptrain branch --help`"
        ));
        self.away.step_ends();
        self.phase = Phase::Holding;
        self.proceed();
    }

    /// Whether the run is to be stopped at `step`. Not a stop that once asked for stays: should the
    /// state of that step be lost before a checkpoint holds it, the step is done again.
    pub(super) fn is_far_enough(&self, step: Step) -> bool {
        self.until.is_some_and(|until| step >= until)
    }

    /// Ends the run at the committed step, which a checkpoint holds (or which is the initial
    /// state).
    pub(super) fn finish(&mut self) {
        if let Some(reason) = self.spike.take() {
            return self.fail(reason);
        }
        let step = self.committed;
        let stopped = step < self.total;
        let reason = match (&self.stop, stopped) {
            (Some(why), true) => format!("stopped at step {step} of {}: {why}", self.total),
            (None, true) => format!("stopped at step {step} of {}, as planned", self.total),
            _ => format!("all {} steps are done", self.total),
        };
        let outcome = Outcome {
            step,
            tokens: self.spec.tokens_after(step),
            loss: self.last.as_ref().map(|record| record.loss),
            weights_digest: self.known_weights(step),
            stopped,
            evaluation: self.evaluations.last().cloned().filter(|record| record.step == step),
        };
        self.publish(RunEvent::Finished { reason: reason.clone() });
        self.end(reason, Ok(outcome));
    }

    /// Ends the run with an error. What is committed stays; the newest checkpoint is where the
    /// next start goes on.
    pub(super) fn fail(&mut self, reason: String) {
        self.publish(RunEvent::Failed { reason: reason.clone() });
        self.end(reason.clone(), Err(reason));
    }

    fn end(&mut self, reason: String, result: Result<Outcome, String>) {
        for worker in self.roster.ids() {
            self.send(
                worker,
                Directive::Finish(Finish { reason: reason.clone(), expelled: false }),
            );
            self.out.push(Action::Close { worker });
        }
        self.phase = Phase::Ended { failed: result.is_err() };
        self.explain(reason);
        self.out.push(Action::End(result));
    }
}
