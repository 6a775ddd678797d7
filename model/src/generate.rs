//! Text generation from the last loop, one token at a time.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use looptrain_proto::spec;

use crate::{Engine, StageSettings};

/// How to draw the next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate at most.
    pub tokens: usize,
    /// Softmax temperature; 0 takes the most likely token.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens of context at most; the trained sequence length.
    pub context: usize,
    /// Generation ends at this token, which is not part of the result.
    pub stop: u32,
    /// Ids at and above this one are never drawn: rows of the vocabulary without a token.
    pub vocabulary: usize,
}

/// Continues `prompt` and returns the new tokens. The whole context is computed anew for each
/// token.
///
/// # Panics
/// If the prompt is empty or has an id outside the vocabulary.
#[must_use]
pub fn generate(
    model: &spec::Model,
    weights: &[f32],
    settings: &StageSettings,
    prompt: &[u32],
    sampling: &Sampling,
) -> Vec<u32> {
    assert!(!prompt.is_empty(), "generation continues at least one token");
    let mut engine =
        Engine::new(model, std::thread::available_parallelism().map_or(1, usize::from));
    engine.load(weights);
    let mut stream = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut tokens = prompt.to_vec();
    for _ in 0..sampling.tokens {
        let context = &tokens[tokens.len().saturating_sub(sampling.context)..];
        let states = engine.states(settings, context);
        let logits = engine.logits(&states[states.len() - model.hidden_size..]);
        let usable = &logits[..sampling.vocabulary.min(logits.len())];
        let token = draw(usable, sampling.temperature, &mut stream);
        if token == sampling.stop {
            break;
        }
        tokens.push(token);
    }
    tokens.split_off(prompt.len())
}

/// Draws an index with probability proportional to `exp(logit / temperature)`.
fn draw(logits: &[f32], temperature: f64, stream: &mut ChaCha8Rng) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    if temperature == 0.0 {
        return best as u32;
    }
    let weight = |logit: f32| ((f64::from(logit) - f64::from(logits[best])) / temperature).exp();
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let unit = (stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = unit * total;
    for (index, &logit) in logits.iter().enumerate() {
        left -= weight(logit);
        if left < 0.0 {
            return index as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax_and_temperature_zero_takes_the_best() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let mut stream = ChaCha8Rng::seed_from_u64(3);
        assert_eq!(draw(&logits, 0.0, &mut stream), 2);
        let mut counts = [0u32; 4];
        for _ in 0..20_000 {
            counts[draw(&logits, 1.0, &mut stream) as usize] += 1;
        }
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = f64::from(logit).exp() / total;
            assert!((f64::from(*count) / 20_000.0 - expected).abs() < 0.015, "{counts:?}");
        }
    }
}
