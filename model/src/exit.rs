//! The exit distribution and the Stage I loss, in closed form.
//!
//! Per token and loop t = 1..R, with gate logit g_t and lambda_t = sigmoid(g_t):
//! p(t) = lambda_t prod_{j<t} (1 - lambda_j) for t < R, and p(R) takes the rest. The loss is
//! sum_t p(t) L_t - beta H(p), averaged over tokens (Ouro, arXiv 2510.25741, section 3). Logs come
//! from softplus, so no probability is ever clamped:
//! ln lambda = -softplus(-g), ln(1 - lambda) = -softplus(g).
//!
//! With a_t = L_t + beta ln p(t), the gradients are dL_t = p(t) and
//! dg_t = (1 - lambda_t) p(t) a_t - lambda_t sum_{s>t} p(s) a_s for t < R, and 0 for t = R.

/// Values and gradients of the Stage I loss over the tokens of a slot.
#[derive(Clone, Debug, PartialEq)]
pub struct StageOne {
    /// Means over the tokens.
    pub statistics: SlotStatistics,
    /// Gradient of the mean loss with respect to each loop's cross-entropy, `[R][N]`.
    pub dloss: Vec<Vec<f32>>,
    /// Gradient of the mean loss with respect to each gate logit, `[R][N]`.
    pub dgate: Vec<Vec<f32>>,
}

/// Means over the tokens of a slot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotStatistics {
    /// Stage I loss, in nats.
    pub loss: f64,
    /// Cross-entropy of each loop, in nats.
    pub loss_per_loop: Vec<f64>,
    /// Probability of each exit.
    pub exit_pdf: Vec<f64>,
    /// Entropy of the exit distribution, in nats.
    pub entropy: f64,
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

/// The Stage I loss of N tokens from cross-entropies and gate logits `[R][N]`; `entropy_weight` is
/// beta.
#[must_use]
pub fn stage_one(losses: &[Vec<f32>], gates: &[Vec<f32>], entropy_weight: f64) -> StageOne {
    let (loops, tokens) = (losses.len(), losses.first().map_or(0, Vec::len));
    let mut statistics = SlotStatistics {
        loss_per_loop: vec![0.0; loops],
        exit_pdf: vec![0.0; loops],
        ..SlotStatistics::default()
    };
    let mut dloss = vec![vec![0.0; tokens]; loops];
    let mut dgate = vec![vec![0.0; tokens]; loops];
    let share = 1.0 / tokens as f64;
    let (mut gate, mut log_pdf) = (vec![0.0; loops], Vec::with_capacity(loops));
    for token in 0..tokens {
        for (gate, logits) in gate.iter_mut().zip(gates) {
            *gate = f64::from(logits[token]);
        }
        log_exit_pdf(&gate, &mut log_pdf);
        // From the last loop to the first, so that sum_{s>t} p(s) a_s is at hand.
        let mut later = 0.0;
        for t in (0..loops).rev() {
            let (log_p, loss) = (log_pdf[t], f64::from(losses[t][token]));
            let p = log_p.exp();
            let a = loss + entropy_weight * log_p;
            statistics.loss += p * a;
            statistics.loss_per_loop[t] += loss;
            statistics.exit_pdf[t] += p;
            statistics.entropy -= p * log_p;
            dloss[t][token] = (share * p) as f32;
            if t + 1 < loops {
                let exit = (-softplus(-gate[t])).exp();
                let stay = (-softplus(gate[t])).exp();
                dgate[t][token] = (share * (stay * p * a - exit * later)) as f32;
            }
            later += p * a;
        }
    }
    statistics.loss *= share;
    statistics.entropy *= share;
    for sum in statistics.loss_per_loop.iter_mut().chain(&mut statistics.exit_pdf) {
        *sum *= share;
    }
    StageOne { statistics, dloss, dgate }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
        let value = |t: usize, i: usize| ((t * 5 + i) as f32 * 1.7).sin();
        let losses = (0..4).map(|t| (0..6).map(|i| 3.0 + value(t, i)).collect()).collect();
        let gates = (0..4).map(|t| (0..6).map(|i| 2.0 * value(i, t + 3)).collect()).collect();
        (losses, gates)
    }

    #[test]
    fn gradients_are_the_slopes_of_the_loss() {
        let (losses, gates) = case();
        let found = stage_one(&losses, &gates, 0.1);
        let loss =
            |losses: &[Vec<f32>], gates: &[Vec<f32>]| stage_one(losses, gates, 0.1).statistics.loss;
        let h = 1.0 / 64.0; // a power of two: adding it to an f32 here is exact enough
        for t in 0..4 {
            for i in 0..6 {
                for (which, grad) in [(0, found.dloss[t][i]), (1, found.dgate[t][i])] {
                    let moved = |by: f32| {
                        let (mut losses, mut gates) = (losses.clone(), gates.clone());
                        [&mut losses, &mut gates][which][t][i] += by;
                        loss(&losses, &gates)
                    };
                    let slope = (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                    let error = (slope - f64::from(grad)).abs();
                    assert!(error < 2e-5, "{which} {t} {i}: {slope} against {grad}");
                }
            }
        }
    }

    #[test]
    fn an_even_gate_halves_what_is_left() {
        let found = stage_one(&vec![vec![1.0; 2]; 4], &vec![vec![0.0; 2]; 4], 0.0);
        for (found, exact) in found.statistics.exit_pdf.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((found - exact).abs() < 1e-15);
        }
        assert!((found.statistics.entropy - 1.213).abs() < 1e-3);
        assert!((found.statistics.loss - 1.0).abs() < 1e-12);
    }

    #[test]
    fn saturated_gates_stay_finite() {
        for gate in [-1e4f32, -90.0, 90.0, 1e4] {
            let found = stage_one(&vec![vec![2.0]; 3], &vec![vec![gate]; 3], 0.05);
            assert!(found.statistics.loss.is_finite() && found.statistics.entropy.is_finite());
            assert!(found.dgate.iter().flatten().all(|grad| grad.is_finite()));
            assert!((found.statistics.exit_pdf.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_last_gate_has_no_gradient() {
        let (losses, gates) = case();
        assert!(stage_one(&losses, &gates, 0.05).dgate[3].iter().all(|&grad| grad == 0.0));
    }
}
