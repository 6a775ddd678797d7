//! Tokenizers: any Hugging Face `tokenizer.json`, and byte-level BPE that is trained here, with which
//! any text has tokens, and decoding gives the text back.
//!
//! The special tokens stand for themselves only as ids. Where a text spells `<|endoftext|>` out,
//! that is text like any other, so no document can end itself early.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use looptrain_proto::Digest;
use rayon::prelude::*;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer, TokenizerBuilder,
};

use super::source::pieces;
use super::words::Words;
use crate::{Error, Result};

/// Special tokens in the order of their ids, from 0.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// A pair of tokens is merged only if it is seen this often.
const MIN_FREQUENCY: u64 = 2;

/// What the token after a document is called, the more usual first.
const END_NAMES: [&str; 8] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
];

/// Entries of a vocabulary at most: as many as a model may have, and counts of them fit the memory.
pub(super) const LARGEST_VOCABULARY: usize = 1 << 24;

/// A longer text is tokenized in pieces, by several threads: a tokenizer's notes on a text take many
/// times its size.
const LONG: usize = 1 << 20;

/// A trained tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Arc<Tokenizer>,
    /// The short way, for tokenizers of its kind.
    words: Option<Arc<Words>>,
    is_byte_level: bool,
    vocabulary: usize,
    end_of_text: u32,
    digest: Digest,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("vocabulary_size", &self.vocabulary_size())
            .field("digest", &self.digest)
            .finish()
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer { reason: crate::error::one_line(&error.to_string()) }
}

/// What the library says. It panics at some `tokenizer.json` that are none, and with some that make no
/// sense; that is an error like any other, for the file is the user's.
fn caught<T, E: std::fmt::Display>(ask: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(said) => said.map_err(failed),
        Err(_) => Err(failed("its tokenizer.json contradicts itself (see above)")),
    }
}

fn read(json: &[u8]) -> Result<Tokenizer> {
    caught(|| Tokenizer::from_bytes(json))
}

/// Whether a tokenizer turns the bytes of a text into tokens and leaves nothing out, so that decoding gives any
/// text back; `false` also for those of which that is not known. `parts` is its `tokenizer.json`.
fn is_byte_level(parts: &Value, tokenizer: &Tokenizer) -> bool {
    let by_bytes = |step: &Value| step["type"] == "ByteLevel";
    let keeps_all = |step: &Value| match step["type"].as_str() {
        Some("ByteLevel") => step["add_prefix_space"] == false,
        Some("Digits") => true,
        Some("Split") => step["behavior"] != "Removed",
        _ => false,
    };
    let cutting = &parts["pre_tokenizer"];
    let steps = cutting["pretokenizers"].as_array();
    let steps = steps.map_or(std::slice::from_ref(cutting), Vec::as_slice);
    let cuts = steps.iter().all(keeps_all)
        && steps.iter().filter(|step| by_bytes(step)).count() == 1
        && parts["normalizer"].is_null()
        && by_bytes(&parts["decoder"]);
    let model = &parts["model"];
    let is_plain = |key: &str| model[key].is_null() || model[key] == "";
    let merges = model["type"] == "BPE"
        && is_plain("continuing_subword_prefix")
        && is_plain("end_of_word_suffix");
    // Special ones are not looked for in a text.
    let mut added = parts["added_tokens"].as_array().into_iter().flatten();
    let adds = added.all(|token| {
        let strips = token["lstrip"] == true || token["rstrip"] == true;
        let is_ascii = token["content"].as_str().is_some_and(str::is_ascii);
        token["special"] == true || (is_ascii && !strips)
    });
    let has = |byte: char| tokenizer.token_to_id(byte.encode_utf8(&mut [0; 4])).is_some();
    cuts && merges && adds && ByteLevel::alphabet().into_iter().all(has)
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`; `end_of_text` is the name of the token that stands after every
    /// document, or the first of the usual names that it has.
    ///
    /// # Errors
    /// When it is none, or has no such token.
    pub fn from_json(json: &[u8], end_of_text: Option<&str>) -> Result<Self> {
        let inner = read(json)?;
        let names = end_of_text.as_ref().map_or(&END_NAMES[..], std::slice::from_ref);
        let found = names.iter().find_map(|name| inner.token_to_id(name));
        let end = found.ok_or_else(|| {
            let mut special: Vec<String> =
                inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
            special.sort();
            failed(format!(
                "it has no token {}; name the one that stands after a document (datasets.source.end_of_text, or --end-of-text), such as one of its special tokens: {}",
                names.join(" nor "),
                special.join(" ")
            ))
        })?;
        Self::with_end(json, inner, end)
    }

    /// Reads the `tokenizer.json` of a dataset or a model, which knows the token after a document.
    ///
    /// # Errors
    /// When it is none.
    pub fn with_end_of_text(json: &[u8], end_of_text: u32) -> Result<Self> {
        Self::with_end(json, read(json)?, end_of_text)
    }

    fn with_end(json: &[u8], mut inner: Tokenizer, end_of_text: u32) -> Result<Self> {
        inner.set_encode_special_tokens(true);
        // Documents are neither cut nor filled up.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        // Some vocabularies have holes.
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0).max(end_of_text);
        let vocabulary = largest as usize + 1;
        if vocabulary > LARGEST_VOCABULARY {
            return Err(failed(format!(
                "it has the token {largest}, and {LARGEST_VOCABULARY} tokens are the most there may be"
            )));
        }
        let parts: Value = serde_json::from_slice(json).unwrap_or_default();
        let words = Words::of(&parts).map(Arc::new);
        let is_byte_level = is_byte_level(&parts, &inner);
        let (inner, digest) = (Arc::new(inner), Digest::of(json));
        Ok(Self { inner, words, is_byte_level, vocabulary, end_of_text, digest })
    }

    /// Trains up to `vocabulary` entries on `texts` and gives the `tokenizer.json`: the special
    /// tokens, the 256 bytes, then merges, the most frequent first.
    pub(super) fn train(texts: &[String], vocabulary: usize) -> Result<Vec<u8>> {
        let level = ByteLevel::default().add_prefix_space(false);
        let mut tokenizer = TokenizerBuilder::<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        >::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(level.into()))
        .with_decoder(Some(level.into()))
        .build()
        .map_err(failed)?;
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocabulary)
            .min_frequency(MIN_FREQUENCY)
            .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
            .build();
        tokenizer.train(&mut trainer, texts.iter()).map_err(failed)?;
        tokenizer.to_string(false).map(String::into_bytes).map_err(failed)
    }

    /// The tokens of a text, none of them special. A text of more than 1 MiB is tokenized in pieces,
    /// with the same result where the tokenizer is byte-level BPE with the GPT-2 pattern and white
    /// space, or the end of a word, comes once in a MiB; else tokens may differ at the seams.
    ///
    /// # Errors
    /// When the tokenizer fails, which byte-level BPE does not.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() <= LONG {
            return self.encode_whole(text);
        }
        let pieces = match &self.words {
            Some(words) => words.pieces(text, LONG),
            None => pieces(text, LONG),
        };
        let encode =
            |&(start, length): &(usize, usize)| self.encode_whole(&text[start..start + length]);
        let tokens: Vec<Vec<u32>> = pieces.par_iter().map(encode).collect::<Result<_>>()?;
        Ok(tokens.concat())
    }

    fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        let Some(words) = &self.words else { return self.encode_plain(text) };
        words.encode(text, |word, tokens| {
            let encoding = caught(|| self.inner.encode_fast(word, false))?;
            tokens.extend_from_slice(encoding.get_ids());
            Ok(())
        })
    }

    /// As the library does it.
    fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = caught(|| self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens; special ones appear by name, bytes that are no UTF-8 as U+FFFD.
    ///
    /// # Errors
    /// When a token is not in the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let size = self.vocabulary_size();
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= size) {
            return Err(failed(format!("token {token} is not in the vocabulary of {size}")));
        }
        caught(|| self.inner.decode(tokens, false))
    }

    /// The token of this name, special or not.
    #[must_use]
    pub fn token(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// Number of entries; every token is below it.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary
    }

    /// Stands after every document.
    #[must_use]
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Digest of the `tokenizer.json`.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What its `tokenizer.json` calls a token; `None` where the vocabulary has a hole.
    #[must_use]
    pub fn name(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }

    /// Tokens that there are: fewer than [`Self::vocabulary_size`] where the vocabulary has holes.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The special tokens and their names, in the order of their ids.
    #[must_use]
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let mut special: Vec<(u32, String)> = added
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();
        special.sort();
        special
    }

    /// Whether it is known that any text has tokens and decoding gives it back, as with byte-level BPE that
    /// changes nothing of a text before.
    #[must_use]
    pub fn is_byte_level(&self) -> bool {
        self.is_byte_level
    }

    /// Whether texts are cut into words here, each of which the library is asked for once: the short way that
    /// byte-level BPE with the GPT-2 pattern has. All others are left to the library.
    #[must_use]
    pub fn has_short_way(&self) -> bool {
        self.words.is_some()
    }

    /// The tokens with the longest texts, but for special ones, and these texts.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn longest(&self, count: usize) -> Result<Vec<(u32, String)>> {
        let special: HashSet<u32> = self.special_tokens().into_iter().map(|(id, _)| id).collect();
        let all = self.inner.get_vocab(true).into_values().filter(|id| !special.contains(id));
        let text = |id| self.decode(&[id]).map(|text| (id, text));
        let mut texts: Vec<(u32, String)> = all.map(text).collect::<Result<_>>()?;
        texts.sort_by(|a, b| b.1.len().cmp(&a.1.len()).then(a.0.cmp(&b.0)));
        texts.truncate(count);
        Ok(texts)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trained(vocabulary: usize) -> Vec<u8> {
        let texts: Vec<String> = (0..200)
            .map(|i| format!("pub fn looped_{}() -> usize {{\n    {i}\n}}\n", i % 17))
            .collect();
        TextTokenizer::train(&texts, vocabulary).unwrap()
    }

    proptest! {
        #[test]
        fn any_text_survives(text in ".*") {
            thread_local!(static TOKENIZER: TextTokenizer =
                TextTokenizer::from_json(&trained(300), None).unwrap());
            let back = TOKENIZER.with(|tokenizer| {
                tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap()
            });
            prop_assert_eq!(back, text);
        }
    }

    /// The tokenizer of `trained`, cutting texts as SmolLM2's does.
    fn with_digits() -> Vec<u8> {
        let mut json: serde_json::Value = serde_json::from_slice(&trained(400)).unwrap();
        let by_bytes = json["pre_tokenizer"].take();
        let by_digits = serde_json::json!({ "type": "Digits", "individual_digits": true });
        json["pre_tokenizer"] =
            serde_json::json!({ "type": "Sequence", "pretokenizers": [by_digits, by_bytes] });
        serde_json::to_vec(&json).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_short_way_gives_the_tokens_of_the_library(
            parts in prop::collection::vec(prop::sample::select(vec![
                " ", "  ", "\n", "\n\n", "\t", "\u{a0}", "\u{2003}", "\u{85}", "'", "'s", "'S", "'ll",
                "'re", "'v", "''", "a", "looped", "pub fn", "ä", "ß", "\u{301}", "漢字", "ⅷ", "²",
                "1", "42", "٣", "੭", "½", "_", "-", "()", "{", "<|endoftext|>", "🙂", "\u{200d}",
                "\u{feff}", "\0", "\u{1f1e9}\u{1f1ea}", "ª", "ʰ", "𝔸", "𝟘", "averyverylongwordindeed",
            ]), 0..40),
            any in ".{0,20}",
        ) {
            thread_local!(static TOKENIZERS: [TextTokenizer; 2] = [trained(400), with_digits()]
                .map(|json| TextTokenizer::from_json(&json, None).unwrap()));
            let text = parts.concat() + &any;
            TOKENIZERS.with(|tokenizers| {
                for tokenizer in tokenizers {
                    assert!(tokenizer.words.is_some());
                    // Twice, for what was met before is remembered.
                    for _ in 0..2 {
                        let short = tokenizer.encode(&text).unwrap();
                        assert_eq!(short, tokenizer.encode_plain(&text).unwrap(), "{text:?}");
                    }
                }
            });
        }
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_are_all_of_the_text_and_seams_change_no_token(
            parts in prop::collection::vec(prop::sample::select(vec![
                " ", "   ", "\n", "\n\n", "\u{a0}", "'", "'s", "'ll", "'r", "a", "looped", "ä", "漢字",
                "²", "1", "42", "_", "-", "()", "🙂", "\u{301}",
            ]), 0..30),
            longest in 4_usize..24,
        ) {
            thread_local!(static TOKENIZERS: [TextTokenizer; 2] = [trained(400), with_digits()]
                .map(|json| TextTokenizer::from_json(&json, None).unwrap()));
            let text = parts.concat();
            TOKENIZERS.with(|tokenizers| {
                for tokenizer in tokenizers {
                    let words = tokenizer.words.as_ref().unwrap();
                    let mut end = 0;
                    for (start, length) in words.pieces(&text, longest) {
                        assert!(start == end && length <= longest, "{text:?}");
                        end += length;
                    }
                    assert_eq!(end, text.len());
                    let whole = tokenizer.encode_plain(&text).unwrap();
                    let places = text.char_indices().map(|(place, _)| place);
                    for place in places.filter(|&place| words.is_border(&text, place)) {
                        let (before, behind) = text.split_at(place);
                        let mut tokens = tokenizer.encode_plain(before).unwrap();
                        tokens.extend(tokenizer.encode_plain(behind).unwrap());
                        assert_eq!(tokens, whole, "{before:?} {behind:?}");
                    }
                }
            });
        }
    }

    #[test]
    fn a_tokenizer_of_another_kind_is_left_to_the_library() {
        let json: serde_json::Value = serde_json::from_slice(&with_digits()).unwrap();
        assert!(Words::of(&json).is_some());
        let changes: [fn(&mut serde_json::Value); 6] = [
            |json| json["normalizer"] = serde_json::json!({ "type": "NFC" }),
            |json| json["model"]["dropout"] = 0.1.into(),
            |json| json["model"]["type"] = "Unigram".into(),
            |json| json["added_tokens"][1]["special"] = false.into(),
            |json| json["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into(),
            |json| json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
        ];
        for change in changes {
            let mut changed = json.clone();
            change(&mut changed);
            assert!(Words::of(&changed).is_none(), "{}", changed["pre_tokenizer"]);
        }
    }

    #[test]
    fn a_long_text_that_is_tokenized_in_pieces_has_the_tokens_of_all_of_it() {
        let text: String = (0..80_000).map(|i| format!("looped {i}:\n\n    don't() ")).collect();
        assert!(text.len() > 2 * super::LONG);
        for json in [trained(400), with_digits()] {
            let tokenizer = TextTokenizer::from_json(&json, None).unwrap();
            assert!(tokenizer.words.as_ref().unwrap().pieces(&text, super::LONG).len() > 2);
            assert!(tokenizer.encode(&text).unwrap() == tokenizer.encode_plain(&text).unwrap());
        }
    }

    #[test]
    fn a_long_text_without_a_seam_and_one_of_another_tokenizer_survive() {
        let mut json: serde_json::Value = serde_json::from_slice(&trained(300)).unwrap();
        let words = TextTokenizer::from_json(&trained(300), None).unwrap();
        json["pre_tokenizer"]["add_prefix_space"] = true.into();
        let other = TextTokenizer::from_json(&serde_json::to_vec(&json).unwrap(), None).unwrap();
        assert!(other.words.is_none());
        let dense = "ä".repeat(super::LONG);
        let lines: String = (0..200_000).map(|i| format!("line {i}\n")).collect();
        for (tokenizer, text) in [(&words, &dense), (&words, &lines), (&other, &lines)] {
            let back = tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap();
            // A space before a piece is what this other tokenizer puts there.
            assert!(back.replace(' ', "") == text.replace(' ', ""));
        }
    }

    #[test]
    fn the_end_of_a_text_has_a_usual_name_or_the_given_one() {
        let mut json: serde_json::Value = serde_json::from_slice(&trained(300)).unwrap();
        let end = |json: &serde_json::Value, name| {
            TextTokenizer::from_json(&serde_json::to_vec(json).unwrap(), name)
                .map(|tokenizer| tokenizer.end_of_text())
        };
        assert_eq!(end(&json, None).unwrap(), 0);
        assert_eq!(end(&json, Some("<|im_end|>")).unwrap(), 2);
        let missing = end(&json, Some("<stop>")).unwrap_err().to_string();
        assert!(
            missing.contains("no token <stop>") && missing.contains("<|im_start|>"),
            "{missing}"
        );
        let text = serde_json::to_string(&json).unwrap().replace("<|endoftext|>", "</s>");
        json = serde_json::from_str(&text).unwrap();
        assert_eq!(end(&json, None).unwrap(), 0);
        let text = text.replace("</s>", "<fin>").replace("<|im_end|>", "<fin2>");
        json = serde_json::from_str(&text).unwrap();
        assert!(end(&json, None).is_err());
    }

    #[test]
    fn the_special_tokens_come_first_and_the_size_is_as_asked() {
        let tokenizer = TextTokenizer::from_json(&trained(300), None).unwrap();
        assert_eq!(tokenizer.vocabulary_size(), 300);
        assert_eq!(tokenizer.decode(&[0, 1, 2]).unwrap(), "<|endoftext|><|im_start|><|im_end|>");
    }

    #[test]
    fn special_tokens_spelled_out_in_a_text_are_text() {
        let tokenizer = TextTokenizer::from_json(&trained(300), None).unwrap();
        let text = "a <|endoftext|> b <|im_start|>";
        let tokens = tokenizer.encode(text).unwrap();
        assert!(tokens.iter().all(|&token| token > 2), "{tokens:?}");
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn little_text_gives_a_smaller_vocabulary_and_still_works() {
        let json = TextTokenizer::train(&["hello".to_owned()], 4096).unwrap();
        let tokenizer = TextTokenizer::from_json(&json, None).unwrap();
        assert_eq!(tokenizer.vocabulary_size(), 259);
        assert_eq!(tokenizer.decode(&tokenizer.encode("wörld").unwrap()).unwrap(), "wörld");
    }

    #[test]
    fn what_gives_any_text_back_is_told_from_what_may_not() {
        let json: Value = serde_json::from_slice(&with_digits()).unwrap();
        let known = |json: &Value| {
            let json = serde_json::to_vec(json).unwrap();
            TextTokenizer::from_json(&json, None).unwrap().is_byte_level()
        };
        assert!(known(&json) && known(&serde_json::from_slice(&trained(300)).unwrap()));
        let changes: [fn(&mut Value); 7] = [
            |json| json["normalizer"] = serde_json::json!({ "type": "NFC" }),
            |json| json["decoder"] = Value::Null,
            |json| json["pre_tokenizer"] = serde_json::json!({ "type": "Whitespace" }),
            |json| json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
            |json| json["model"]["end_of_word_suffix"] = "</w>".into(),
            |json| json["added_tokens"][1]["special"] = false.into(),
            |json| drop(json["model"]["vocab"].as_object_mut().unwrap().remove("Ń")),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = json.clone();
            change(&mut changed);
            // ASCII that strips nothing is looked for in a text and given back as it is.
            assert_eq!(known(&changed), number == 5, "{number}");
        }
    }

    #[test]
    fn a_tokenizer_tells_its_entries_their_names_and_the_longest() {
        let mut json: Value = serde_json::from_slice(&trained(300)).unwrap();
        let tokenizer = |json: &Value| {
            TextTokenizer::from_json(&serde_json::to_vec(json).unwrap(), None).unwrap()
        };
        let whole = tokenizer(&json);
        let special = SPECIAL.iter().zip(0..).map(|(name, id)| (id, (*name).to_owned()));
        assert_eq!(whole.special_tokens(), special.collect::<Vec<_>>());
        assert_eq!((whole.entries(), whole.has_short_way()), (300, true));
        let longest = whole.longest(300).unwrap();
        assert_eq!(longest.len(), 297);
        assert!(longest.is_sorted_by_key(|(_, text)| std::cmp::Reverse(text.len())));
        // A space that begins a word is a character of its own in a name.
        let (id, text) = longest.iter().find(|(_, text)| text.starts_with(' ')).unwrap();
        assert_eq!(whole.name(*id).unwrap(), text.replace(' ', "Ġ"));
        assert_eq!(whole.name(300), None);

        json["model"]["vocab"].as_object_mut().unwrap().insert("zzz".into(), 310.into());
        let holes = tokenizer(&json);
        assert_eq!((holes.entries(), holes.vocabulary_size()), (301, 311));
        assert_eq!((holes.name(305), holes.name(310)), (None, Some("zzz".into())));
    }

    #[test]
    fn the_same_text_gives_the_same_tokenizer() {
        let first = trained(400);
        for _ in 0..5 {
            assert_eq!(trained(400), first);
        }
    }

    #[test]
    fn foreign_tokens_and_foreign_files_are_refused() {
        let tokenizer = TextTokenizer::from_json(&trained(300), None).unwrap();
        let error = tokenizer.decode(&[5, 300]).unwrap_err().to_string();
        assert!(error.contains("token 300"), "{error}");
        assert!(TextTokenizer::from_json(b"{}", None).is_err());
        // In the middle of some of its parts the library panics.
        let json = trained(300);
        for end in (0..json.len()).step_by(41) {
            assert!(TextTokenizer::from_json(&json[..end], None).is_err(), "cut at {end}");
        }
        let large = String::from_utf8(json).unwrap().replace("\"!\":3,", "\"!\":4000000000,");
        let error = TextTokenizer::from_json(large.as_bytes(), None).unwrap_err().to_string();
        assert!(error.contains("4000000000"), "{error}");
    }
}
