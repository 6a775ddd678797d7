//! The exit distribution and the losses of both stages, in closed form.
//!
//! Per token and loop t = 1..R, with gate logit g_t and lambda_t = sigmoid(g_t):
//! p(t) = lambda_t prod_{j<t} (1 - lambda_j) for t < R, and p(R) takes the rest. The loss is
//! sum_t p(t) L_t - beta H(p), averaged over tokens (Ouro, arXiv 2510.25741, section 3). Logs come
//! from softplus, so no probability is ever clamped:
//! ln lambda = -softplus(-g), ln(1 - lambda) = -softplus(g).
//!
//! With a_t = L_t + beta ln p(t), the gradients are dL_t = p(t) and
//! dg_t = (1 - lambda_t) p(t) a_t - lambda_t sum_{s>t} p(s) a_s for t < R, and 0 for t = R.
//!
//! Stage II trains the gate alone: see [`stage_two`].

/// A loss over the tokens of a slot, and what it gives the gates.
#[derive(Clone, Debug, PartialEq)]
pub struct ExitLoss {
    /// Means over the tokens.
    pub statistics: SlotStatistics,
    /// Gradient of the mean loss with respect to each gate logit, `[R * N]`.
    pub dgates: Vec<f32>,
}

/// Means over the tokens of a slot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotStatistics {
    /// The loss that is trained by, of Stage I or II, in nats.
    pub loss: f64,
    /// Cross-entropy of each loop, in nats.
    pub loss_per_loop: Vec<f64>,
    /// Probability of each exit.
    pub exit_pdf: Vec<f64>,
    /// Entropy of the exit distribution, in nats.
    pub entropy: f64,
    /// Root mean square of a token's residual stream at the end of each loop, before its norm: the mean
    /// over tokens.
    pub hidden_rms_per_loop: Vec<f64>,
    /// Root mean square over tokens of the norm of the gradient of their summed losses with respect to
    /// a token's state after each loop; 0 where no gradient was taken.
    pub gradient_norm_per_loop: Vec<f64>,
    /// Share of the tokens whose likeliest successor after each loop is that after the last.
    pub agreement_per_loop: Vec<f64>,
}

impl SlotStatistics {
    /// The statistics with what loops are like beside their losses: from the stream's root mean squares
    /// and the likeliest successors of all tokens, `[R * N]` each, and the squared norms of the gradients
    /// of the slot's mean loss, summed over tokens, `[R]` or empty.
    pub(crate) fn with_loops(
        mut self,
        hidden_rms: impl Iterator<Item = f64>,
        likeliest: &[u32],
        gradient_squares: &[f64],
    ) -> Self {
        let loops = self.loss_per_loop.len();
        let tokens = likeliest.len() / loops.max(1);
        let hidden_rms: Vec<f64> = hidden_rms.collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / tokens as f64;
        self.hidden_rms_per_loop = hidden_rms.chunks(tokens).map(mean).collect();
        let last = &likeliest[likeliest.len() - tokens..];
        let agreement = |own: &[u32]| {
            own.iter().zip(last).filter(|(own, last)| own == last).count() as f64 / tokens as f64
        };
        self.agreement_per_loop = likeliest.chunks(tokens).map(agreement).collect();
        self.gradient_norm_per_loop =
            gradient_squares.iter().map(|squares| (tokens as f64 * squares).sqrt()).collect();
        self.gradient_norm_per_loop.resize(loops, 0.0);
        self
    }
}

/// `ln(1 + e^x)` without overflow or cancellation.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Natural logs of the exit distribution of one token, from its gate logits.
pub fn log_exit_pdf(gates: &[f64], out: &mut Vec<f64>) {
    out.clear();
    let mut log_stay = 0.0;
    for (t, &gate) in gates.iter().enumerate() {
        if t + 1 == gates.len() {
            out.push(log_stay);
        } else {
            out.push(log_stay - softplus(-gate));
            log_stay -= softplus(gate);
        }
    }
}

/// The loop after which a token exits, counted from 0: the first one at which the exit distribution of
/// its gate logits `[R]` has summed up to `threshold` (Q-exit, Ouro, section 3.2); the last one has all
/// of it.
#[must_use]
pub fn exit_loop(gates: &[f32], threshold: f64) -> usize {
    has_exited(gates.split_last().map_or(&[], |(_, before)| before), threshold)
        .unwrap_or(gates.len().saturating_sub(1))
}

/// The same, as far as the gates of the first loops say, none of which is the last. All of the
/// distribution is there after the last loop alone, however near to it rounding comes before.
pub(crate) fn has_exited(gates: &[f32], threshold: f64) -> Option<usize> {
    let mut log_stay = 0.0;
    gates.iter().position(|gate| {
        log_stay -= softplus(f64::from(*gate));
        threshold < 1.0 && -f64::exp_m1(log_stay) >= threshold
    })
}

/// Calls `with` for each of N tokens with its number and its gate logits, from `[R * N]`.
fn for_each_token(gates: &[f32], loops: usize, mut with: impl FnMut(usize, &[f64])) {
    let tokens = gates.len() / loops.max(1);
    let mut own = vec![0.0; loops];
    for token in 0..tokens {
        for (t, gate) in own.iter_mut().enumerate() {
            *gate = f64::from(gates[t * tokens + token]);
        }
        with(token, &own);
    }
}

/// Gradient of the mean loss with respect to each loop's cross-entropy, p(t) / N: from gate logits
/// `[R * N]`, loop after loop, in the same order. It does not depend on the cross-entropies.
#[must_use]
pub fn exit_shares(gates: &[f32], loops: usize) -> Vec<f32> {
    let tokens = gates.len() / loops.max(1);
    let mut shares = vec![0.0; gates.len()];
    let mut log_pdf = Vec::with_capacity(loops);
    for_each_token(gates, loops, |token, gates| {
        log_exit_pdf(gates, &mut log_pdf);
        for (t, log_p) in log_pdf.iter().enumerate() {
            shares[t * tokens + token] = (log_p.exp() / tokens as f64) as f32;
        }
    });
    shares
}

/// The Stage I loss of N tokens from cross-entropies and gate logits, `[R * N]` each, loop after
/// loop; `entropy_weight` is beta.
#[must_use]
pub fn stage_one(losses: &[f32], gates: &[f32], loops: usize, entropy_weight: f64) -> ExitLoss {
    let tokens = losses.len() / loops.max(1);
    let mut statistics = SlotStatistics {
        loss_per_loop: vec![0.0; loops],
        exit_pdf: vec![0.0; loops],
        ..SlotStatistics::default()
    };
    let mut dgates = vec![0.0; gates.len()];
    let share = 1.0 / tokens as f64;
    let mut log_pdf = Vec::with_capacity(loops);
    for_each_token(gates, loops, |token, gate| {
        log_exit_pdf(gate, &mut log_pdf);
        // From the last loop to the first, so that sum_{s>t} p(s) a_s is at hand.
        let mut later = 0.0;
        for t in (0..loops).rev() {
            let (log_p, loss) = (log_pdf[t], f64::from(losses[t * tokens + token]));
            let p = log_p.exp();
            let a = loss + entropy_weight * log_p;
            statistics.loss += p * a;
            statistics.loss_per_loop[t] += loss;
            statistics.exit_pdf[t] += p;
            statistics.entropy -= p * log_p;
            if t + 1 < loops {
                let exit = (-softplus(-gate[t])).exp();
                let stay = (-softplus(gate[t])).exp();
                let dgate = share * (stay * p * a - exit * later);
                dgates[t * tokens + token] = dgate as f32;
            }
            later += p * a;
        }
    });
    statistics.loss *= share;
    statistics.entropy *= share;
    for sum in statistics.loss_per_loop.iter_mut().chain(&mut statistics.exit_pdf) {
        *sum *= share;
    }
    ExitLoss { statistics, dgates }
}

/// Steepness of the Stage II labels, k (Ouro, section 3.4).
pub(crate) const LABEL_SLOPE: f64 = 50.0;
/// Improvement at which a label is one half, gamma, in nats.
pub(crate) const LABEL_MARGIN: f64 = 0.005;

/// The Stage II loss of N tokens, from cross-entropies and gate logits as [`stage_one`] takes them: how
/// well the gate after loop t says whether that loop has helped (Ouro, section 3.4). With the
/// improvement I = max(0, L_{t-1} - L_t), which has no gradient, and the label
/// w = sigmoid(k (I - gamma)), it is
/// -1/R sum_{t=2..R} mean_i [w ln(1 - lambda_t) + (1 - w) ln lambda_t],
/// with the gradient dg_t = (lambda_t - (1 - w)) / (R N). The first gate has no label. Of the
/// statistics, the loss is this one; the others are those of Stage I.
#[must_use]
pub fn stage_two(losses: &[f32], gates: &[f32], loops: usize) -> ExitLoss {
    let ExitLoss { mut statistics, mut dgates } = stage_one(losses, gates, loops, 0.0);
    dgates.fill(0.0);
    statistics.loss = 0.0;
    let tokens = losses.len() / loops.max(1);
    let share = 1.0 / (loops * tokens) as f64;
    for (at, dgate) in dgates.iter_mut().enumerate().skip(tokens) {
        let gate = f64::from(gates[at]);
        let better = f64::from(losses[at - tokens]) - f64::from(losses[at]);
        let label = LABEL_SLOPE * (better.max(0.0) - LABEL_MARGIN);
        let (stay, leave) = ((-softplus(-label)).exp(), (-softplus(label)).exp());
        statistics.loss += share * (stay * softplus(gate) + leave * softplus(-gate));
        *dgate = (share * ((-softplus(-gate)).exp() - leave)) as f32;
    }
    ExitLoss { statistics, dgates }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses and gates of 4 loops and 6 tokens.
    fn case() -> (Vec<f32>, Vec<f32>) {
        let value = |t: usize, i: usize| ((t * 5 + i) as f32 * 1.7).sin();
        let all = |f: &dyn Fn(usize, usize) -> f32| (0..24).map(|at| f(at / 6, at % 6)).collect();
        (all(&|t, i| 3.0 + value(t, i)), all(&|t, i| 2.0 * value(i, t + 3)))
    }

    #[test]
    fn gradients_are_the_slopes_of_the_loss() {
        let (losses, gates) = case();
        let loss = |losses: &[f32], gates: &[f32]| stage_one(losses, gates, 4, 0.1).statistics.loss;
        let found = [exit_shares(&gates, 4), stage_one(&losses, &gates, 4, 0.1).dgates];
        let h = 1.0 / 64.0; // a power of two: adding it to an f32 here is exact enough
        for (which, found) in found.iter().enumerate() {
            for (at, grad) in found.iter().enumerate() {
                let moved = |by: f32| {
                    let (mut losses, mut gates) = (losses.clone(), gates.clone());
                    [&mut losses, &mut gates][which][at] += by;
                    loss(&losses, &gates)
                };
                let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                let error = (slope - f64::from(*grad)).abs();
                assert!(error < 2e-5, "{which} {at}: {slope} against {grad}");
            }
        }
    }

    #[test]
    fn a_gate_is_told_whether_its_loop_has_helped() {
        let (losses, gates) = case();
        let found = stage_two(&losses, &gates, 4);
        let loss = |gates: &[f32]| stage_two(&losses, gates, 4).statistics.loss;
        let h = 1.0 / 64.0;
        for (at, grad) in found.dgates.iter().enumerate() {
            let moved = |by: f32| {
                let mut gates = gates.clone();
                gates[at] += by;
                loss(&gates)
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
            assert!((slope - f64::from(*grad)).abs() < 2e-5, "{at}: {slope} against {grad}");
        }
        assert!(found.dgates[..6].iter().all(|grad| *grad == 0.0), "the first has no label");
        // No help, much help: go, stay. The best lambda without help is 1 - sigmoid(-0.25).
        let with = |second: f32| stage_two(&[2.0, second], &[0.0, 0.0], 2).dgates[1];
        assert!(with(2.0) < 0.0 && with(3.0) == with(2.0) && with(1.0) > 0.24, "{}", with(1.0));
        assert!((f64::from(with(2.0)) - 0.5 * (0.5 - 0.562_176_5)).abs() < 1e-6);
        assert_eq!(
            found.statistics.exit_pdf,
            stage_one(&losses, &gates, 4, 0.05).statistics.exit_pdf
        );
    }

    #[test]
    fn an_even_gate_halves_what_is_left() {
        let found = stage_one(&[1.0; 8], &[0.0; 8], 4, 0.0);
        for (found, exact) in found.statistics.exit_pdf.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((found - exact).abs() < 1e-15);
        }
        assert!((found.statistics.entropy - 1.213).abs() < 1e-3);
        assert!((found.statistics.loss - 1.0).abs() < 1e-12);
    }

    #[test]
    fn saturated_gates_stay_finite() {
        for gate in [-1e4f32, -90.0, 90.0, 1e4] {
            let found = stage_one(&[2.0; 3], &[gate; 3], 3, 0.05);
            assert!(found.statistics.loss.is_finite() && found.statistics.entropy.is_finite());
            assert!(found.dgates.iter().all(|grad| grad.is_finite()));
            assert!((found.statistics.exit_pdf.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_token_exits_where_the_distribution_has_summed_up_to_the_threshold() {
        // p = 1/2, 1/4, 1/8, 1/8.
        for (threshold, loop_) in [(0.0, 0), (0.5, 0), (0.51, 1), (0.75, 1), (0.8, 2), (0.9, 3)] {
            assert_eq!(exit_loop(&[0.0; 4], threshold), loop_, "{threshold}");
        }
        assert_eq!(exit_loop(&[0.0; 4], 1.0), 3, "all of it is there after the last loop alone");
        assert_eq!(exit_loop(&[-3.0, 90.0, 0.0], 1.0), 2);
        assert_eq!(exit_loop(&[-3.0, 90.0, 0.0], 0.999), 1);
        assert_eq!(exit_loop(&[5.0], 0.3), 0, "the only loop");
    }

    #[test]
    fn the_last_gate_has_no_gradient() {
        let (losses, gates) = case();
        let found = stage_one(&losses, &gates, 4, 0.05).dgates;
        assert!(found[18..].iter().all(|&grad| grad == 0.0));
        assert!(found[..18].iter().all(|&grad| grad != 0.0));
    }
}
