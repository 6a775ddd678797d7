//! Byte-level BPE: any text has tokens, and decoding gives the text back.
//!
//! The special tokens stand for themselves only as ids. Where a text spells `<|endoftext|>` out,
//! that is text like any other, so no document can end itself early.

use std::collections::HashSet;
use std::sync::Arc;

use looptrain_proto::Digest;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer, TokenizerBuilder,
};

use crate::{Error, Result};

/// Special tokens in the order of their ids, from 0.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// A pair of tokens is merged only if it is seen this often.
const MIN_FREQUENCY: u64 = 2;

/// A trained tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Arc<Tokenizer>,
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

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer { reason: crate::error::one_line(&error.to_string()) }
}

impl TextTokenizer {
    /// Stands after every document.
    pub const END_OF_TEXT: u32 = 0;

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is none, or its entry 0 is not `<|endoftext|>`.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let mut inner = Tokenizer::from_bytes(json).map_err(failed)?;
        inner.set_encode_special_tokens(true);
        if inner.token_to_id(SPECIAL[0]) != Some(Self::END_OF_TEXT) {
            return Err(failed(format!("entry 0 is not {}", SPECIAL[0])));
        }
        Ok(Self { inner: Arc::new(inner), digest: Digest::of(json) })
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

    /// The tokens of a text, none of them special.
    ///
    /// # Errors
    /// When the tokenizer fails, which byte-level BPE does not.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
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
        self.inner.decode(tokens, false).map_err(failed)
    }

    /// Number of entries.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Digest of the `tokenizer.json`.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
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
                TextTokenizer::from_json(&trained(300)).unwrap());
            let back = TOKENIZER.with(|tokenizer| {
                tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap()
            });
            prop_assert_eq!(back, text);
        }
    }

    #[test]
    fn the_special_tokens_come_first_and_the_size_is_as_asked() {
        let tokenizer = TextTokenizer::from_json(&trained(300)).unwrap();
        assert_eq!(tokenizer.vocabulary_size(), 300);
        assert_eq!(tokenizer.decode(&[0, 1, 2]).unwrap(), "<|endoftext|><|im_start|><|im_end|>");
    }

    #[test]
    fn special_tokens_spelled_out_in_a_text_are_text() {
        let tokenizer = TextTokenizer::from_json(&trained(300)).unwrap();
        let text = "a <|endoftext|> b <|im_start|>";
        let tokens = tokenizer.encode(text).unwrap();
        assert!(tokens.iter().all(|&token| token > 2), "{tokens:?}");
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
    }

    #[test]
    fn little_text_gives_a_smaller_vocabulary_and_still_works() {
        let json = TextTokenizer::train(&["hello".to_owned()], 4096).unwrap();
        let tokenizer = TextTokenizer::from_json(&json).unwrap();
        assert_eq!(tokenizer.vocabulary_size(), 259);
        assert_eq!(tokenizer.decode(&tokenizer.encode("wörld").unwrap()).unwrap(), "wörld");
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
        let tokenizer = TextTokenizer::from_json(&trained(300)).unwrap();
        let error = tokenizer.decode(&[5, 300]).unwrap_err().to_string();
        assert!(error.contains("token 300"), "{error}");
        assert!(TextTokenizer::from_json(b"{}").is_err());
    }
}
