//! A short way through byte-level BPE tokenizers with the GPT-2 pattern (SmolLM2's and Ouro's, and those
//! that are trained here): a text is cut into words by hand, and words that were met before are not
//! tokenized again.
//!
//! Such a tokenizer turns each word into tokens by itself, so what the library says of a word alone is
//! what it says of the word in any text. The cutting follows the pattern
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```
//!
//! and, where the tokenizer takes digits one by one, a digit is a word and everything ends there. For
//! any other tokenizer there are no [`Words`], and the library does it all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use regex_syntax::hir::{Class, HirKind};
use serde_json::Value;

/// Slots for words of up to 15 bytes that become up to 4 tokens: most words by far.
const SLOTS: usize = 1 << 16;
const SHORT: usize = 15;
const FEW: usize = 4;
/// Other words of up to so many bytes, and how many of them.
const LONG: usize = 256;
const LONG_WORDS: usize = 1 << 15;

/// What the pattern tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Other,
    Letter,
    Number,
    Space,
    /// A word of its own, at which whatever comes before it ends.
    Digit,
}

/// Cuts texts into words, and knows the tokens of many.
pub(super) struct Words {
    kinds: Arc<[Kind]>,
    /// Those that nobody uses at the moment: one a thread in the end.
    notes: Mutex<Vec<Notes>>,
}

impl Words {
    /// The words of a `tokenizer.json`, if it is of the kind that this short way is for.
    pub(super) fn of(tokenizer: &Value) -> Option<Self> {
        let is = |value: &Value, key: &str, wanted: bool, default: bool| match &value[key] {
            Value::Null => wanted == default,
            given => *given == wanted,
        };
        let by_bytes = |step: &Value| {
            step["type"] == "ByteLevel"
                && is(step, "add_prefix_space", false, true)
                && is(step, "use_regex", true, true)
        };
        let by_digits =
            |step: &Value| step["type"] == "Digits" && is(step, "individual_digits", true, false);
        let cutting = &tokenizer["pre_tokenizer"];
        let digits = match cutting["pretokenizers"].as_array().map(Vec::as_slice) {
            None if by_bytes(cutting) => false,
            Some([only]) if by_bytes(only) => false,
            Some([first, second]) if by_digits(first) && by_bytes(second) => true,
            _ => return None,
        };
        let model = &tokenizer["model"];
        let is_bpe = model["type"] == "BPE" && model["dropout"].is_null();
        // Added tokens that are not special are looked for in the text before it is cut.
        let mut added = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let is_plain = tokenizer["normalizer"].is_null()
            && added.all(|token| token["special"] == Value::Bool(true));
        (is_bpe && is_plain).then(|| Self { kinds: kinds(digits), notes: Mutex::default() })
    }

    /// The tokens of a text; `tokenize` is asked for those of a word.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        tokenize: impl Fn(&str, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<Vec<u32>, E> {
        let free = self.notes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut notes = free.unwrap_or_else(Notes::new);
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while !rest.is_empty() {
            let (word, behind) = rest.split_at(self.word(rest));
            notes.tokens(word, &tokenize, &mut tokens)?;
            rest = behind;
        }
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(notes);
        Ok(tokens)
    }

    /// Cuts a text into (start, length) of at most `longest` bytes whose tokens, one after the other, are
    /// those of the text. A stretch that is longer, and has no place where a word is sure to end, is
    /// cut between characters all the same.
    pub(super) fn pieces(&self, text: &str, longest: usize) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        let mut start = 0;
        while text.len() - start > longest {
            let mut end = start + longest;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let places = text[start..end].char_indices().rev().map(|(at, _)| start + at);
            let places = std::iter::once(end).chain(places).take_while(|&place| place > start);
            let length = places.into_iter().find(|&place| self.is_border(text, place));
            let length = length.unwrap_or(end) - start;
            pieces.push((start, length));
            start += length;
        }
        pieces.push((start, text.len() - start));
        pieces
    }

    /// Whether a word ends at a place in a text, whatever lies before and behind the two characters
    /// there: no word goes on with white space after anything else, nor with anything but letters
    /// after a letter; and a word that ends so does not end otherwise when the text ends there, too.
    pub(super) fn is_border(&self, text: &str, place: usize) -> bool {
        let (before, behind) = text.split_at(place);
        let kinds = (before.chars().next_back(), behind.chars().next());
        let (Some(before), Some(behind)) = kinds else { return false };
        match (self.kind(before), self.kind(behind)) {
            (Kind::Space, _) => false,
            (_, Kind::Space) => true,
            (Kind::Letter, behind) => behind != Kind::Letter,
            _ => false,
        }
    }

    fn kind(&self, c: char) -> Kind {
        self.kinds[c as usize]
    }

    /// Length of the first word of a text that is not empty.
    fn word(&self, text: &str) -> usize {
        let mut chars = text.chars();
        let Some(first) = chars.next() else { return 0 };
        let behind = first.len_utf8();
        match self.kind(first) {
            Kind::Digit => behind,
            Kind::Space => {
                let next = chars.next().map(|next| self.kind(next));
                match next {
                    Some(kind @ (Kind::Other | Kind::Letter | Kind::Number)) if first == ' ' => {
                        self.run(text, behind, kind)
                    }
                    _ => self.spaces(text),
                }
            }
            Kind::Other if first == '\'' => {
                let is = |ending: &&&str| text[behind..].starts_with(**ending);
                let ending = ["s", "t", "re", "ve", "m", "ll", "d"].iter().find(is);
                match ending {
                    Some(ending) => behind + ending.len(),
                    None => self.run(text, 0, Kind::Other),
                }
            }
            kind => self.run(text, 0, kind),
        }
    }

    /// The end of the characters of a kind from `start` on.
    fn run(&self, text: &str, start: usize, kind: Kind) -> usize {
        let end = text[start..].char_indices().find(|&(_, c)| self.kind(c) != kind);
        end.map_or(text.len(), |(end, _)| start + end)
    }

    /// White space leaves its last character to a word that follows, if it is not the only one.
    fn spaces(&self, text: &str) -> usize {
        let end = self.run(text, 0, Kind::Space);
        let next = text[end..].chars().next();
        if next.is_none_or(|next| self.kind(next) == Kind::Digit) {
            return end;
        }
        let last = text[..end].chars().next_back().map_or(0, char::len_utf8);
        if last == end { end } else { end - last }
    }
}

/// The kind of every character.
fn kinds(digits: bool) -> Arc<[Kind]> {
    static TABLES: [OnceLock<Arc<[Kind]>>; 2] = [const { OnceLock::new() }; 2];
    let table = TABLES[usize::from(digits)].get_or_init(|| {
        let mut table = vec![Kind::Other; char::MAX as usize + 1];
        // The same tables that the tokenizer's own pattern is made from.
        for (class, kind) in
            [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)]
        {
            let parsed = regex_syntax::parse(class).expect("a class is a pattern");
            let HirKind::Class(Class::Unicode(class)) = parsed.kind() else { continue };
            for range in class.iter() {
                table[range.start() as usize..=range.end() as usize].fill(kind);
            }
        }
        if digits {
            // Here the tokenizer asks the standard library.
            for c in (char::MIN..=char::MAX).filter(|c| c.is_numeric()) {
                table[c as usize] = Kind::Digit;
            }
        }
        table.into()
    });
    Arc::clone(table)
}

/// A short word that has been met.
#[derive(Clone, Copy)]
struct Slot {
    /// Its bytes, and their number in the last place; 0 for none.
    word: u128,
    count: u8,
    tokens: [u32; FEW],
}

/// Words and their tokens; a word takes the place of another.
struct Notes {
    slots: Vec<Slot>,
    long: HashMap<Box<str>, Box<[u32]>>,
}

impl Notes {
    fn new() -> Self {
        let empty = Slot { word: 0, count: 0, tokens: [0; FEW] };
        Self { slots: vec![empty; SLOTS], long: HashMap::new() }
    }

    fn tokens<E>(
        &mut self,
        word: &str,
        tokenize: &impl Fn(&str, &mut Vec<u32>) -> Result<(), E>,
        out: &mut Vec<u32>,
    ) -> Result<(), E> {
        let begin = out.len();
        if word.len() <= SHORT {
            let mut bytes = [0; 16];
            bytes[..word.len()].copy_from_slice(word.as_bytes());
            bytes[SHORT] = word.len() as u8;
            let key = u128::from_le_bytes(bytes);
            let slot = &mut self.slots[place(key)];
            if slot.word == key {
                out.extend_from_slice(&slot.tokens[..usize::from(slot.count)]);
                return Ok(());
            }
            tokenize(word, out)?;
            let tokens = &out[begin..];
            if tokens.len() <= FEW {
                slot.word = key;
                slot.count = tokens.len() as u8;
                slot.tokens[..tokens.len()].copy_from_slice(tokens);
            }
            return Ok(());
        }
        if let Some(tokens) = self.long.get(word) {
            out.extend_from_slice(tokens);
            return Ok(());
        }
        tokenize(word, out)?;
        if word.len() <= LONG {
            if self.long.len() >= LONG_WORDS {
                self.long.clear();
            }
            self.long.insert(word.into(), out[begin..].into());
        }
        Ok(())
    }
}

/// The slot of a word.
fn place(word: u128) -> usize {
    let folded = (word as u64) ^ ((word >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (folded.wrapping_mul(0xd6e8_feb8_6659_fd93) >> (64 - SLOTS.trailing_zeros())) as usize
}
