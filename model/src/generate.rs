//! Text generation, one token at a time.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use rayon::ThreadPool;

use crate::cpu::{Cache, Decoded, Weights};
use crate::exit::{exit_loop, has_exited};
use crate::{CacheSharing, Engine, StageSettings};

/// After which loop a token's logits are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Exit {
    /// After the last one.
    Last,
    /// After the first one at which the token's exit distribution has summed up to this.
    Threshold(f64),
}

/// How to draw the next token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate at most.
    pub tokens: usize,
    /// Softmax temperature; 0 takes the most likely token.
    pub temperature: f64,
    /// Draw from so many of the most likely tokens; 0 for all.
    pub top_k: usize,
    /// Draw from the fewest most likely tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens of context at most, such as the trained sequence length. Where there are more, the older
    /// half is forgotten.
    pub context: usize,
    /// Generation ends at any of these tokens, which are not part of the result.
    pub stop: Vec<u32>,
    /// Ids at and above this one are never drawn: rows of the vocabulary without a token.
    pub vocabulary: usize,
    /// After which loop a token's logits are taken.
    pub exit: Exit,
    /// Whose keys and values loops read.
    pub sharing: CacheSharing,
    /// The last token of a document, for models that have learned to see nothing of the document
    /// before.
    pub document_end: Option<u32>,
}

/// What was generated, and what it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Loops after which logits were taken, a new token on average, and one that ended it.
    pub mean_depth: f64,
    /// Loops that were computed, a new token on average.
    pub mean_loops: f64,
    /// Bytes of keys and values at the end.
    pub cache_bytes: usize,
    /// What the prompt took.
    pub prompt_time: Duration,
    /// What the new tokens took.
    pub time: Duration,
}

/// A sequence under way, with a cache of keys and values; see [`Engine::decoder`].
pub struct Decoder<'e> {
    pub(crate) weights: &'e Weights,
    pub(crate) pool: &'e ThreadPool,
    pub(crate) cache: Cache,
}

/// The logits of a token's successor.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    /// `[vocab]`.
    pub logits: Vec<f32>,
    /// The loop that they were taken after, counted from 0.
    pub exit: usize,
    /// Loops that were computed.
    pub loops: usize,
}

impl Decoder<'_> {
    /// Takes tokens behind those that are there, the prompt first; what comes after the last of them.
    /// With a cache that loops share, further tokens come one by one, and only the loops up to a
    /// token's exit are computed; with one of each loop all of them are, for later tokens to read.
    ///
    /// # Panics
    /// If there is no token, no room, or an id is outside the vocabulary.
    pub fn extend(&mut self, ids: &[u32], exit: Exit) -> Next {
        let (pool, weights) = (self.pool, self.weights);
        pool.install(|| {
            let is_enough = |gates: &[f32]| match exit {
                Exit::Last => false,
                Exit::Threshold(threshold) => has_exited(gates, threshold).is_some(),
            };
            let Decoded { states, gates } = self.cache.extend(weights, ids, &is_enough);
            let exit = match exit {
                Exit::Last => gates.len() - 1,
                Exit::Threshold(threshold) => exit_loop(&gates, threshold),
            };
            let d = states.len() / gates.len();
            let logits = weights.logits(&states[exit * d..(exit + 1) * d]);
            Next { logits, exit, loops: gates.len() }
        })
    }

    /// Tokens that are there.
    #[must_use]
    pub fn length(&self) -> usize {
        self.cache.length()
    }

    /// Bytes of the keys and values of the tokens that are there.
    #[must_use]
    pub fn cache_bytes(&self) -> usize {
        self.cache.length() * self.cache.token_bytes()
    }

    /// Has tokens see nothing of the document before theirs; `end` is the last token of a document.
    pub fn end_documents_with(&mut self, end: u32) {
        self.cache.end_documents_with(end);
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.cache.clear();
    }
}

/// Continues `prompt`; calls `on_token` with each new token, until it breaks.
///
/// # Panics
/// If no weights are loaded, the prompt is empty or has an id outside the vocabulary, or there is no
/// context.
pub fn generate(
    engine: &Engine,
    settings: &StageSettings,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Generated {
    assert!(!prompt.is_empty() && sampling.context > 0, "generation continues at least one token");
    let mut stream = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut tokens = prompt.to_vec();
    let needed = prompt.len().saturating_add(sampling.tokens).min(sampling.context);
    let mut decoder = engine.decoder(settings, needed, sampling.sharing);
    if let Some(end) = sampling.document_end {
        decoder.end_documents_with(end);
    }
    let begin = Instant::now();
    let mut next = decoder.extend(&prompt[prompt.len().saturating_sub(needed)..], sampling.exit);
    let prompt_time = begin.elapsed();
    let (mut drawn, mut depths, mut loops) = (0, 0, 0);
    while drawn < sampling.tokens {
        drawn += 1;
        depths += next.exit + 1;
        loops += next.loops;
        next.logits.truncate(sampling.vocabulary);
        let token = draw(&next.logits, sampling, &mut stream);
        if sampling.stop.contains(&token) {
            break;
        }
        tokens.push(token);
        if on_token(token).is_break() || drawn == sampling.tokens {
            break;
        }
        next = if decoder.length() < needed {
            decoder.extend(&[token], sampling.exit)
        } else {
            decoder.clear();
            decoder.extend(&tokens[tokens.len() - needed.div_ceil(2)..], sampling.exit)
        };
    }
    let per_token = |sum: usize| sum as f64 / drawn.max(1) as f64;
    Generated {
        tokens: tokens.split_off(prompt.len()),
        mean_depth: per_token(depths),
        mean_loops: per_token(loops),
        cache_bytes: decoder.cache_bytes(),
        prompt_time,
        time: begin.elapsed() - prompt_time,
    }
}

/// Draws an index with probability proportional to `exp(logit / temperature)`, among the most likely.
fn draw(logits: &[f32], sampling: &Sampling, stream: &mut ChaCha8Rng) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    if sampling.temperature == 0.0 {
        return best as u32;
    }
    let lead = |index: usize| f64::from(logits[index]) - f64::from(logits[best]);
    let weight = |index: usize| (lead(index) / sampling.temperature).exp();
    let mut among: Vec<usize> = (0..logits.len()).collect();
    let all = sampling.top_k == 0 || sampling.top_k >= among.len();
    if !all || sampling.top_p < 1.0 {
        among.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if !all {
            among.truncate(sampling.top_k);
        }
        let enough = sampling.top_p * among.iter().map(|&index| weight(index)).sum::<f64>();
        let mut sum = 0.0;
        let last = among.iter().position(|&index| {
            sum += weight(index);
            sum >= enough
        });
        among.truncate(last.map_or(among.len(), |last| last + 1));
    }
    let total: f64 = among.iter().map(|&index| weight(index)).sum();
    let unit = (stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = unit * total;
    for &index in &among {
        left -= weight(index);
        if left < 0.0 {
            return index as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use looptrain_proto::spec::{self, Objective};

    use super::*;
    use crate::{Layout, TrainState};

    fn sampling(tokens: usize) -> Sampling {
        Sampling {
            tokens,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 3,
            context: 1 << 20,
            stop: Vec::new(),
            vocabulary: usize::MAX,
            exit: Exit::Last,
            sharing: CacheSharing::Full,
            document_end: None,
        }
    }

    fn model() -> spec::Model {
        spec::Model {
            hidden_size: 32,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            intermediate_size: 40,
            vocab_size: 53,
            rms_norm_eps: 1e-6,
            initializer_range: 0.2,
        }
    }

    const SETTINGS: StageSettings = StageSettings {
        loops: 3,
        entropy_weight: 0.05,
        rope_base: 1e4,
        objective: Objective::Language,
    };

    fn engine() -> Engine {
        let (model, layout) = (model(), Layout::new(&model()));
        let weights = TrainState::initial(&model, 3).weights;
        let mut engine = Engine::new(&model, 2);
        for (index, tensor) in layout.tensors().iter().enumerate() {
            engine.load_tensor(index, &weights[tensor.range()]);
        }
        engine
    }

    fn prompt(length: usize) -> Vec<u32> {
        (0..length).map(|at| ((at * 7 + at * at) % 53) as u32).collect()
    }

    fn go(engine: &Engine, prompt: &[u32], sampling: &Sampling) -> Generated {
        generate(engine, &SETTINGS, prompt, sampling, &mut |_| ControlFlow::Continue(()))
    }

    /// Logits after each loop, computed anew from all tokens.
    fn uncached(engine: &Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
        let states = engine.states(&SETTINGS, tokens);
        let last = |r: usize| ((r + 1) * tokens.len() - 1) * 32..(r + 1) * tokens.len() * 32;
        (0..SETTINGS.loops).map(|r| engine.logits(&states[last(r)])).collect()
    }

    #[test]
    fn a_decoder_with_a_cache_gives_the_bits_of_one_without() {
        let engine = engine();
        // Over several chunks, tiles and panels.
        let tokens = prompt(600);
        for first in [1, 5, 300, 513] {
            let mut decoder = engine.decoder(&SETTINGS, 600, CacheSharing::Full);
            let mut next = decoder.extend(&tokens[..first], Exit::Last);
            for length in first..first + 60 {
                assert!(next.logits == uncached(&engine, &tokens[..length])[2], "{first} {length}");
                next = decoder.extend(&tokens[length..=length], Exit::Last);
            }
            let rest = decoder.extend(&tokens[first + 60..first + 80], Exit::Last);
            assert!(rest.logits == uncached(&engine, &tokens[..first + 80])[2], "{first}");
        }
    }

    #[test]
    fn a_document_is_decoded_as_if_there_were_none_before_it() {
        let engine = engine();
        let (before, tokens) = (prompt(290), prompt(60));
        let alone = uncached(&engine, &tokens).swap_remove(2);
        for first in [291, 300] {
            let mut decoder = engine.decoder(&SETTINGS, 400, CacheSharing::Full);
            decoder.end_documents_with(52);
            let all = [&before[..], &[52], &tokens].concat();
            decoder.extend(&all[..first], Exit::Last);
            let next = decoder.extend(&all[first..], Exit::Last);
            let off = next.logits.iter().zip(&alone).map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-4, "{first}");
            // What is forgotten takes its documents with it.
            decoder.clear();
            assert!(decoder.extend(&tokens, Exit::Last).logits == alone);
        }
        assert!(!before.contains(&52) && !tokens.contains(&52));
    }

    #[test]
    fn a_token_that_exits_early_has_the_logits_of_that_loop() {
        let engine = engine();
        let mut seen = [false; 3];
        for threshold in [0.3, 0.6, 0.8, 0.95] {
            let mut decoder = engine.decoder(&SETTINGS, 40, CacheSharing::Full);
            for length in 1..40 {
                let tokens = &prompt(length)[length - 1..];
                let next = decoder.extend(tokens, Exit::Threshold(threshold));
                assert!(next.logits == uncached(&engine, &prompt(length))[next.exit], "{length}");
                assert_eq!(next.loops, 3);
                seen[next.exit] = true;
            }
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn a_shared_cache_takes_a_loop_th_of_the_memory_and_changes_no_prompt() {
        let engine = engine();
        let tokens = prompt(20);
        let full = engine.decoder(&SETTINGS, 30, CacheSharing::Full).extend(&tokens, Exit::Last);
        let mut after = Vec::new();
        for sharing in [CacheSharing::Full, CacheSharing::Last, CacheSharing::Averaged] {
            let mut decoder = engine.decoder(&SETTINGS, 30, sharing);
            assert_eq!(decoder.extend(&tokens, Exit::Last), full, "{sharing:?}");
            let loops = if sharing == CacheSharing::Full { 3 } else { 1 };
            assert_eq!(decoder.cache_bytes(), 20 * loops * 2 * 2 * 32 * 4);
            after.push(decoder.extend(&[7], Exit::Last).logits);
            // Its loops are not computed any more.
            let early = decoder.extend(&[9], Exit::Threshold(0.0));
            assert_eq!((early.exit, early.loops), (0, loops));
        }
        assert!(after[0] != after[1] && after[1] != after[2] && after[0] != after[2]);
    }

    #[test]
    fn with_one_loop_there_is_nothing_to_share() {
        let engine = engine();
        let settings = StageSettings { loops: 1, ..SETTINGS };
        let logits =
            [CacheSharing::Full, CacheSharing::Last, CacheSharing::Averaged].map(|sharing| {
                let mut decoder = engine.decoder(&settings, 30, sharing);
                decoder.extend(&prompt(9), Exit::Last);
                decoder.extend(&[5], Exit::Last);
                decoder.extend(&[6], Exit::Last).logits
            });
        assert!(logits[0] == logits[1] && logits[1] == logits[2]);
    }

    #[test]
    fn generation_stops_where_it_is_told_to_and_slides_when_the_context_is_full() {
        let engine = engine();
        let free = go(&engine, &prompt(4), &sampling(30)).tokens;
        assert_eq!(free.len(), 30);
        assert_eq!(go(&engine, &prompt(4), &sampling(30)).tokens, free, "one seed, one text");
        let stop = free[10];
        let first = free.iter().position(|token| *token == stop).unwrap_or(0);
        let stopped = go(&engine, &prompt(4), &Sampling { stop: vec![stop], ..sampling(30) });
        assert_eq!(stopped.tokens, free[..first]);
        let mut heard = Vec::new();
        let broken = generate(&engine, &SETTINGS, &prompt(4), &sampling(30), &mut |token| {
            heard.push(token);
            if heard.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(broken.tokens == free[..3] && heard == free[..3]);

        let narrow = Sampling { context: 8, temperature: 0.0, ..sampling(30) };
        let slid = go(&engine, &prompt(4), &narrow);
        let all = [prompt(4), slid.tokens.clone()].concat();
        // Eight tokens are there before the fifth of them is drawn: then the last four begin anew.
        let logits = &uncached(&engine, &all[5..9])[2];
        let best = (0..53).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        assert_eq!(Some(all[9] as usize), best);
        assert!(slid.cache_bytes <= 8 * 3 * 2 * 2 * 32 * 4);
    }

    #[test]
    fn draws_follow_the_softmax_and_temperature_zero_takes_the_best() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let mut stream = ChaCha8Rng::seed_from_u64(3);
        let cold = Sampling { temperature: 0.0, ..sampling(1) };
        assert_eq!(draw(&logits, &cold, &mut stream), 2);
        let cases = [
            (sampling(1), [true, true, true, false]),
            (Sampling { top_k: 2, ..sampling(1) }, [false, true, true, false]),
            (Sampling { top_k: 9, ..sampling(1) }, [true, true, true, false]),
            (Sampling { top_p: 0.7, ..sampling(1) }, [false, true, true, false]),
            (Sampling { top_p: 0.6, ..sampling(1) }, [false, false, true, false]),
            (Sampling { top_k: 2, top_p: 0.72, ..sampling(1) }, [false, false, true, false]),
        ];
        for (sampling, kept) in cases {
            let mut counts = [0u32; 4];
            for _ in 0..20_000 {
                counts[draw(&logits, &sampling, &mut stream) as usize] += 1;
            }
            let weight = |at: usize| if kept[at] { f64::from(logits[at]).exp() } else { 0.0 };
            let total: f64 = (0..4).map(weight).sum();
            for (at, count) in counts.into_iter().enumerate() {
                let expected = weight(at) / total;
                let found = f64::from(count) / 20_000.0;
                assert!((found - expected).abs() < 0.015, "{sampling:?} {counts:?}");
            }
        }
    }
}
