//! Whether a step is a spike: a pure function of the steps before it in its stage, which travels with
//! plans and votes as [`Trend`].
//!
//! Means and variances are weighted exponentially (T. Finch, "Incremental calculation of weighted mean
//! and variance", 2009, section 9); up to the window every step weighs the same.

use crate::spec::Spikes;
use crate::v1::{StepStatistics, Trend};

/// What a step's figures may be at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// Nats per token.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
}

/// A deviation is at least this share of the mean: where a figure hardly moves, noise is no spike.
const LEAST_DEVIATION: f64 = 1e-3;

impl Trend {
    /// What a step of `stage` may have; `None` while too few of its steps are known.
    #[must_use]
    pub fn bounds(&self, guard: &Spikes, stage: usize) -> Option<Bounds> {
        let known = if self.stage as usize == stage { self.steps } else { 0 };
        let bound = |mean: f64, variance: f64| {
            let deviation = variance.max(0.0).sqrt().max(LEAST_DEVIATION * mean.abs());
            mean + guard.deviations * deviation
        };
        (known >= guard.window.div_ceil(2)).then(|| Bounds {
            loss: bound(self.loss_mean, self.loss_variance),
            grad_norm: bound(self.grad_norm_mean, self.grad_norm_variance),
        })
    }

    /// What of a step of `stage` is above its bounds, in words; empty when nothing is.
    #[must_use]
    pub fn spike(&self, guard: &Spikes, stage: usize, step: &StepStatistics) -> String {
        let Some(bounds) = self.bounds(guard, stage) else { return String::new() };
        let figures = [
            ("loss", step.loss, bounds.loss, self.loss_mean),
            ("gradient norm", step.grad_norm, bounds.grad_norm, self.grad_norm_mean),
        ];
        // What is no number is above every bound.
        let above = |figure: f64, bound: f64| figure.is_nan() || figure > bound;
        let told = figures.iter().filter(|(_, figure, bound, _)| above(*figure, *bound));
        let told = told.map(|(name, figure, bound, mean)| {
            format!("{name} {figure:.4} is above {bound:.4} (mean of the steps before: {mean:.4})")
        });
        told.collect::<Vec<_>>().join(", ")
    }

    /// The trend with a step of `stage` in it.
    #[must_use]
    pub fn with(&self, guard: &Spikes, stage: usize, step: &StepStatistics) -> Self {
        let before = match self.stage as usize == stage {
            true => *self,
            false => Self { stage: stage as u32, ..Self::default() },
        };
        let bounds = before.bounds(guard, stage);
        let weight = 1.0 / (before.steps + 1).min(guard.window) as f64;
        let moved = |figure: f64, bound: Option<f64>, mean: f64, variance: f64| {
            let figure = bound.map_or(figure, |bound| if figure > bound { bound } else { figure });
            if !figure.is_finite() {
                return (mean, variance);
            }
            let change = figure - mean;
            let part = weight * change;
            (mean + part, (1.0 - weight) * (variance + change * part))
        };
        let of_loss = bounds.map(|bounds| bounds.loss);
        let of_norm = bounds.map(|bounds| bounds.grad_norm);
        let (loss_mean, loss_variance) =
            moved(step.loss, of_loss, before.loss_mean, before.loss_variance);
        let (grad_norm_mean, grad_norm_variance) =
            moved(step.grad_norm, of_norm, before.grad_norm_mean, before.grad_norm_variance);
        Self {
            steps: before.steps + 1,
            loss_mean,
            loss_variance,
            grad_norm_mean,
            grad_norm_variance,
            ..before
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss: f64, grad_norm: f64) -> StepStatistics {
        StepStatistics { loss, grad_norm, ..StepStatistics::default() }
    }

    /// Figures that repeat themselves only after long, around 3 and 0.5.
    fn usual(index: u64) -> StepStatistics {
        let wave = ((index * 37) % 101) as f64 / 100.0 - 0.5;
        step(3.0 + 0.2 * wave, 0.5 - 0.1 * wave)
    }

    fn trained(guard: &Spikes, steps: u64) -> Trend {
        (0..steps).fold(Trend::default(), |trend, index| trend.with(guard, 0, &usual(index)))
    }

    #[test]
    fn up_to_the_window_mean_and_variance_are_those_of_all_steps() {
        let guard = Spikes { window: 64, ..Spikes::default() };
        let trend = trained(&guard, 64);
        let losses: Vec<f64> = (0..64).map(|index| usual(index).loss).collect();
        let mean = losses.iter().sum::<f64>() / 64.0;
        let variance = losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / 64.0;
        assert!((trend.loss_mean - mean).abs() < 1e-12);
        assert!((trend.loss_variance - variance).abs() < 1e-12);
        let bounds = trend.bounds(&guard, 0).map(|bounds| bounds.loss);
        assert!((bounds.unwrap_or_default() - (mean + 6.0 * variance.sqrt())).abs() < 1e-12);
    }

    #[test]
    fn nobody_is_judged_before_half_a_window_and_each_stage_begins_anew() {
        let guard = Spikes { window: 9, ..Spikes::default() };
        let wild = step(100.0, 100.0);
        assert!(trained(&guard, 4).spike(&guard, 0, &wild).is_empty());
        let trend = trained(&guard, 5);
        let told = trend.spike(&guard, 0, &wild);
        assert!(told.starts_with("loss 100.0000 is above 3."), "{told}");
        assert!(told.contains(", gradient norm 100.0000 is above 0."), "{told}");
        assert!(trend.spike(&guard, 1, &wild).is_empty());
        let next = trend.with(&guard, 1, &wild);
        assert_eq!((next.stage, next.steps, next.loss_mean), (1, 1, 100.0));
    }

    #[test]
    fn the_usual_is_no_spike_nor_is_a_loss_that_falls() {
        let guard = Spikes::default();
        let mut trend = trained(&guard, 200);
        for index in 200..1000 {
            assert_eq!(trend.spike(&guard, 0, &usual(index)), "");
            trend = trend.with(&guard, 0, &usual(index));
        }
        assert_eq!(trend.spike(&guard, 0, &step(0.1, 0.01)), "");
        // All the same for a hundred steps, then off by what rounding does.
        let flat = (0..100).fold(Trend::default(), |it, _| it.with(&guard, 0, &step(2.0, 1.0)));
        assert_eq!(flat.spike(&guard, 0, &step(2.0001, 1.0001)), "");
        assert_ne!(flat.spike(&guard, 0, &step(2.1, 1.0)), "");
    }

    #[test]
    fn one_spike_does_not_hide_the_next_and_a_new_level_is_followed() {
        let guard = Spikes::default();
        let trend = trained(&guard, 200);
        for wild in [1e9, f64::INFINITY, f64::NAN] {
            let after = trend.with(&guard, 0, &step(wild, 0.5));
            assert!(after.loss_mean.is_finite() && after.loss_variance.is_finite(), "{wild}");
            assert_ne!(after.spike(&guard, 0, &step(4.0, 0.5)), "", "{wild}");
        }
        let mut trend = trend;
        let mut spikes = 0;
        while !trend.spike(&guard, 0, &step(3.6, 0.5)).is_empty() {
            trend = trend.with(&guard, 0, &step(3.6, 0.5));
            spikes += 1;
        }
        assert!((1..10).contains(&spikes), "{spikes}");
    }
}
