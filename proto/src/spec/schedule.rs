//! Pure functions of a spec and a step: stage, cursor and learning rate.

use super::{LearningRate, Spec, Stage};
use crate::{Cursor, Step};

/// Where a step stands in its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagePosition {
    /// Index of the stage in the spec.
    pub stage: usize,
    /// Updates of this stage before this step, from 0.
    pub step_in_stage: u64,
    /// The stage's first sequence that this step consumes.
    pub first_sequence: u64,
}

impl Stage {
    /// Sequences per step.
    #[must_use]
    pub fn step_sequences(&self) -> u64 {
        u64::from(self.slots) * self.slot_sequences as u64
    }

    /// Tokens per step.
    #[must_use]
    pub fn step_tokens(&self) -> u64 {
        self.step_sequences() * self.sequence_length as u64
    }
}

impl LearningRate {
    /// The rate of update `step_in_stage` (from 0) of a stage of `steps` updates.
    #[must_use]
    pub fn at(&self, step_in_stage: u64, steps: u64) -> f64 {
        if step_in_stage < self.warmup_steps {
            return self.peak * (step_in_stage + 1) as f64 / self.warmup_steps as f64;
        }
        let left = steps.saturating_sub(step_in_stage + 1);
        if left < self.decay_steps {
            let share = left as f64 / self.decay_steps as f64;
            return self.last + (self.peak - self.last) * share;
        }
        self.peak
    }
}

impl Spec {
    /// Updates in all stages together.
    #[must_use]
    pub fn total_steps(&self) -> Step {
        Step(self.stages.iter().map(|stage| stage.steps).sum())
    }

    /// The stage of `step` and the place in it; `None` for step 0 and past the last step.
    #[must_use]
    pub fn position(&self, step: Step) -> Option<StagePosition> {
        let mut before = step.0.checked_sub(1)?;
        for (index, stage) in self.stages.iter().enumerate() {
            if before < stage.steps {
                return Some(StagePosition {
                    stage: index,
                    step_in_stage: before,
                    first_sequence: before * stage.step_sequences(),
                });
            }
            before -= stage.steps;
        }
        None
    }

    /// The stage whose settings evaluate the weights of committed `step`: the stage of that step,
    /// or the first one for the initial weights.
    #[must_use]
    pub fn stage_of(&self, step: Step) -> usize {
        self.position(step).map_or(0, |position| position.stage)
    }

    /// The data position after `step` is committed.
    #[must_use]
    pub fn cursor_after(&self, step: Step) -> Cursor {
        match self.position(step) {
            None => Cursor::default(),
            Some(at) => Cursor {
                stage: at.stage,
                sequences: at.first_sequence + self.stages[at.stage].step_sequences(),
            },
        }
    }

    /// The learning rate of `step`; 0 outside the run.
    #[must_use]
    pub fn learning_rate(&self, step: Step) -> f64 {
        self.position(step).map_or(0.0, |at| {
            let stage = &self.stages[at.stage];
            stage.learning_rate.at(at.step_in_stage, stage.steps)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_holds_and_decays_to_its_last_value() {
        let rate = LearningRate { peak: 1.0, warmup_steps: 4, decay_steps: 5, last: 0.1 };
        let rates: Vec<f64> = (0..15).map(|step| rate.at(step, 15)).collect();
        assert_eq!(&rates[..5], &[0.25, 0.5, 0.75, 1.0, 1.0]);
        assert_eq!(rates[9], 1.0);
        assert!(rates[9..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[14] - 0.1).abs() < 1e-12);
    }

    #[test]
    fn without_decay_the_rate_stays_at_its_peak() {
        let rate = LearningRate { peak: 2.0, warmup_steps: 0, decay_steps: 0, last: 0.0 };
        assert!((0..9).all(|step| rate.at(step, 9) == 2.0));
    }
}
