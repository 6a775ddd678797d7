//! Mano: modular arithmetic without scratch work, the task of the LoopLM paper (appendix B.2) that
//! tells models that can compute from models that can only recall.
//!
//! An exercise is a prefix expression over the integers modulo 23 (or another number) with `+`, `-` and
//! `*`, and its value: `<bos> <len_2> + 4 * 7 22 <ans> 20`. Training exercises have 1 to L operators, all
//! numbers equally likely; validation exercises have L. How the operators spread over an expression's sides is
//! not published: here every split is equally likely. No validation exercise is in the training split.
//!
//! An exercise is a pure function of its number, so that any machine makes any part of the dataset.

use looptrain_proto::{Digest, spec};
use serde_json::json;

use super::{Document, Raw, Record, Sink, Source};
use crate::{Error, Result};

/// The modulus of the paper.
const PAPER_MODULUS: u32 = 23;
/// The vocabulary has a token for each number below the modulus.
const MAX_MODULUS: u32 = 1024;
const OPERATORS: [&str; 3] = ["+", "-", "*"];
/// Operators of an expression at most: the vocabulary has a token for each number of them.
const MAX_OPERATORS: u32 = 1024;
/// One exercise of this many is for validation, by the hash of its text.
const HELD_ONE_OF: u64 = 64;
/// Validation exercises are looked for this many times as long as they should take.
const PATIENCE: u64 = 100;

/// What exercises to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mano {
    /// Operators of an expression at most, L.
    pub operators: u32,
    /// Numbers are counted modulo this.
    pub modulus: u32,
    /// Exercises of the training split.
    pub train: u64,
    /// Exercises of the validation split, of L operators each.
    pub validation: u64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Mano {
    /// The validation exercises, of which training has seen none.
    ///
    /// # Errors
    /// When there are no such exercises.
    pub fn held_out(&self) -> Result<Vec<String>> {
        // Of one operator there are few, so that the same ones come again and again.
        let exercises = Exercises(*self);
        let text =
            |number| match exercises.document(Record { file: 0, at: number, raw: Raw::Number })? {
                Document::Text { text, .. } => Ok(text),
                _ => unreachable!("an exercise is a text"),
            };
        (self.train + 1..=self.train + self.validation).map(text).collect()
    }

    /// The source that stands for these exercises in a manifest.
    #[must_use]
    pub fn options(&self, shard_tokens: u64) -> spec::Source {
        let Self { operators, modulus, train, validation, seed } = self;
        // What datasets said before there was another modulus than the paper's.
        let modulo = match *modulus {
            PAPER_MODULUS => String::new(),
            modulus => format!(" modulo {modulus}"),
        };
        let path = format!(
            "mano: {operators} operators{modulo}, {train} to train, {validation} to validate, seed {seed}"
        );
        spec::Source {
            paths: vec![path],
            extensions: Vec::new(),
            shard_tokens,
            validation_fraction: self.validation as f64 / (self.train + self.validation) as f64,
            ..spec::Source::default()
        }
    }

    /// The `tokenizer.json`: a token a word.
    pub(in super::super) fn tokenizer(&self) -> Vec<u8> {
        let numbers = (0..self.modulus).map(|number| number.to_string());
        let lengths = (1..=self.operators).map(|length| format!("<len_{length}>"));
        let words = ["<|endoftext|>", "<bos>", "<ans>"].into_iter().chain(OPERATORS);
        let words = words.map(str::to_owned).chain(numbers).chain(lengths);
        let vocabulary: serde_json::Map<_, _> =
            words.enumerate().map(|(id, word)| (word, id.into())).collect();
        let end = json!({
            "id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        });
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [end],
            "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" },
            "post_processor": null,
            "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>" },
        });
        serde_json::to_vec_pretty(&tokenizer).expect("words and numbers have a JSON form")
    }
}

/// The exercises as a source: those to train first, then those to validate.
pub(in super::super) struct Exercises(Mano);

impl Exercises {
    /// # Errors
    /// What is wrong with the numbers.
    pub(in super::super) fn new(mano: Mano) -> std::result::Result<Self, String> {
        if !(1..=MAX_OPERATORS).contains(&mano.operators) {
            return Err(format!("an expression has 1 to {MAX_OPERATORS} operators at most"));
        }
        if !(2..=MAX_MODULUS).contains(&mano.modulus) {
            return Err(format!("the modulus is from 2 to {MAX_MODULUS}"));
        }
        if mano.train == 0 || mano.validation == 0 {
            return Err("both splits need an exercise".to_owned());
        }
        // Of one operator there are 1,587 modulo 23, so that few of them could be held out.
        if mano.operators < 2 {
            return Err("with one operator there are too few exercises; write 2 or more".to_owned());
        }
        Ok(Self(mano))
    }

    /// The exercise of a number in its split, `None` when it is to be passed over.
    fn exercise(&self, held: bool, number: u64, attempt: u64) -> Option<String> {
        let mut draws = Draws::new(self.0.seed, held, number, attempt);
        let most = self.0.operators;
        let length = if held { most } else { 1 + draws.below(u64::from(most)) as u32 };
        let mut words = Vec::with_capacity(2 * length as usize + 1);
        let value = expression(&mut draws, u64::from(self.0.modulus), length, &mut words);
        let text = format!("<bos> <len_{length}> {} <ans> {value}", words.join(" "));
        (is_for_validation(&text) == held).then_some(text)
    }
}

/// Draws an expression and gives its value.
fn expression(draws: &mut Draws, modulus: u64, operators: u32, words: &mut Vec<String>) -> u64 {
    if operators == 0 {
        let number = draws.below(modulus);
        words.push(number.to_string());
        return number;
    }
    let operator = OPERATORS[draws.below(3) as usize];
    words.push(operator.to_owned());
    let left = draws.below(u64::from(operators)) as u32;
    let a = expression(draws, modulus, left, words);
    let b = expression(draws, modulus, operators - 1 - left, words);
    match operator {
        "+" => (a + b) % modulus,
        "-" => (a + modulus - b) % modulus,
        _ => a * b % modulus,
    }
}

fn is_for_validation(text: &str) -> bool {
    let hash = blake3::Hasher::new_derive_key("looptrain mano validation v1")
        .update(text.as_bytes())
        .finalize();
    u64::from(hash.as_bytes()[0]) % HELD_ONE_OF == 0
}

/// Draws that depend on nothing but what they are for.
struct Draws(blake3::OutputReader);

impl Draws {
    fn new(seed: u64, held: bool, number: u64, attempt: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("looptrain mano draws v1");
        for part in [seed, u64::from(held), number, attempt] {
            hasher.update(&part.to_le_bytes());
        }
        Self(hasher.finalize_xof())
    }

    /// A number below `end`, all equally likely but for less than `end` in 2^64.
    fn below(&mut self, end: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        ((u128::from(u64::from_le_bytes(bytes)) * u128::from(end)) >> 64) as u64
    }
}

impl Source for Exercises {
    fn files(&self) -> usize {
        1
    }

    fn bytes(&self, _: usize) -> u64 {
        self.0.train + self.0.validation
    }

    fn digest(&self) -> Digest {
        let Mano { operators, modulus, train, validation, seed } = self.0;
        let modulo = match modulus {
            PAPER_MODULUS => String::new(),
            modulus => format!(", modulus: {modulus}"),
        };
        // The bytes of the same exercises must not change with the program.
        let text = format!(
            "mano v1 Mano {{ operators: {operators}{modulo}, train: {train}, validation: {validation}, seed: {seed} }}"
        );
        Digest::of(text.as_bytes())
    }

    fn place(&self, _: usize) -> String {
        "mano".to_owned()
    }

    fn first(&self, from: u64) -> u64 {
        from.max(1)
    }

    fn read(&self, _: usize, from: u64, sink: &mut Sink<'_>) -> Result<()> {
        let bytes = 32 * self.0.operators as usize;
        (self.first(from)..=self.bytes(0)).try_for_each(|at| sink.take(at, Raw::Number, bytes, at))
    }

    fn document(&self, record: Record) -> Result<Document> {
        let number = record.at - 1;
        let held = number >= self.0.train;
        let attempts = 0..PATIENCE * HELD_ONE_OF;
        let text = { attempts }.find_map(|attempt| self.exercise(held, number, attempt));
        let text = text.ok_or_else(|| Error::Malformed {
            place: format!("mano exercise {number}"),
            reason: "no attempt gave one for its split".to_owned(),
        })?;
        Ok(Document::Text { text, held })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const MANO: Mano = Mano { operators: 6, modulus: 23, train: 3000, validation: 300, seed: 5 };

    fn texts(mano: Mano) -> Vec<(String, bool)> {
        let exercises = Exercises::new(mano).unwrap();
        let text = |at| match exercises.document(Record { file: 0, at, raw: Raw::Number }) {
            Ok(Document::Text { text, held }) => (text, held),
            other => panic!("{other:?}"),
        };
        (1..=exercises.bytes(0)).map(text).collect()
    }

    /// The value of an expression in prefix notation, worked out from its end.
    fn value(words: &[&str]) -> i64 {
        let mut stack = Vec::new();
        for word in words.iter().rev() {
            let value = match word.parse() {
                Ok(number) => number,
                Err(_) => {
                    let (a, b): (i64, i64) = (stack.pop().unwrap(), stack.pop().unwrap());
                    match *word {
                        "+" => a + b,
                        "-" => a - b,
                        "*" => a * b,
                        other => panic!("{other}"),
                    }
                    .rem_euclid(23)
                }
            };
            stack.push(value);
        }
        assert_eq!(stack.len(), 1);
        stack[0]
    }

    #[test]
    fn every_answer_is_right_and_every_length_as_announced() {
        let mut lengths = [0; 7];
        for (text, held) in texts(MANO) {
            let words: Vec<&str> = text.split(' ').collect();
            let end = words.len() - 2;
            assert_eq!((words[0], words[end]), ("<bos>", "<ans>"), "{text}");
            let operators = words[2..end].iter().filter(|word| OPERATORS.contains(word)).count();
            assert_eq!(words[1], format!("<len_{operators}>"), "{text}");
            assert_eq!(words[end + 1].parse(), Ok(value(&words[2..end])), "{text}");
            match held {
                true => assert_eq!(operators, 6, "{text}"),
                false => lengths[operators] += 1,
            }
        }
        assert!(lengths[1..].iter().all(|count| (400..600).contains(count)), "{lengths:?}");
        assert_eq!(lengths[0], 0);
    }

    #[test]
    fn no_validation_exercise_is_trained_on_and_a_seed_is_a_dataset() {
        let (one, other) = (texts(MANO), texts(Mano { seed: 6, ..MANO }));
        assert_eq!(one, texts(MANO));
        assert_ne!(one, other);
        let train: HashSet<&String> =
            one.iter().filter(|(_, h)| !h).map(|(text, _)| text).collect();
        let held: Vec<&String> =
            one.iter().filter(|(_, held)| *held).map(|(text, _)| text).collect();
        assert_eq!(held.len(), 300);
        assert!(held.iter().all(|text| !train.contains(*text)));
    }

    #[test]
    fn datasets_of_the_papers_modulus_are_called_what_they_always_were() {
        let digest = |mano| Source::digest(&Exercises::new(mano).unwrap());
        let old = "mano v1 Mano { operators: 6, train: 3000, validation: 300, seed: 5 }";
        assert_eq!(digest(MANO), Digest::of(old.as_bytes()));
        let path = |mano: Mano| mano.options(1000).paths[0].clone();
        assert_eq!(path(MANO), "mano: 6 operators, 3000 to train, 300 to validate, seed 5");
        let other = Mano { modulus: 5, ..MANO };
        assert_ne!(digest(other), digest(MANO));
        assert!(path(other).contains("modulo 5"));
    }

    #[test]
    fn numbers_that_make_no_dataset_are_refused() {
        for wrong in [
            Mano { operators: 0, ..MANO },
            Mano { operators: 1, ..MANO },
            Mano { operators: 5000, ..MANO },
            Mano { modulus: 1, ..MANO },
            Mano { train: 0, ..MANO },
        ] {
            assert!(Exercises::new(wrong).is_err());
        }
    }
}
