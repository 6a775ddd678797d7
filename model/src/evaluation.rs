//! What a model is worth at each depth: loss and accuracy of every loop, the exit distribution, and
//! both as a function of the threshold at which tokens exit.

use crate::exit::{exit_loop, log_exit_pdf};
use crate::{StageSettings, TokenMeasures};

/// Sums over tokens, in double precision and in the order in which they are added.
#[derive(Clone, Debug)]
pub struct DepthSums {
    loops: usize,
    entropy_weight: f64,
    thresholds: Vec<f64>,
    tokens: u64,
    losses: Vec<f64>,
    hits: Vec<u64>,
    exit_pdf: Vec<f64>,
    entropy: f64,
    stage_one: f64,
    /// Of each threshold: depth, loss and hits.
    quality: Vec<(u64, f64, u64)>,
    sequences: Vec<SequenceSums>,
}

/// Sums over the tokens of one sequence that count.
#[derive(Clone, Debug, PartialEq)]
struct SequenceSums {
    tokens: u64,
    /// Of each threshold: depth and loss.
    quality: Vec<(u64, f64)>,
}

/// Means over the tokens of an evaluation. Losses are in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthReport {
    /// Tokens that were counted.
    pub tokens: u64,
    /// Stage I loss.
    pub loss: f64,
    /// Cross-entropy of each loop.
    pub loss_per_loop: Vec<f64>,
    /// Share of the targets that have the largest logit, in each loop.
    pub accuracy_per_loop: Vec<f64>,
    /// Probability of each exit.
    pub exit_pdf: Vec<f64>,
    /// Entropy of a token's exit distribution.
    pub entropy: f64,
    /// Mean of the exit distribution, in loops.
    pub mean_depth: f64,
    /// Depth and quality at each threshold, ascending.
    pub quality: Vec<Quality>,
    sequences: Vec<SequenceSums>,
}

impl DepthReport {
    /// Sequences of which tokens were counted.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Mean depth and loss at each threshold, over all sequences but one: how the curve would be without
    /// it. For how far a curve can be trusted, as the sequences of an evaluation are some of many. `None`
    /// when there is no such sequence, or no other.
    #[must_use]
    pub fn curve_without(&self, left_out: usize) -> Option<Vec<(f64, f64)>> {
        let out = self.sequences.get(left_out).filter(|out| out.tokens < self.tokens)?;
        let (all, left) = (self.tokens as f64, (self.tokens - out.tokens) as f64);
        let means = self.quality.iter().zip(&out.quality).map(|(quality, &(depth, loss))| {
            let mean = |mean: f64, out: f64| (mean * all - out) / left;
            (mean(quality.mean_depth, depth as f64), mean(quality.loss, loss))
        });
        Some(means.collect())
    }
}

/// What is lost and saved when tokens exit at a threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Tokens exit after the first loop at which their exit distribution has summed up to this.
    pub threshold: f64,
    /// Loops per token.
    pub mean_depth: f64,
    /// Cross-entropy after those loops.
    pub loss: f64,
    /// Share of the targets that have the largest logit.
    pub accuracy: f64,
}

impl DepthSums {
    /// Nothing yet; `thresholds` are those of the report's curve.
    #[must_use]
    pub fn new(settings: &StageSettings, thresholds: &[f64]) -> Self {
        let loops = settings.loops;
        Self {
            loops,
            entropy_weight: settings.entropy_weight,
            thresholds: thresholds.to_vec(),
            tokens: 0,
            losses: vec![0.0; loops],
            hits: vec![0; loops],
            exit_pdf: vec![0.0; loops],
            entropy: 0.0,
            stage_one: 0.0,
            quality: vec![(0, 0.0, 0); thresholds.len()],
            sequences: Vec::new(),
        }
    }

    /// Adds sequences of that length: those of their tokens that `counts` says, by their number.
    pub fn add(&mut self, measures: &TokenMeasures, length: usize, counts: impl Fn(usize) -> bool) {
        let tokens = measures.gates.len() / self.loops;
        let none = SequenceSums { tokens: 0, quality: vec![(0, 0.0); self.thresholds.len()] };
        let first = self.sequences.len();
        self.sequences.resize(first + tokens.div_ceil(length), none);
        let mut log_pdf = Vec::with_capacity(self.loops);
        for token in (0..tokens).filter(|token| counts(*token)) {
            let sequence = &mut self.sequences[first + token / length];
            sequence.tokens += 1;
            let at = |t: usize| t * tokens + token;
            let gates: Vec<f32> = (0..self.loops).map(|t| measures.gates[at(t)]).collect();
            let wide: Vec<f64> = gates.iter().map(|gate| f64::from(*gate)).collect();
            log_exit_pdf(&wide, &mut log_pdf);
            for (t, log_p) in log_pdf.iter().enumerate() {
                let (p, loss) = (log_p.exp(), f64::from(measures.losses[at(t)]));
                self.losses[t] += loss;
                self.hits[t] += u64::from(measures.hits[at(t)]);
                self.exit_pdf[t] += p;
                self.entropy -= p * log_p;
                self.stage_one += p * (loss + self.entropy_weight * log_p);
            }
            let of_thresholds = self.quality.iter_mut().zip(&mut sequence.quality);
            for ((sums, own), threshold) in of_thresholds.zip(&self.thresholds) {
                let t = exit_loop(&gates, *threshold);
                let (depth, loss) = (t as u64 + 1, f64::from(measures.losses[at(t)]));
                sums.0 += depth;
                sums.1 += loss;
                sums.2 += u64::from(measures.hits[at(t)]);
                own.0 += depth;
                own.1 += loss;
            }
            self.tokens += 1;
        }
        let added = self.sequences.split_off(first);
        self.sequences.extend(added.into_iter().filter(|sequence| sequence.tokens > 0));
    }

    /// The means; `None` when no token was counted.
    #[must_use]
    pub fn report(&self) -> Option<DepthReport> {
        let tokens = (self.tokens > 0).then_some(self.tokens as f64)?;
        let means = |sums: &[f64]| sums.iter().map(|sum| sum / tokens).collect::<Vec<f64>>();
        let exit_pdf = means(&self.exit_pdf);
        let quality = self.quality.iter().zip(&self.thresholds);
        let quality = quality.map(|(&(depth, loss, hits), &threshold)| Quality {
            threshold,
            mean_depth: depth as f64 / tokens,
            loss: loss / tokens,
            accuracy: hits as f64 / tokens,
        });
        Some(DepthReport {
            tokens: self.tokens,
            loss: self.stage_one / tokens,
            loss_per_loop: means(&self.losses),
            accuracy_per_loop: self.hits.iter().map(|hits| *hits as f64 / tokens).collect(),
            entropy: self.entropy / tokens,
            mean_depth: exit_pdf.iter().enumerate().map(|(t, p)| (t + 1) as f64 * p).sum(),
            exit_pdf,
            quality: quality.collect(),
            sequences: self.sequences.clone(),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::spec::Objective;

    use super::*;
    use crate::stage_one;

    /// Three loops, four tokens.
    fn measures() -> TokenMeasures {
        let value = |at: usize| (at as f32 * 1.7).sin();
        TokenMeasures {
            losses: (0..12).map(|at| 2.0 + value(at)).collect(),
            gates: (0..12).map(|at| 2.0 * value(at + 5)).collect(),
            hits: (0..12).map(|at| at % 3 == 0).collect(),
        }
    }

    const SETTINGS: StageSettings = StageSettings {
        loops: 3,
        entropy_weight: 0.05,
        rope_base: 1e4,
        objective: Objective::Language,
    };

    #[test]
    fn means_are_those_of_the_stage_one_loss() {
        let measures = measures();
        let mut sums = DepthSums::new(&SETTINGS, &[]);
        sums.add(&measures, 4, |_| true);
        let found = sums.report().unwrap();
        let exact = stage_one(&measures.losses, &measures.gates, 3, 0.05).statistics;
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(found.loss, exact.loss);
        close(found.entropy, exact.entropy);
        for t in 0..3 {
            close(found.loss_per_loop[t], exact.loss_per_loop[t]);
            close(found.exit_pdf[t], exact.exit_pdf[t]);
        }
        close(
            found.mean_depth,
            exact.exit_pdf[0] + 2.0 * exact.exit_pdf[1] + 3.0 * exact.exit_pdf[2],
        );
        assert_eq!((found.tokens, found.accuracy_per_loop), (4, vec![0.5, 0.25, 0.25]));
    }

    #[test]
    fn what_does_not_count_leaves_no_trace() {
        let all = measures();
        let mut sums = DepthSums::new(&SETTINGS, &[0.5]);
        sums.add(&all, 4, |token| token != 2);
        let keep = |at: &usize| at % 4 != 2;
        let fewer = TokenMeasures {
            losses: (0..12).filter(keep).map(|at| all.losses[at]).collect(),
            gates: (0..12).filter(keep).map(|at| all.gates[at]).collect(),
            hits: (0..12).filter(keep).map(|at| all.hits[at]).collect(),
        };
        let mut other = DepthSums::new(&SETTINGS, &[0.5]);
        other.add(&fewer, 3, |_| true);
        assert_eq!(sums.report(), other.report());
        assert_eq!(DepthSums::new(&SETTINGS, &[]).report(), None);
    }

    #[test]
    fn a_curve_without_a_sequence_is_that_of_the_others() {
        let thresholds = [0.0, 0.4, 0.7, 1.0];
        let all = measures();
        let mut sums = DepthSums::new(&SETTINGS, &thresholds);
        sums.add(&all, 2, |token| token != 3);
        let found = sums.report().unwrap();
        assert_eq!(found.sequences(), 2);
        for (left_out, kept) in [(0, 2..3), (1, 0..2)] {
            let mut others = DepthSums::new(&SETTINGS, &thresholds);
            others.add(&all, 4, |token| kept.contains(&token));
            let others = others.report().unwrap();
            let curve = found.curve_without(left_out).unwrap();
            assert_eq!(curve.len(), thresholds.len());
            for ((depth, loss), exact) in curve.into_iter().zip(&others.quality) {
                assert!((depth - exact.mean_depth).abs() < 1e-12);
                assert!((loss - exact.loss).abs() < 1e-12);
            }
        }
        assert_eq!(found.curve_without(2), None);
        let mut one = DepthSums::new(&SETTINGS, &thresholds);
        one.add(&all, 2, |token| token < 2);
        let one = one.report().unwrap();
        assert_eq!((one.sequences(), one.curve_without(0)), (1, None), "there is no other");
    }

    #[test]
    fn the_curve_goes_from_the_first_loop_to_the_last() {
        let mut sums = DepthSums::new(&SETTINGS, &[0.0, 0.5, 1.0]);
        sums.add(&measures(), 2, |_| true);
        let found = sums.report().unwrap();
        let [first, middle, last] = found.quality[..] else { panic!("{found:?}") };
        assert_eq!((first.mean_depth, last.mean_depth), (1.0, 3.0));
        assert!((1.0..=3.0).contains(&middle.mean_depth));
        for (quality, t) in [(first, 0), (last, 2)] {
            assert!((quality.loss - found.loss_per_loop[t]).abs() < 1e-12);
            assert_eq!(quality.accuracy, found.accuracy_per_loop[t]);
        }
    }
}
