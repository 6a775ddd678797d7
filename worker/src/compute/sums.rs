//! The reduced buffer: a step's gradient and statistics as one array of integers.
//!
//! One all-reduce carries both. First one element per parameter in the gradient's fixed point,
//! then the statistics in their own: loss, a cross-entropy per loop, an exit probability per loop,
//! entropy. Each slot adds its means, so dividing by the number of slots gives the step's means.

use looptrain_model::SlotStatistics;
use looptrain_proto::v1::StepStatistics;
use looptrain_proto::{EVALUATION_FRACTION_BITS, MAX_SLOTS, spec};

use crate::reduce::exact::FixedPoint;

/// Statistics are means of a few nats at most, so they need range more than fraction bits.
const STATISTICS_FRACTION_BITS: u32 = 32;

/// Elements of the statistics of one stage.
pub(super) fn statistics_len(loops: usize) -> usize {
    2 + 2 * loops
}

pub(super) fn statistics_fixed_point() -> FixedPoint {
    FixedPoint::new(STATISTICS_FRACTION_BITS, MAX_SLOTS)
}

/// The statistics in the order of the buffer, each with its name for messages.
fn flattened(statistics: &SlotStatistics) -> impl Iterator<Item = (f64, String)> {
    let numbered = |name: &'static str, values: &[f64]| {
        let named = move |(index, value): (usize, &f64)| (*value, format!("{name} {}", index + 1));
        values.iter().enumerate().map(named).collect::<Vec<_>>()
    };
    std::iter::once((statistics.loss, "the loss".to_owned()))
        .chain(numbered("the cross-entropy of loop", &statistics.loss_per_loop))
        .chain(numbered("the exit probability of loop", &statistics.exit_pdf))
        .chain(std::iter::once((statistics.entropy, "the entropy".to_owned())))
}

/// Adds a slot's statistics; gives name and value of the first that is no finite, moderate number.
pub(super) fn add_statistics(
    sums: &mut [i64],
    statistics: &SlotStatistics,
) -> Result<(), (String, f64)> {
    let fixed = statistics_fixed_point();
    for (sum, (value, name)) in sums.iter_mut().zip(flattened(statistics)) {
        *sum += fixed.encode(value).ok_or((name, value))?;
    }
    Ok(())
}

/// The step's means from the reduced statistics.
pub(super) fn step_statistics(sums: &[i64], stage: &spec::Stage, grad_norm: f64) -> StepStatistics {
    let fixed = statistics_fixed_point();
    let slots = f64::from(stage.slots);
    let mean = |index: usize| fixed.decode_one(sums[index], slots);
    let loops = stage.loops;
    StepStatistics {
        loss: mean(0),
        loss_per_loop: (1..=loops).map(mean).collect(),
        exit_pdf: (loops + 1..=2 * loops).map(mean).collect(),
        entropy: mean(2 * loops + 1),
        grad_norm,
        tokens: stage.step_tokens(),
    }
}

/// Adds an evaluation batch of `tokens` tokens: sums over tokens, not means.
pub(super) fn add_evaluation(
    sums: &mut [i64],
    statistics: &SlotStatistics,
    tokens: u64,
) -> Result<(), (String, f64)> {
    let scale = 2f64.powi(EVALUATION_FRACTION_BITS as i32) * tokens as f64;
    for (sum, (value, name)) in sums.iter_mut().zip(flattened(statistics)) {
        let scaled = (value * scale).round_ties_even();
        // A NaN compares false. 2^62 is far beyond any evaluation, and exact in a double.
        let fits = scaled.abs() < 2f64.powi(62);
        let total = fits.then(|| sum.checked_add(scaled as i64)).flatten();
        *sum = total.ok_or((name, value))?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::tiny_spec;

    fn statistics(loss: f64) -> SlotStatistics {
        SlotStatistics {
            loss,
            loss_per_loop: vec![2.0, 1.5],
            exit_pdf: vec![0.25, 0.75],
            entropy: 0.5,
        }
    }

    #[test]
    fn the_means_over_slots_come_back_in_their_places() {
        let mut stage = tiny_spec("memory://").stages.remove(0);
        (stage.loops, stage.slots) = (2, 2);
        let mut sums = vec![0; statistics_len(2)];
        add_statistics(&mut sums, &statistics(3.0)).unwrap();
        add_statistics(&mut sums, &statistics(4.0)).unwrap();
        let step = step_statistics(&sums, &stage, 1.25);
        assert_eq!(step.loss, 3.5);
        assert_eq!(step.loss_per_loop, [2.0, 1.5]);
        assert_eq!(step.exit_pdf, [0.25, 0.75]);
        assert_eq!((step.entropy, step.grad_norm), (0.5, 1.25));
        assert_eq!(step.tokens, stage.step_tokens());
    }

    #[test]
    fn a_statistic_that_is_no_number_is_named() {
        let mut bad = statistics(1.0);
        bad.loss_per_loop[1] = f64::NAN;
        let mut sums = vec![0; statistics_len(2)];
        assert_eq!(add_statistics(&mut sums, &bad).unwrap_err().0, "the cross-entropy of loop 2");
        assert_eq!(
            add_evaluation(&mut sums, &bad, 4).unwrap_err().0,
            "the cross-entropy of loop 2"
        );
    }

    #[test]
    fn an_evaluation_adds_tokens_not_batches() {
        let mut sums = vec![0; statistics_len(2)];
        add_evaluation(&mut sums, &statistics(3.0), 100).unwrap();
        add_evaluation(&mut sums, &statistics(5.0), 300).unwrap();
        assert_eq!(sums[0], 1800 << EVALUATION_FRACTION_BITS);
        assert_eq!(sums[5], 200 << EVALUATION_FRACTION_BITS);
    }
}
