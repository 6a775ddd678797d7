//! One file of tokens: Arrow IPC, uncompressed, in record batches of 65,536 rows.
//!
//! Two columns: `token` (UInt16 or UInt32) and `starts_document` (Boolean, one bit a row), which is
//! true where a document's first token is. Boundaries stand beside the tokens, so that a single
//! record batch, read by range, is all it takes to mask attention between documents, whatever the
//! tokenizer. A document may begin in one shard and end in the next.
//!
//! The footer's custom metadata has what it takes to read a few tokens and no more, and to check
//! them: [`Contents`]. Readers that know nothing of it see an Arrow file like any other.

use std::io::Cursor;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, UInt16Array, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, UInt16Type, UInt32Type};
use arrow::error::ArrowError;
use arrow::ipc::reader::FileReader;
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
pub(super) fn decode(bytes: Bytes) -> Result<Tokens, String> {
    let text = |error: ArrowError| error.to_string();
    // Only the token column: boundaries are for readers that mask.
    let reader = FileReader::try_new(Cursor::new(bytes), Some(vec![0])).map_err(text)?;
    let mut tokens = match reader.schema().field(0).data_type() {
        DataType::UInt16 => Tokens::Narrow(Vec::new()),
        DataType::UInt32 => Tokens::Wide(Vec::new()),
        other => return Err(format!("its tokens are {other}, not UInt16 or UInt32")),
    };
    for batch in reader {
        let batch = batch.map_err(text)?;
        let column = batch.column(0);
        if column.null_count() > 0 {
            return Err("it has missing tokens".to_owned());
        }
        match &mut tokens {
            Tokens::Narrow(tokens) => {
                tokens.extend_from_slice(column.as_primitive::<UInt16Type>().values());
            }
            Tokens::Wide(tokens) => {
                tokens.extend_from_slice(column.as_primitive::<UInt32Type>().values());
            }
        }
    }
    Ok(tokens)
}

/// Where documents begin in a shard file: the rows of their first tokens.
pub(super) fn starts(bytes: Bytes) -> Result<Vec<u64>, String> {
    let text = |error: ArrowError| error.to_string();
    let reader = FileReader::try_new(Cursor::new(bytes), Some(vec![1])).map_err(text)?;
    if reader.schema().field(0).data_type() != &DataType::Boolean {
        return Err("its column of document starts is not Boolean".to_owned());
    }
    let (mut starts, mut row) = (Vec::new(), 0);
    for batch in reader {
        let batch = batch.map_err(text)?;
        let column = batch.column(0).as_boolean();
        starts.extend(column.values().set_indices().map(|index| row + index as u64));
        row += batch.num_rows() as u64;
    }
    Ok(starts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_both_widths_survive_a_file_of_several_batches() {
        let tokens: Vec<u32> = (0..150_000).map(|i| i % 4096).collect();
        let starts: Vec<bool> = (0..150_000).map(|i| i % 700 == 0).collect();
        for dtype in [TokenType::U16, TokenType::U32] {
            let file = encode(dtype, &tokens, &starts).unwrap();
            assert_eq!(file, encode(dtype, &tokens, &starts).unwrap(), "the same bytes each time");
            let read = decode(file.clone()).unwrap();
            let mut out = Vec::new();
            read.extend(&mut out, 0, usize::MAX / 2);
            assert_eq!(out, tokens);
            out.clear();
            read.extend(&mut out, 149_998, 100);
            assert_eq!(out, tokens[149_998..]);

            let rows: Vec<u64> = (0..150_000).filter(|i| i % 700 == 0).collect();
            assert_eq!(super::starts(file.clone()).unwrap(), rows);

            let boundaries = FileReader::try_new(Cursor::new(file), None).unwrap();
            assert_eq!(boundaries.num_batches(), 3);
            let read: Vec<bool> = boundaries
                .flat_map(|batch| {
                    let batch = batch.unwrap();
                    batch.column(1).as_boolean().iter().map(Option::unwrap).collect::<Vec<_>>()
                })
                .collect();
            assert_eq!(read, starts);
        }
    }

    #[test]
    fn what_is_no_shard_is_an_error_and_no_panic() {
        let file = encode(TokenType::U16, &[1, 2, 3], &[true, false, false]).unwrap();
        assert!(decode(Bytes::new()).is_err());
        assert!(decode(Bytes::from_static(b"no arrow file at all")).is_err());
        assert!(decode(file.slice(..file.len() / 2)).is_err());
    }

    #[test]
    fn a_token_takes_two_bytes_while_the_vocabulary_allows() {
        assert_eq!(TokenType::for_vocabulary(65_536), TokenType::U16);
        assert_eq!(TokenType::for_vocabulary(65_537), TokenType::U32);
    }
}
