//! Pure functions of a spec and a step: stage, cursor and learning rate.

use super::{Decay, LearningRate, Spec, Stage};
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
    /// Slots of this step.
    pub slots: u32,
}

impl Stage {
    /// Sequences per step, once the ramp is over.
    #[must_use]
    pub fn step_sequences(&self) -> u64 {
        u64::from(self.slots) * self.slot_sequences as u64
    }

    /// Tokens per step, once the ramp is over.
    #[must_use]
    pub fn step_tokens(&self) -> u64 {
        self.step_sequences() * self.sequence_length as u64
    }

    /// Slots of the update `step_in_stage` (from 0).
    #[must_use]
    pub fn slots_at(&self, step_in_stage: u64) -> u32 {
        match &self.ramp {
            Some(ramp) if step_in_stage < ramp.steps => {
                let more = u64::from(self.slots - ramp.slots) * step_in_stage / ramp.steps;
                ramp.slots + more as u32
            }
            _ => self.slots,
        }
    }

    /// Tokens of the first `steps` updates.
    #[must_use]
    pub fn tokens_in(&self, steps: u64) -> u64 {
        self.sequences_of(steps) * self.sequence_length as u64
    }

    /// Sequences of the first `steps` updates.
    #[must_use]
    pub fn sequences_of(&self, steps: u64) -> u64 {
        let slots = match &self.ramp {
            None => u64::from(self.slots) * steps,
            Some(ramp) => {
                let ramped = steps.min(ramp.steps);
                let more = floor_sum(ramped, ramp.steps, u64::from(self.slots - ramp.slots));
                let full = u64::from(self.slots) * (steps - ramped);
                u64::from(ramp.slots) * ramped + more + full
            }
        };
        slots * self.slot_sequences as u64
    }

    /// The fewest updates that consume `tokens` tokens.
    #[must_use]
    pub(super) fn steps_for(&self, tokens: u64) -> u64 {
        let ramp = self.ramp.as_ref().map_or(0, |ramp| ramp.steps);
        let within = self.tokens_in(ramp);
        if tokens > within {
            return ramp + (tokens - within).div_ceil(self.step_tokens());
        }
        // How many are consumed grows with the updates.
        let (mut low, mut high) = (0, ramp);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.tokens_in(middle) < tokens {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// `(1 - cos(pi share)) / 2` for a share from 0 to 1, by the Taylor series of the sine around its
/// middle: the same bits on every machine, which a system's own cosine need not have.
fn half_cosine(share: f64) -> f64 {
    // Rounding would leave a trace of it.
    if share == 0.0 {
        return 0.0;
    }
    let t = std::f64::consts::PI * (share - 0.5);
    let (mut term, mut sine) = (t, t);
    for k in 1..=11 {
        term *= -t * t / f64::from(2 * k * (2 * k + 1));
        sine += term;
    }
    (1.0 + sine) / 2.0
}

/// The sum of `floor(slope * i / divisor)` for `i` from 0 to below `count`, in as many rounds as
/// Euclid's algorithm takes.
fn floor_sum(count: u64, divisor: u64, slope: u64) -> u64 {
    let (mut n, mut m, mut a, mut b) =
        (u128::from(count), u128::from(divisor), u128::from(slope), 0u128);
    let mut sum = 0u128;
    while n > 0 {
        sum += n * (n - 1) / 2 * (a / m) + n * (b / m);
        (a, b) = (a % m, b % m);
        let last = a * n + b;
        if last < m {
            break;
        }
        (n, b) = (last / m, last % m);
        (m, a) = (a, m);
    }
    u64::try_from(sum).unwrap_or(u64::MAX)
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
            let share = match self.decay {
                Decay::Linear => share,
                Decay::Cosine => half_cosine(share),
            };
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
                    first_sequence: stage
                        .sequences_of(before)
                        .saturating_add_signed(self.moved_by_branch(step)),
                    slots: stage.slots_at(before),
                });
            }
            before -= stage.steps;
        }
        None
    }

    /// How far a branch has the steps after it stand beyond what the steps of the stage make up to: what its
    /// run had read by then differs, or some is passed over. Steps up to the branch, and other stages than
    /// that of the first step after it, stand where they do.
    fn moved_by_branch(&self, step: Step) -> i64 {
        let Some(branch) = self.branch.as_ref().filter(|branch| step.0 > branch.step) else {
            return 0;
        };
        let mut begin = 0;
        for stage in &self.stages {
            let end = begin + stage.steps;
            if branch.step < end {
                if step.0 > end {
                    return 0;
                }
                let before = branch.step - begin;
                let here = stage.sequences_of(before);
                let passed = stage.sequences_of(before + branch.skip_steps) - here;
                let had = branch.sequences.filter(|_| before > 0).unwrap_or(here);
                return had as i64 - here as i64 + passed as i64;
            }
            begin = end;
        }
        0
    }

    /// The stage whose settings evaluate the weights of committed `step`: the stage of that step,
    /// or the first one for the initial weights.
    #[must_use]
    pub fn stage_of(&self, step: Step) -> usize {
        self.position(step).map_or(0, |position| position.stage)
    }

    /// Slots of `step`; 0 outside the run.
    #[must_use]
    pub fn slots_of(&self, step: Step) -> u32 {
        self.position(step).map_or(0, |at| at.slots)
    }

    /// Tokens of `step`; 0 outside the run.
    #[must_use]
    pub fn tokens_of(&self, step: Step) -> u64 {
        self.position(step).map_or(0, |at| {
            let stage = &self.stages[at.stage];
            u64::from(at.slots) * (stage.slot_sequences * stage.sequence_length) as u64
        })
    }

    /// Tokens that steps up to and including `step` consume.
    #[must_use]
    pub fn tokens_after(&self, step: Step) -> u64 {
        let mut left = step.0;
        let of_stage = |stage: &Stage| {
            let steps = left.min(stage.steps);
            left -= steps;
            stage.tokens_in(steps)
        };
        self.stages.iter().map(of_stage).sum()
    }

    /// The data position after `step` is committed.
    #[must_use]
    pub fn cursor_after(&self, step: Step) -> Cursor {
        match self.position(step) {
            None => Cursor::default(),
            Some(at) => {
                let read = self.branch.as_ref().filter(|branch| branch.step == step.0);
                if let Some(sequences) = read.and_then(|branch| branch.sequences) {
                    return Cursor { stage: at.stage, sequences };
                }
                let stage = &self.stages[at.stage];
                let sequences = u64::from(at.slots) * stage.slot_sequences as u64;
                Cursor { stage: at.stage, sequences: at.first_sequence + sequences }
            }
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
    use crate::spec::Ramp;

    fn rate(peak: f64, warmup_steps: u64, decay_steps: u64, last: f64) -> LearningRate {
        LearningRate { peak, warmup_steps, decay_steps, last, decay: Decay::Linear }
    }

    fn stage(slots: u32, ramp: Option<(u32, u64)>) -> Stage {
        Stage {
            name: String::new(),
            steps: 0,
            tokens: 0,
            sequence_length: 5,
            slots,
            ramp: ramp.map(|(slots, steps)| Ramp { slots, steps }),
            slot_sequences: 3,
            loops: 1,
            entropy_weight: 0.0,
            objective: crate::spec::Objective::Language,
            rope_base: 1e4,
            learning_rate: rate(1.0, 0, 0, 0.0),
            mixture: Vec::new(),
            document_masking: false,
        }
    }

    #[test]
    fn a_batch_grows_evenly_and_its_sequences_are_counted_without_counting() {
        for (slots, ramp) in [(8, Some((2, 4))), (9, Some((9, 3))), (100, Some((1, 37))), (4, None)]
        {
            let stage = stage(slots, ramp);
            let mut sequences = 0;
            for step in 0..60 {
                assert_eq!(stage.sequences_of(step), sequences, "{slots} {ramp:?} {step}");
                assert_eq!(stage.tokens_in(step), 5 * sequences);
                let here = stage.slots_at(step);
                assert!(here <= slots && (step < 1 || here >= stage.slots_at(step - 1)));
                sequences += 3 * u64::from(here);
            }
            let (first, steps) = ramp.unwrap_or((slots, 0));
            assert_eq!((stage.slots_at(0), stage.slots_at(steps)), (first, slots));
            for tokens in [1, 14, 15, 16, 200, 1000, 10_000] {
                let steps = stage.steps_for(tokens);
                assert!(stage.tokens_in(steps) >= tokens && stage.tokens_in(steps - 1) < tokens);
            }
        }
        assert_eq!(
            [0, 1, 2, 3, 4].map(|step| stage(8, Some((2, 4))).slots_at(step)),
            [2, 3, 5, 6, 8]
        );
    }

    #[test]
    fn the_rate_decays_along_a_cosine() {
        let rate = LearningRate { decay: Decay::Cosine, ..rate(3e-4, 0, 1000, 3e-5) };
        for step in 0..1000 {
            let share = (999 - step) as f64 / 1000.0;
            let cosine = (1.0 - (std::f64::consts::PI * share).cos()) / 2.0;
            let exact = 3e-5 + (3e-4 - 3e-5) * cosine;
            assert!((rate.at(step, 1000) / exact - 1.0).abs() < 1e-13, "{step}");
        }
        assert_eq!(rate.at(999, 1000), 3e-5);
    }

    #[test]
    fn the_rate_warms_up_holds_and_decays_to_its_last_value() {
        let rate = rate(1.0, 4, 5, 0.1);
        let rates: Vec<f64> = (0..15).map(|step| rate.at(step, 15)).collect();
        assert_eq!(&rates[..5], &[0.25, 0.5, 0.75, 1.0, 1.0]);
        assert_eq!(rates[9], 1.0);
        assert!(rates[9..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[14] - 0.1).abs() < 1e-12);
    }

    #[test]
    fn without_decay_the_rate_stays_at_its_peak() {
        let rate = rate(2.0, 0, 0, 0.0);
        assert!((0..9).all(|step| rate.at(step, 9) == 2.0));
    }
}
