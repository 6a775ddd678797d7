//! The loss on the validation split: shares by rank, sums in fixed point, so that the result is
//! the same for any number of workers.

use std::time::Duration;

use looptrain_proto::v1::Evaluate;
use looptrain_proto::{EVALUATION_FRACTION_BITS, Generation, Step, WorkerId};

use super::shares::share;
use super::{Core, Directive, Phase};
use crate::records::{EvaluationRecord, RunEvent, mean_depth};

/// An evaluation in progress.
#[derive(Debug)]
pub(super) struct Exam {
    step: Step,
    started: Duration,
    /// One place a rank; ranks without sequences have none to wait for.
    shares: Vec<Option<Share>>,
}

impl Exam {
    pub(super) fn step(&self) -> Step {
        self.step
    }

    pub(super) fn awaits(&self, rank: usize) -> bool {
        self.shares.get(rank).is_some_and(Option::is_none)
    }
}

/// A rank's sums over the tokens of its share.
#[derive(Clone, Debug, Default)]
pub(super) struct Share {
    /// Loss, cross-entropy per loop, exit probability per loop, entropy; or nothing, for a share
    /// without sequences.
    pub(super) sums: Vec<i64>,
    pub(super) tokens: u64,
}

impl Core {
    /// Every so many steps, and always after the last one; once a step.
    pub(super) fn evaluation_is_due(&self) -> bool {
        let (step, every) = (self.committed, self.spec.evaluation.every_steps);
        let last = step >= self.total;
        let regular = every > 0 && step.0.is_multiple_of(every) && self.stop.is_none();
        let done = self.evaluations.last().is_some_and(|record| record.step == step);
        step.0 > 0 && (last || regular) && !done
    }

    pub(super) fn start_evaluation(&mut self) {
        let (step, total) = (self.committed, self.spec.evaluation.sequences);
        let world = self.members.len();
        let mut shares = vec![None; world];
        for (rank, worker) in self.members.clone().into_iter().enumerate() {
            let range = share(total, rank, world);
            if range.is_empty() {
                shares[rank] = Some(Share::default());
                continue;
            }
            let evaluate = Evaluate {
                generation: self.generation.0,
                step: step.0,
                begin: range.start,
                end: range.end,
            };
            self.send(worker, Directive::Evaluate(evaluate));
        }
        self.phase = Phase::Evaluating(Exam { step, started: self.now, shares });
        self.explain(format!("evaluating step {step} on {total} validation sequences"));
    }

    pub(super) fn on_evaluated(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        share: Share,
    ) {
        let rank = match self.current_rank(worker, generation) {
            Ok(rank) => rank,
            Err(reason) => return self.ignore(worker, reason),
        };
        let loops = self.spec.stages[self.spec.stage_of(step)].loops;
        let Phase::Evaluating(exam) = &mut self.phase else {
            return self.ignore(worker, format!("step {step} is not being evaluated"));
        };
        if step != exam.step {
            let reason = format!("it evaluated step {step} instead of step {}", exam.step);
            return self.ignore(worker, reason);
        }
        let wanted = 2 * loops + 2;
        if share.sums.len() != wanted || share.tokens == 0 {
            let (sums, tokens) = (share.sums.len(), share.tokens);
            let reason = format!(
                "its evaluation has {sums} sums over {tokens} tokens where {wanted} are needed"
            );
            return self.expel_and_reform(&[worker], &reason);
        }
        exam.shares[rank] = Some(share);
        if exam.shares.iter().all(Option::is_some) {
            let shares: Vec<Share> = exam.shares.iter().flatten().cloned().collect();
            let seconds = (self.now - exam.started).as_secs_f64();
            let sequences = self.spec.evaluation.sequences;
            let record = add_up(step, sequences, seconds, loops, &shares);
            self.evaluations.push(record.clone());
            self.publish(RunEvent::Evaluated(record));
            self.proceed();
        }
    }
}

fn add_up(
    step: Step,
    sequences: u64,
    seconds: f64,
    loops: usize,
    shares: &[Share],
) -> EvaluationRecord {
    let tokens = shares.iter().fold(0, |sum: u64, share| sum.saturating_add(share.tokens));
    let unit = (1u64 << EVALUATION_FRACTION_BITS) as f64 * tokens as f64;
    let mean = |place: usize| {
        let sums = shares.iter().filter_map(|share| share.sums.get(place));
        sums.map(|sum| i128::from(*sum)).sum::<i128>() as f64 / unit
    };
    let loss_per_loop: Vec<f64> = (1..=loops).map(mean).collect();
    let exit_pdf: Vec<f64> = (loops + 1..=2 * loops).map(mean).collect();
    EvaluationRecord {
        step,
        sequences,
        tokens,
        loss: mean(0),
        perplexity: loss_per_loop.last().map_or(f64::NAN, |loss| loss.exp()),
        mean_depth: mean_depth(&exit_pdf),
        loss_per_loop,
        exit_pdf,
        entropy: mean(2 * loops + 1),
        seconds,
    }
}
