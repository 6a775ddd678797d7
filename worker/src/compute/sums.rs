//! The integers beside the gradient in the reduced buffer: a step's statistics.
//!
//! They have a fixed point of their own, whatever the gradient is summed in: loss, a cross-entropy
//! per loop, an exit probability per loop, entropy; then what each loop is like: the root mean square of
//! its stream, the norm of its state's gradient, the agreement with the last loop. Each slot adds its
//! means, so dividing by the number of slots gives the step's means. The last integer counts slots that
//! have no usable gradient, and add nothing else.

use looptrain_model::SlotStatistics;
use looptrain_proto::v1::StepStatistics;
use looptrain_proto::{EVALUATION_FRACTION_BITS, MAX_SLOTS, Spec, Step};

use crate::reduce::exact::FixedPoint;

/// Statistics are means of a few nats at most, so they need range more than fraction bits.
const STATISTICS_FRACTION_BITS: u32 = 32;

/// What the loops are like can be large, where training goes wrong.
const LOOP_FRACTION_BITS: u32 = 20;

/// Elements of the statistics of an evaluation.
pub(super) fn evaluation_len(loops: usize) -> usize {
    2 + 2 * loops
}

/// Elements of the statistics of a step.
fn statistics_len(loops: usize) -> usize {
    evaluation_len(loops) + 3 * loops
}

/// Elements of the buffer of a step beside the gradient.
pub(super) fn tail_len(loops: usize) -> usize {
    statistics_len(loops) + 1
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

fn loop_fixed_point() -> FixedPoint {
    FixedPoint::new(LOOP_FRACTION_BITS, MAX_SLOTS)
}

/// What the loops are like, as integers. It is there to be watched and trains nothing, so what is beyond
/// all range becomes the largest number that has a place, and what is no number 0.
fn of_loops(statistics: &SlotStatistics) -> impl Iterator<Item = i64> {
    let fixed = loop_fixed_point();
    let most = f64::from(fixed.limit());
    let SlotStatistics { hidden_rms_per_loop, gradient_norm_per_loop, agreement_per_loop, .. } =
        statistics;
    let all = hidden_rms_per_loop.iter().chain(gradient_norm_per_loop).chain(agreement_per_loop);
    all.map(move |value| fixed.encode(value.clamp(-most, most)).unwrap_or(0))
}

/// A slot's statistics as integers; gives name and value of the first, of those that the loss is made
/// of, that is no finite, moderate number.
pub(super) fn encoded(statistics: &SlotStatistics) -> Result<Vec<i64>, (String, f64)> {
    let fixed = statistics_fixed_point();
    let encoded = |(value, name)| fixed.encode(value).ok_or((name, value));
    flattened(statistics).map(encoded).chain(of_loops(statistics).map(Ok)).collect()
}

/// The step's means from the reduced statistics: over the slots that have them, so that without
/// any, loss and entropy are NaN and the rest is empty.
pub(super) fn step_statistics(
    tail: &[i64],
    spec: &Spec,
    step: Step,
    grad_norm: f64,
) -> StepStatistics {
    let fixed = statistics_fixed_point();
    let loops = spec.stages[spec.stage_of(step)].loops;
    let bad_slots = tail[statistics_len(loops)];
    let good_slots = i64::from(spec.slots_of(step)) - bad_slots;
    let mean = |index: usize| fixed.decode_one(tail[index], good_slots as f64);
    let per_loop = if good_slots > 0 { loops } else { 0 };
    let means = |first: usize| (first..first + per_loop).map(mean).collect();
    let of_loops = evaluation_len(loops);
    let watched = |first: usize| {
        let mean = |at| loop_fixed_point().decode_one(tail[at], good_slots as f64);
        (of_loops + first..of_loops + first + per_loop).map(mean).collect()
    };
    StepStatistics {
        loss: mean(0),
        loss_per_loop: means(1),
        exit_pdf: means(loops + 1),
        entropy: mean(2 * loops + 1),
        grad_norm,
        tokens: spec.tokens_of(step),
        bad_slots: bad_slots as u32,
        hidden_rms_per_loop: watched(0),
        gradient_norm_per_loop: watched(loops),
        agreement_per_loop: watched(2 * loops),
        spike: String::new(),
        trend: None,
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
            hidden_rms_per_loop: vec![3.0, 4.0],
            gradient_norm_per_loop: vec![0.5, 0.75],
            agreement_per_loop: vec![0.875, 1.0],
        }
    }

    #[test]
    fn the_means_over_slots_come_back_in_their_places() {
        let mut spec = tiny_spec("memory://");
        (spec.stages[0].loops, spec.stages[0].slots) = (2, 2);
        let add = |a: &[i64], b: &[i64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
        let (first, second) = (encoded(&statistics(3.0)), encoded(&statistics(4.0)));
        let mut sums = add(&first.unwrap(), &second.unwrap());
        sums.push(0);
        assert_eq!(sums.len(), tail_len(2));
        let step = step_statistics(&sums, &spec, Step(1), 1.25);
        assert_eq!((step.loss, step.bad_slots), (3.5, 0));
        assert_eq!(step.loss_per_loop, [2.0, 1.5]);
        assert_eq!(step.exit_pdf, [0.25, 0.75]);
        assert_eq!((step.entropy, step.grad_norm), (0.5, 1.25));
        assert_eq!(step.hidden_rms_per_loop, [3.0, 4.0]);
        assert_eq!(step.gradient_norm_per_loop, [0.5, 0.75]);
        assert_eq!(step.agreement_per_loop, [0.875, 1.0]);
        assert_eq!(step.tokens, spec.stages[0].step_tokens());
    }

    #[test]
    fn a_statistic_that_is_no_number_is_named() {
        let mut bad = statistics(1.0);
        bad.loss_per_loop[1] = f64::NAN;
        let mut sums = vec![0; evaluation_len(2)];
        assert_eq!(encoded(&bad).unwrap_err().0, "the cross-entropy of loop 2");
        assert_eq!(
            add_evaluation(&mut sums, &bad, 4).unwrap_err().0,
            "the cross-entropy of loop 2"
        );
    }

    #[test]
    fn what_is_only_watched_never_keeps_a_step_from_its_place() {
        let mut wild = statistics(1.0);
        wild.hidden_rms_per_loop[0] = f64::INFINITY;
        wild.gradient_norm_per_loop[1] = f64::NAN;
        let encoded = encoded(&wild).unwrap();
        let fixed = loop_fixed_point();
        assert_eq!(encoded[6], fixed.encode(f64::from(fixed.limit())).unwrap());
        assert_eq!(encoded[9], 0);
    }

    #[test]
    fn means_are_over_the_slots_that_have_them() {
        let mut spec = tiny_spec("memory://");
        (spec.stages[0].loops, spec.stages[0].slots) = (2, 3);
        let mut sums = encoded(&statistics(3.0)).unwrap();
        sums.push(2);
        let step = step_statistics(&sums, &spec, Step(1), 0.0);
        assert_eq!((step.loss, step.entropy, step.bad_slots), (3.0, 0.5, 2));
        let mut sums = vec![0; statistics_len(2)];
        sums.push(3);
        let step = step_statistics(&sums, &spec, Step(1), 0.0);
        assert!(step.loss.is_nan() && step.loss_per_loop.is_empty() && step.exit_pdf.is_empty());
    }

    #[test]
    fn an_evaluation_adds_tokens_not_batches() {
        let mut sums = vec![0; evaluation_len(2)];
        add_evaluation(&mut sums, &statistics(3.0), 100).unwrap();
        add_evaluation(&mut sums, &statistics(5.0), 300).unwrap();
        assert_eq!(sums[0], 1800 << EVALUATION_FRACTION_BITS);
        assert_eq!(sums[5], 200 << EVALUATION_FRACTION_BITS);
    }
}
