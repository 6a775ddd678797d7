//! One file of tokens: Arrow IPC, uncompressed, in record batches of 65,536 rows.
//!
//! Two columns: `token` (UInt16 or UInt32) and `starts_document` (Boolean, one bit a row), which is
//! true where a document's first token is. Boundaries stand beside the tokens, so that a single
//! record batch, read by range, is all it takes to mask attention between documents, whatever the
//! tokenizer. A document may begin in one shard and end in the next.
//!
//! The footer's custom metadata has what it takes to read a few tokens and no more, and to check
//! them: [`Contents`]. Readers that know nothing of it see an Arrow file like any other.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, RecordBatch, UInt16Array, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use arrow::ipc::writer::FileWriter;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::contents::{self, Contents};
use super::tree;

/// Rows of a record batch, the unit of a range read.
const BATCH_ROWS: usize = 65_536;

/// Width of a token in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// 16 bits, for vocabularies up to 65,536.
    U16,
    /// 32 bits.
    U32,
}

impl TokenType {
    /// The narrowest type that holds every token of a vocabulary.
    #[must_use]
    pub fn for_vocabulary(size: usize) -> Self {
        if size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes of a token.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// Appends the tokens that stand in `bytes` to `out`.
    pub(super) fn extend(self, out: &mut Vec<u32>, bytes: &[u8]) {
        match self {
            Self::U16 => {
                let (words, _) = bytes.as_chunks();
                out.extend(words.iter().map(|&word| u32::from(u16::from_le_bytes(word))));
            }
            Self::U32 => {
                let (words, _) = bytes.as_chunks();
                out.extend(words.iter().map(|&word| u32::from_le_bytes(word)));
            }
        }
    }

    fn column(self, tokens: &[u32]) -> ArrayRef {
        match self {
            Self::U16 => {
                let narrow = |&token: &u32| {
                    u16::try_from(token).expect("a vocabulary of 16 bits has no wider tokens")
                };
                Arc::new(UInt16Array::from_iter_values(tokens.iter().map(narrow)))
            }
            Self::U32 => Arc::new(UInt32Array::from_iter_values(tokens.iter().copied())),
        }
    }

    fn schema(self) -> Arc<Schema> {
        let token = match self {
            Self::U16 => DataType::UInt16,
            Self::U32 => DataType::UInt32,
        };
        Arc::new(Schema::new(vec![
            Field::new("token", token, false),
            Field::new("starts_document", DataType::Boolean, false),
        ]))
    }
}

/// The bytes of a shard file; `starts` has one entry a token.
pub(super) fn encode(
    dtype: TokenType,
    tokens: &[u32],
    starts: &[bool],
) -> Result<Bytes, ArrowError> {
    let schema = dtype.schema();
    let mut writer = FileWriter::try_new(Vec::new(), &schema)?;
    let mut places = Vec::new();
    for (tokens, starts) in tokens.chunks(BATCH_ROWS).zip(starts.chunks(BATCH_ROWS)) {
        let starts: ArrayRef = Arc::new(BooleanArray::from(starts.to_vec()));
        let columns = vec![dtype.column(tokens), starts];
        let begin = writer.get_ref().len();
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns)?)?;
        let column = contents::token_column(&writer.get_ref()[begin..]);
        let (place, _) = column.map_err(ArrowError::IpcError)?;
        places.push(begin as u64 + place);
    }
    // Of whole blocks alone: what follows stands in the last ones.
    let whole = writer.get_ref().len() / tree::BLOCK as usize * tree::BLOCK as usize;
    let hashes = tree::hashes(0, &writer.get_ref()[..whole]);
    let (tokens, batch_rows) = (tokens.len() as u64, BATCH_ROWS as u64);
    let contents = Contents { dtype, tokens, batch_rows, places, hashes };
    writer.write_metadata(Contents::KEY, contents.to_text());
    Ok(writer.into_inner()?.into())
}

/// A shard of 16-bit tokens as they were before they had [`Contents`].
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) fn encode_as_before(tokens: &[u32]) -> Bytes {
    let schema = TokenType::U16.schema();
    let mut writer = FileWriter::try_new(Vec::new(), &schema).unwrap();
    for tokens in tokens.chunks(BATCH_ROWS) {
        let starts: ArrayRef = Arc::new(BooleanArray::from(vec![false; tokens.len()]));
        let columns = vec![TokenType::U16.column(tokens), starts];
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()).unwrap();
    }
    writer.into_inner().unwrap().into()
}

/// The tokens of a shard, as wide as in the file.
#[derive(Debug, PartialEq)]
pub(super) enum Tokens {
    Narrow(Vec<u16>),
    Wide(Vec<u32>),
}

impl Tokens {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Narrow(tokens) => tokens.len(),
            Self::Wide(tokens) => tokens.len(),
        }
    }

    /// The largest token; `None` when there are none.
    pub(super) fn largest(&self) -> Option<u32> {
        match self {
            Self::Narrow(tokens) => tokens.iter().max().map(|&token| u32::from(token)),
            Self::Wide(tokens) => tokens.iter().max().copied(),
        }
    }

    /// Appends up to `count` tokens from `start` on to `out`.
    pub(super) fn extend(&self, out: &mut Vec<u32>, start: usize, count: usize) {
        let end = self.len().min(start + count);
        match self {
            Self::Narrow(tokens) => out.extend(tokens[start..end].iter().map(|&t| u32::from(t))),
            Self::Wide(tokens) => out.extend_from_slice(&tokens[start..end]),
        }
    }
}

/// Reads a shard file back; the error says what is wrong with it.
pub(super) fn decode(bytes: &[u8]) -> Result<Tokens, String> {
    // Only the token column: boundaries are for readers that mask.
    Ok(match contents::columns(bytes)?.0 {
        TokenType::U16 => {
            let mut tokens = Vec::new();
            contents::column(bytes, 0, 16, |values, _| {
                tokens.extend(values.as_chunks().0.iter().copied().map(u16::from_le_bytes));
            })?;
            Tokens::Narrow(tokens)
        }
        TokenType::U32 => {
            let mut tokens = Vec::new();
            contents::column(bytes, 0, 32, |values, _| {
                tokens.extend(values.as_chunks().0.iter().copied().map(u32::from_le_bytes));
            })?;
            Tokens::Wide(tokens)
        }
    })
}

/// Where documents begin in a shard file: the rows of their first tokens.
pub(super) fn starts(bytes: &[u8]) -> Result<Vec<u64>, String> {
    if !contents::columns(bytes)?.1 {
        return Err("its column of document starts is not Boolean".to_owned());
    }
    let (mut starts, mut row) = (Vec::new(), 0);
    contents::column(bytes, 1, 1, |bits, rows| {
        let is_set = |index: &usize| bits[index / 8] >> (index % 8) & 1 == 1;
        starts.extend((0..rows).filter(is_set).map(|index| row + index as u64));
        row += rows as u64;
    })?;
    Ok(starts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Cursor;

    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{UInt16Type, UInt32Type};
    use arrow::ipc::reader::FileReader;

    use super::*;

    #[test]
    fn tokens_of_both_widths_survive_a_file_of_several_batches() {
        let tokens: Vec<u32> = (0..150_000).map(|i| i % 4096).collect();
        let starts: Vec<bool> = (0..150_000).map(|i| i % 700 == 0).collect();
        for dtype in [TokenType::U16, TokenType::U32] {
            let file = encode(dtype, &tokens, &starts).unwrap();
            assert_eq!(file, encode(dtype, &tokens, &starts).unwrap(), "the same bytes each time");
            let read = decode(&file).unwrap();
            let mut out = Vec::new();
            read.extend(&mut out, 0, usize::MAX / 2);
            assert_eq!(out, tokens);
            out.clear();
            read.extend(&mut out, 149_998, 100);
            assert_eq!(out, tokens[149_998..]);

            let rows: Vec<u64> = (0..150_000).filter(|i| i % 700 == 0).collect();
            assert_eq!(super::starts(&file).unwrap(), rows);

            // Arrow's own reader finds the same.
            let batches = FileReader::try_new(Cursor::new(file), None).unwrap();
            assert_eq!(batches.num_batches(), 3);
            let (mut by_arrow, mut boundaries) = (Vec::new(), Vec::new());
            for batch in batches.map(Result::unwrap) {
                let (column, bits) = (batch.column(0), batch.column(1).as_boolean());
                match dtype {
                    TokenType::U16 => by_arrow.extend(
                        column.as_primitive::<UInt16Type>().values().iter().map(|&t| u32::from(t)),
                    ),
                    TokenType::U32 => {
                        by_arrow.extend_from_slice(column.as_primitive::<UInt32Type>().values());
                    }
                }
                assert_eq!(column.null_count(), 0);
                boundaries.extend(bits.iter().map(Option::unwrap));
            }
            assert_eq!((by_arrow, boundaries), (tokens.clone(), starts.clone()));
        }
    }

    #[test]
    fn what_is_no_shard_is_an_error_and_no_panic() {
        let file = encode(TokenType::U16, &[1, 2, 3], &[true, false, false]).unwrap();
        for bytes in [&b""[..], b"no arrow file at all", &file[..file.len() / 2]] {
            assert!(decode(bytes).is_err() && super::starts(bytes).is_err());
        }
        // Arrow's reader panics at offsets that are beyond the file.
        let mut read = 0;
        for place in 0..file.len() {
            for value in [0, 0x7f, 0x80, 0xff] {
                let mut damaged = file.to_vec();
                damaged[place] = value;
                read += usize::from(decode(&damaged).is_ok() && super::starts(&damaged).is_ok());
            }
        }
        assert!(read > 0);
    }

    #[test]
    fn a_token_takes_two_bytes_while_the_vocabulary_allows() {
        assert_eq!(TokenType::for_vocabulary(65_536), TokenType::U16);
        assert_eq!(TokenType::for_vocabulary(65_537), TokenType::U32);
    }
}
