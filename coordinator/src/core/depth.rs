//! Watches what the loops do: whether the exit gate has collapsed onto one of them, and whether the loss
//! of one rises where it has been lower. Both can happen while the loss that is trained by falls.

use super::Core;
use crate::records::{RunEvent, StepRecord};
use looptrain_proto::Step;
use looptrain_proto::spec::Objective;

/// Steps that means are taken over.
const WINDOW: f64 = 50.0;
/// Steps of a stage before anything is said of it.
const SETTLED: u64 = 100;
/// A gate has collapsed when so much of the exit distribution is after one loop, and is no more when less
/// is than the second.
const COLLAPSED: [f64; 2] = [0.95, 0.9];
/// A loop's loss rises when its mean is so much above its lowest, in nats, as a share, and in standard
/// deviations of the loss from step to step, whichever is most; it does no longer when it has come back
/// half-way. The mean has about a tenth of that deviation itself, and over a long stage its lowest and its
/// highest are less than one apart.
const RISE: f64 = 0.05;
const RISE_SHARE: f64 = 0.02;
const RISE_DEVIATIONS: f64 = 1.0;

/// What is known of the loops of a stage, as means over its last steps.
#[derive(Debug, Default)]
pub(super) struct Depth {
    stage: usize,
    newest: Step,
    steps: u64,
    losses: Vec<f64>,
    /// Mean squares of how far losses are from their means.
    variances: Vec<f64>,
    /// The lowest of each loss, once it is settled.
    lowest: Vec<f64>,
    exits: Vec<f64>,
    /// The loop that the gate has collapsed onto.
    collapsed: Option<usize>,
    rising: Vec<bool>,
}

impl Depth {
    /// Takes a step of a stage into account; gives how far each loop's loss is above its lowest, once that
    /// can be said, and what is to be told.
    fn see(&mut self, stage: usize, record: &StepRecord) -> (Vec<f64>, Vec<RunEvent>) {
        let loops = record.loss_per_loop.len();
        if self.stage != stage || self.losses.len() != loops || record.step <= self.newest {
            *self = Self {
                stage,
                losses: vec![0.0; loops],
                variances: vec![0.0; loops],
                lowest: vec![f64::INFINITY; loops],
                exits: vec![0.0; loops],
                rising: vec![false; loops],
                ..Self::default()
            };
        }
        self.newest = record.step;
        self.steps += 1;
        let weight = 1.0 / WINDOW.min(self.steps as f64);
        let smooth = |means: &mut [f64], values: &[f64]| {
            means
                .iter_mut()
                .zip(values)
                .for_each(|(mean, value)| *mean += weight * (value - *mean));
        };
        let off = |(mean, value): (&f64, &f64)| (value - mean).powi(2);
        if self.steps > 1 {
            let squares: Vec<f64> =
                self.losses.iter().zip(&record.loss_per_loop).map(off).collect();
            smooth(&mut self.variances, &squares);
        }
        smooth(&mut self.losses, &record.loss_per_loop);
        smooth(&mut self.exits, &record.exit_pdf);
        if self.steps < SETTLED {
            return (Vec::new(), Vec::new());
        }
        let mut events = Vec::new();
        if loops > 1 {
            self.gate(record.step, &mut events);
        }
        let rises = (0..loops).map(|t| self.rise(t, record.step, &mut events)).collect();
        (rises, events)
    }

    fn gate(&mut self, step: Step, events: &mut Vec<RunEvent>) {
        let shares = self.exits.iter().copied().enumerate();
        let most = shares.max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((at, share)) = most else { return };
        let loops = self.exits.len();
        match self.collapsed {
            None if share >= COLLAPSED[0] => {
                self.collapsed = Some(at);
                events.push(RunEvent::GateCollapsed { step, at: at + 1, loops, share });
            }
            Some(_) if share < COLLAPSED[1] => {
                self.collapsed = None;
                events.push(RunEvent::GateRecovered { step });
            }
            _ => {}
        }
    }

    fn rise(&mut self, t: usize, step: Step, events: &mut Vec<RunEvent>) -> f64 {
        let (loss, lowest) = (self.losses[t], self.lowest[t].min(self.losses[t]));
        self.lowest[t] = lowest;
        let noise = RISE_DEVIATIONS * self.variances[t].sqrt();
        let (rise, bound) = (loss - lowest, RISE.max(RISE_SHARE * lowest).max(noise));
        if !self.rising[t] && rise > bound {
            self.rising[t] = true;
            events.push(RunEvent::LoopLossRises { step, at: t + 1, loss, lowest });
        } else if self.rising[t] && rise < bound / 2.0 {
            self.rising[t] = false;
            events.push(RunEvent::LoopLossFalls { step, at: t + 1, loss });
        }
        rise
    }
}

impl Core {
    /// Puts into a step's record what its loops are like beside those of the steps before, and gives what
    /// is to be told of them. A step without statistics says nothing, and one that trains the exit gate
    /// alone nothing of this: there losses are those of weights that stay, and the gate is meant to move.
    pub(super) fn watch_depth(&mut self, record: &mut StepRecord) -> Vec<RunEvent> {
        let stage = self.spec.stage_of(record.step);
        let is_language = self.spec.stages[stage].objective == Objective::Language;
        if !record.loss.is_finite() || !is_language {
            return Vec::new();
        }
        let (rises, events) = self.depth.see(stage, record);
        record.loss_rise_per_loop = rises;
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::example;

    fn record(step: u64, losses: [f64; 2], first_exit: f64) -> StepRecord {
        StepRecord {
            loss_per_loop: losses.to_vec(),
            exit_pdf: vec![first_exit, 1.0 - first_exit],
            ..example(step, losses[1])
        }
    }

    /// What is told while losses and exits go along a path of so many steps.
    fn told(depth: &mut Depth, from: u64, path: impl Fn(f64) -> ([f64; 2], f64)) -> Vec<String> {
        let mut told = Vec::new();
        for step in from..from + 400 {
            let (losses, exit) = path((step - from) as f64 / 400.0);
            let (rises, events) = depth.see(0, &record(step, losses, exit));
            assert!(rises.iter().all(|rise| *rise >= 0.0));
            told.extend(events.iter().map(ToString::to_string));
        }
        told
    }

    #[test]
    fn a_gate_that_collapses_is_told_of_once_and_again_when_it_opens() {
        let mut depth = Depth::default();
        let falls = |at: f64| [4.0 - at, 3.0 - at];
        assert!(told(&mut depth, 1, |at| (falls(at), 0.5)).is_empty());
        let events =
            told(&mut depth, 401, |at| (falls(1.0 + at), 0.5 + 0.49 * (2.0 * at).min(1.0)));
        assert_eq!(events.len(), 1, "{events:?}");
        assert!(events[0].contains("collapsed") && events[0].contains("loop 1"), "{events:?}");
        let events = told(&mut depth, 801, |at| (falls(2.0 + at), 0.99 - 0.5 * at));
        assert_eq!(events.len(), 1, "{events:?}");
        assert!(events[0].contains("no longer"), "{events:?}");
    }

    #[test]
    fn a_loop_whose_loss_rises_is_told_of_while_others_fall() {
        let mut depth = Depth::default();
        assert!(told(&mut depth, 1, |at| ([4.0 - at, 4.0 - at], 0.5)).is_empty());
        let events = told(&mut depth, 401, |at| ([3.0 + at, 3.0 - at], 0.5));
        assert_eq!(events.len(), 1, "{events:?}");
        assert!(events[0].contains("the loss of loop 1 rises"), "{events:?}");
        let (rises, _) = depth.see(0, &record(801, [4.0, 2.0], 0.5));
        assert!(rises[0] > 0.7 && rises[1] == 0.0, "{rises:?}");
        let events = told(&mut depth, 802, |at| ([4.0 - 1.2 * at, 2.0], 0.5));
        assert_eq!(events.len(), 1, "{events:?}");
        assert!(events[0].contains("no longer"), "{events:?}");
    }

    #[test]
    fn noise_around_a_loss_that_stays_is_no_rise() {
        let mut state = 1_u64;
        let mut noise = || {
            // The sum of twelve even draws is nearly normal, with a deviation of one.
            let draw = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 11) as f64 / (1_u64 << 53) as f64
            };
            (0..12).map(draw).sum::<f64>() - 6.0
        };
        let mut depth = Depth::default();
        let mut highest = 0.0_f64;
        for step in 1..=20_000 {
            let losses = [3.0 + 0.3 * noise(), 2.0 + 0.02 * noise()];
            let (rises, events) = depth.see(0, &record(step, losses, 0.5));
            assert!(events.is_empty(), "step {step}: {events:?}");
            highest = rises.iter().fold(highest, |highest, rise| highest.max(*rise));
        }
        assert!(highest > 0.1, "there was something to be deceived by: {highest}");
    }

    #[test]
    fn a_new_stage_and_steps_that_come_again_begin_anew() {
        let mut depth = Depth::default();
        told(&mut depth, 1, |_| ([2.0, 2.0], 0.5));
        for step in 401..490 {
            let (rises, events) = depth.see(1, &record(step, [5.0, 5.0], 0.99));
            assert!(rises.is_empty() && events.is_empty());
        }
        assert!(!told(&mut depth, 490, |_| ([5.0, 5.0], 0.99)).is_empty());
        let (rises, events) = depth.see(0, &record(300, [9.0, 9.0], 0.99));
        assert!(rises.is_empty() && events.is_empty());
    }
}
