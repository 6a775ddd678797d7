//! Where the tokens of a shard stand in its file, and the hashes of the file's blocks.
//!
//! The writer puts both into the footer, where one read of the file's end finds them: the hashes of
//! the blocks before the footer stand in it, those of the last blocks come of the bytes that were
//! read, and all together give the digest in the manifest, or the file is damaged. Shards of before
//! have no such footer; they are read whole, once, and the same is worked out.

use std::ops::Range;

use arrow::ipc::{Endianness, RecordBatch, Type, root_as_footer, root_as_message};
use looptrain_proto::Digest;
use serde::{Deserialize, Serialize};

use super::TokenType;
use super::tree::{self, BLOCK, BlockHash};

/// What an Arrow file ends with, after the footer's length in four bytes.
const MAGIC: &[u8] = b"ARROW1";

/// What it takes to read some tokens of a shard.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Contents {
    pub(super) dtype: TokenType,
    /// Tokens of the file.
    pub(super) tokens: u64,
    /// Tokens of every record batch but the last.
    pub(super) batch_rows: u64,
    /// First byte of the tokens of every record batch.
    pub(super) places: Vec<u64>,
    /// Of every block of the file; in the footer, of those that end before it.
    pub(super) hashes: Vec<BlockHash>,
}

/// What the end of a file says.
#[derive(Debug, PartialEq)]
pub(super) enum Ending {
    /// Everything, and the digest that the file has if it says so.
    Complete(Contents, Digest),
    /// More of the file has to be read: from this byte on.
    From(u64),
    /// Nothing: the file is of before.
    Silent,
}

/// [`Contents`] as it is written.
#[derive(Serialize, Deserialize)]
struct Written {
    dtype: TokenType,
    tokens: u64,
    batch_rows: u64,
    token_places: Vec<u64>,
    block_bytes: u64,
    block_hashes: String,
}

impl Contents {
    /// The key of the footer's custom metadata.
    pub(super) const KEY: &str = "looptrain.contents";

    /// From which byte on a file is read to find its footer, if not more: a guess from its size,
    /// always at the beginning of a block.
    pub(super) fn guess(bytes: u64) -> u64 {
        let footer = 4096 + tree::blocks(bytes) as u64 * (64 + 2 * 24);
        bytes.saturating_sub(footer) / BLOCK * BLOCK
    }

    pub(super) fn to_text(&self) -> String {
        let hex = |hash: &BlockHash| blake3::Hash::from_bytes(*hash).to_hex().to_string();
        let written = Written {
            dtype: self.dtype,
            tokens: self.tokens,
            batch_rows: self.batch_rows,
            token_places: self.places.clone(),
            block_bytes: BLOCK,
            block_hashes: self.hashes.iter().map(hex).collect(),
        };
        serde_json::to_string(&written).expect("numbers and text have a JSON form")
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if written.block_bytes != BLOCK {
            return Err(format!("its blocks have {} bytes, not {BLOCK}", written.block_bytes));
        }
        let hash = |hex: &[u8]| blake3::Hash::from_hex(hex).map(|hash| *hash.as_bytes());
        let hashes = written.block_hashes.as_bytes().chunks(64).map(hash).collect::<Result<_, _>>();
        Ok(Self {
            dtype: written.dtype,
            tokens: written.tokens,
            batch_rows: written.batch_rows,
            places: written.token_places,
            hashes: hashes.map_err(|error| error.to_string())?,
        })
    }

    /// What the bytes of a file from `begin` on, the beginning of a block, say about all of it.
    pub(super) fn of_ending(ending: &[u8], begin: u64) -> Result<Ending, String> {
        let footer = match footer(ending)? {
            Ok(footer) => footer,
            Err(_) if begin == 0 => return Err("its footer is longer than it".to_owned()),
            Err(missing) => return Ok(Ending::From(begin.saturating_sub(missing) / BLOCK * BLOCK)),
        };
        let footer = root_as_footer(&footer).map_err(|error| error.to_string())?;
        let metadata = footer.custom_metadata().into_iter().flatten();
        let written = metadata.filter(|pair| pair.key() == Some(Self::KEY)).find_map(|p| p.value());
        let Some(written) = written else { return Ok(Ending::Silent) };
        let mut contents = Self::from_text(written)?;
        let known = contents.hashes.len() as u64 * BLOCK;
        if known < begin {
            return Ok(Ending::From(known));
        }
        let rest = ending.get((known - begin) as usize..).filter(|rest| !rest.is_empty());
        let rest = rest.ok_or("its footer tells of more blocks than it has")?;
        contents.hashes.extend(tree::hashes(contents.hashes.len(), rest));
        let digest = tree::digest(&contents.hashes);
        // One block alone begins at the beginning.
        let digest = digest.unwrap_or_else(|| Digest::of(rest));
        Ok(Ending::Complete(contents, digest))
    }

    /// What a whole file says that may have no [`Contents`] in it.
    pub(super) fn of_file(file: &[u8], dtype: TokenType) -> Result<Self, String> {
        let footer = footer(file)?.map_err(|_| "its footer is longer than it".to_owned())?;
        let footer = root_as_footer(&footer).map_err(|error| error.to_string())?;
        let (mut places, mut rows) = (Vec::new(), Vec::new());
        for block in footer.recordBatches().into_iter().flatten() {
            let begin = u64::try_from(block.offset()).map_err(|error| error.to_string())?;
            let batch = file.get(begin as usize..).ok_or("a record batch is beyond its end")?;
            let (place, count) = token_column(batch)?;
            places.push(begin + place);
            rows.push(count);
        }
        let batch_rows = rows.first().copied().unwrap_or(1).max(1);
        if rows.iter().rev().skip(1).any(|&count| count != batch_rows) {
            return Err("its record batches are of different lengths".to_owned());
        }
        let tokens = rows.iter().try_fold(0, |sum: u64, &rows| sum.checked_add(rows));
        let tokens = tokens.ok_or("its record batches have more rows than there are")?;
        let hashes = tree::hashes(0, file);
        Ok(Self { dtype, tokens, batch_rows, places, hashes })
    }

    /// What contradicts a file of so many bytes, of which the manifest says that it has so many
    /// tokens, if anything.
    pub(super) fn complaint(&self, bytes: u64, says: u64) -> Option<String> {
        let Self { tokens, batch_rows, .. } = *self;
        if tokens != says {
            return Some(format!("it has {tokens} tokens, the manifest says {says}"));
        }
        let aligned = self.places.iter().all(|place| place.is_multiple_of(self.dtype.bytes()));
        if batch_rows == 0 || !aligned || self.places.len() as u64 != tokens.div_ceil(batch_rows) {
            return Some("its record batches are not those of its tokens".to_owned());
        }
        let fits = |(batch, place): (u64, &u64)| {
            let rows = batch_rows.min(tokens - batch * batch_rows);
            place.saturating_add(rows.saturating_mul(self.dtype.bytes())) <= bytes
        };
        (!(0..).zip(&self.places).all(fits)).then(|| "its tokens reach beyond its end".to_owned())
    }

    /// The bytes of `count` tokens from `first` on, one range for each record batch.
    pub(super) fn ranges(&self, first: u64, count: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let (mut next, end) = (first, first + count);
        std::iter::from_fn(move || {
            let (batch, row) = (next / self.batch_rows, next % self.batch_rows);
            let rows = (self.batch_rows - row).min(end - next);
            let place = *self.places.get(batch as usize).filter(|_| rows > 0)?;
            next += rows;
            let width = self.dtype.bytes();
            Some(place + row * width..place + (row + rows) * width)
        })
    }

    /// Memory it takes.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + 8 * self.places.len() + 32 * self.hashes.len()
    }
}

/// The footer in the end of a file, or how many bytes of it are missing before that.
fn footer(ending: &[u8]) -> Result<Result<Vec<u8>, u64>, String> {
    let no_arrow = || "it does not end as an Arrow file does".to_owned();
    let (rest, trailer) = ending.split_last_chunk::<10>().ok_or_else(no_arrow)?;
    let [a, b, c, d, magic @ ..] = trailer;
    let length = usize::try_from(i32::from_le_bytes([*a, *b, *c, *d])).map_err(|_| no_arrow())?;
    if magic != MAGIC {
        return Err(no_arrow());
    }
    // A copy, for the alignment of what is in it.
    Ok(match rest.len().checked_sub(length) {
        Some(begin) => Ok(rest[begin..].to_vec()),
        None => Err((length - rest.len()) as u64),
    })
}

/// The message at the beginning of a record batch; its body follows.
fn message(batch: &[u8]) -> Result<Vec<u8>, String> {
    // Four bytes that are no length, four of the length of the message, the message, the body.
    let length = batch.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(i32::from_le_bytes);
    let length = length.and_then(|length| usize::try_from(length).ok());
    let message = length.and_then(|length| batch.get(8..8 + length));
    // A copy, for the alignment of what is in it.
    Ok(message.ok_or("a record batch is cut off")?.to_vec())
}

/// What a message says of its body, and how many rows that has.
fn header(message: &[u8]) -> Result<(RecordBatch<'_>, u64), String> {
    let parsed = root_as_message(message).map_err(|error| error.to_string())?;
    let header = parsed.header_as_record_batch().ok_or("a message is no record batch")?;
    if header.compression().is_some() {
        return Err("its record batches are compressed".to_owned());
    }
    let rows = u64::try_from(header.length()).map_err(|error| error.to_string())?;
    Ok((header, rows))
}

/// Where the values of a column begin in the body: each has its validity, then its values.
fn values_of(header: &RecordBatch<'_>, column: usize) -> Result<u64, String> {
    let buffers = header.buffers().filter(|buffers| buffers.len() > 2 * column + 1);
    let offset = buffers.map(|buffers| buffers.get(2 * column + 1).offset());
    let offset = offset.and_then(|offset| u64::try_from(offset).ok());
    offset.ok_or_else(|| "a record batch lacks a column".to_owned())
}

/// Where the values of the first column of a record batch begin, counted from the beginning of its
/// message, and how many there are.
pub(super) fn token_column(batch: &[u8]) -> Result<(u64, u64), String> {
    let message = message(batch)?;
    let (header, rows) = header(&message)?;
    Ok((8 + message.len() as u64 + values_of(&header, 0)?, rows))
}

/// Gives the values of a column of every record batch of a whole file, in their order, with their
/// number; `width` is that of a value in bits. Arrow's own reader does the same, and takes the file's
/// word for where they are.
pub(super) fn column<'a>(
    file: &'a [u8],
    column: usize,
    width: u64,
    mut take: impl FnMut(&'a [u8], usize),
) -> Result<(), String> {
    let footer = footer(file)?.map_err(|_| "its footer is longer than it".to_owned())?;
    let footer = root_as_footer(&footer).map_err(|error| error.to_string())?;
    let mut all = 0;
    for block in footer.recordBatches().into_iter().flatten() {
        let begin = usize::try_from(block.offset()).map_err(|error| error.to_string())?;
        let batch = file.get(begin..).ok_or("a record batch is beyond its end")?;
        let message = message(batch)?;
        let (header, rows) = header(&message)?;
        let nodes = header.nodes().filter(|nodes| nodes.len() > column);
        let node = nodes.map(|nodes| nodes.get(column)).ok_or("a record batch lacks a column")?;
        if node.null_count() != 0 || u64::try_from(node.length()) != Ok(rows) {
            return Err("it has missing values".to_owned());
        }
        let place = values_of(&header, column)?;
        let bytes = rows.checked_mul(width).map(|bits| bits.div_ceil(8));
        let values = bytes.and_then(|bytes| {
            let begin = usize::try_from(place).ok()?.checked_add(8 + message.len())?;
            batch.get(begin..begin.checked_add(usize::try_from(bytes).ok()?)?)
        });
        let values = values.ok_or("its tokens reach beyond its end")?;
        // Else the same bytes could stand for any number of tokens.
        all += values.len();
        if all > file.len() {
            return Err("its record batches overlap".to_owned());
        }
        take(values, usize::try_from(rows).map_err(|error| error.to_string())?);
    }
    Ok(())
}

/// What the columns of a file are: how wide its tokens are, and whether there are document starts
/// beside them.
pub(super) fn columns(file: &[u8]) -> Result<(TokenType, bool), String> {
    let footer = footer(file)?.map_err(|_| "its footer is longer than it".to_owned())?;
    let footer = root_as_footer(&footer).map_err(|error| error.to_string())?;
    let schema = footer.schema().filter(|schema| schema.endianness() == Endianness::Little);
    let fields = schema.and_then(|schema| schema.fields()).ok_or("it has no schema")?;
    let field = |column: usize| (fields.len() > column).then(|| fields.get(column));
    let token = field(0).filter(|field| field.dictionary().is_none());
    let kind =
        token.and_then(|field| field.type_as_int()).map(|it| (it.bitWidth(), it.is_signed()));
    let dtype = match kind {
        Some((16, false)) => TokenType::U16,
        Some((32, false)) => TokenType::U32,
        _ => return Err("its tokens are not UInt16 or UInt32".to_owned()),
    };
    Ok((dtype, field(1).is_some_and(|field| field.type_type() == Type::Bool)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::shard;
    use super::*;

    fn file(dtype: TokenType, tokens: u32) -> (Vec<u32>, bytes::Bytes) {
        let tokens: Vec<u32> = (0..tokens).map(|i| i * 7 % 60_000).collect();
        let bytes = shard::encode(dtype, &tokens, &vec![false; tokens.len()]).unwrap();
        (tokens, bytes)
    }

    #[test]
    fn the_end_of_a_file_tells_where_its_tokens_are_and_what_its_blocks_hash_to() {
        for (dtype, count) in
            [(TokenType::U16, 300_000), (TokenType::U32, 140_001), (TokenType::U16, 65_536)]
        {
            let (tokens, file) = file(dtype, count);
            let begin = Contents::guess(file.len() as u64);
            assert!(begin > 0 && begin.is_multiple_of(BLOCK));
            let ending = Contents::of_ending(&file[begin as usize..], begin).unwrap();
            let Ending::Complete(contents, digest) = ending else { panic!("{ending:?}") };
            assert_eq!(digest, Digest::of(&file));
            assert_eq!(contents.hashes, tree::hashes(0, &file));
            assert_eq!(contents.complaint(file.len() as u64, count.into()), None);
            let width = dtype.bytes() as usize;
            for (batch, &place) in contents.places.iter().enumerate() {
                let wanted = tokens[batch * contents.batch_rows as usize];
                let mut word = [0; 4];
                word[..width].copy_from_slice(&file[place as usize..place as usize + width]);
                assert_eq!(u32::from_le_bytes(word), wanted);
            }
            // What is worked out of the whole file is the same.
            assert_eq!(Contents::of_file(&file, dtype).unwrap(), contents);
        }
    }

    #[test]
    fn a_file_of_one_block_is_its_own_ending() {
        let (_, file) = file(TokenType::U16, 100);
        assert_eq!(Contents::guess(file.len() as u64), 0);
        let Ending::Complete(contents, digest) = Contents::of_ending(&file, 0).unwrap() else {
            panic!("all of it was there");
        };
        assert_eq!((digest, contents.hashes.len()), (Digest::of(&file), 1));
        let complaint = contents.complaint(file.len() as u64, 101).unwrap();
        assert_eq!(complaint, "it has 100 tokens, the manifest says 101");
        assert!(contents.complaint(300, 100).unwrap().contains("beyond its end"));
    }

    #[test]
    fn an_ending_that_is_too_short_says_from_where_to_read() {
        let (_, file) = file(TokenType::U32, 2_000_000);
        let bytes = file.len() as u64;
        let late = bytes / BLOCK * BLOCK;
        let ending = Contents::of_ending(&file[late as usize..], late).unwrap();
        match ending {
            Ending::Complete(_, digest) => assert_eq!(digest, Digest::of(&file)),
            Ending::From(begin) => assert!(begin < late),
            Ending::Silent => panic!("{ending:?}"),
        }
        let short = &file[file.len() - 500..];
        let Ending::From(begin) = Contents::of_ending(short, bytes - 500).unwrap() else {
            panic!("500 bytes do not hold the footer");
        };
        assert!(begin.is_multiple_of(BLOCK));
        let again = Contents::of_ending(&file[begin as usize..], begin).unwrap();
        assert!(matches!(again, Ending::Complete(_, digest) if digest == Digest::of(&file)));
    }

    #[test]
    fn what_is_no_shard_is_an_error_and_no_panic() {
        let (_, file) = file(TokenType::U16, 1000);
        for bytes in [&b""[..], b"no arrow file at all", &file[..file.len() - 1], &file[..40]] {
            assert!(Contents::of_ending(bytes, 0).is_err());
            assert!(Contents::of_file(bytes, TokenType::U16).is_err());
        }
        for place in 0..file.len() {
            let mut damaged = file.to_vec();
            damaged[place] ^= 0x5a;
            match Contents::of_ending(&damaged, 0) {
                Ok(Ending::Complete(_, digest)) => assert_ne!(digest, Digest::of(&file), "{place}"),
                Ok(Ending::From(_) | Ending::Silent) | Err(_) => {}
            }
            let _ = Contents::of_file(&damaged, TokenType::U16);
        }
    }
}
