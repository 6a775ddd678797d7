//! Where the documents of a dataset come from.
//!
//! A [`Source`] is a fixed list of files that can be read again from the beginning of any of them: an
//! interrupted preparation goes on from there. Reading gives [`Record`]s in their order, on one
//! thread, with as little work as it takes to tell where one ends; what makes a document of a record
//! (parsing, checking) is done by many.
//!
//! | source | files | records |
//! |---|---|---|
//! | [`files`] | JSON Lines, Parquet, plain text, on disks and in object stores | lines, rows, texts |
//! | [`sample`] | one, of everything that was collected | the texts, in the order of a hash |
//! | [`mano`] | one | numbers, of which an exercise is made each |

mod blocks;
mod files;
mod find;
mod first;
mod lines;
mod mano;
mod pages;
mod rows;
mod sample;
mod texts;
mod walk;

use looptrain_proto::Digest;

pub(super) use blocks::open_url;
pub(super) use files::Files;
pub(super) use first::first_texts;
pub(super) use mano::Exercises;
pub use mano::Mano;
pub(super) use sample::{Sample, pieces};

use crate::Result;

/// Bytes of a record at most; a longer one is malformed.
pub(super) const LARGEST_RECORD: usize = 64 << 20;
/// Records are handed on when they have this many bytes together.
const BATCH_BYTES: usize = 4 << 20;
/// Or when there are this many.
const BATCH_RECORDS: usize = 4096;

/// What may become a document.
#[derive(Debug)]
pub(super) struct Record {
    /// Index of its file.
    pub(super) file: u32,
    /// Its line, row or number in the file; counts from 1.
    pub(super) at: u64,
    pub(super) raw: Raw,
}

/// What reading leaves for others to look into.
#[derive(Debug, PartialEq)]
pub(super) enum Raw {
    Text(String),
    /// A line of JSON Lines.
    Line(Vec<u8>),
    /// Known to the source by its number.
    Number,
    /// What is wrong with it.
    Malformed(String),
}

/// What a record is.
#[derive(Debug, PartialEq)]
pub(super) enum Document {
    /// Its text, and whether it is held out for validation.
    Text { text: String, held: bool },
    /// A text without a character.
    Empty,
    /// What is wrong with it.
    Malformed(String),
}

/// Records that are handed on together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    /// Bytes of all files that have been read so far.
    pub(super) read: u64,
}

/// A list of files with documents in them.
pub(super) trait Source: Send + Sync {
    /// How many files there are.
    fn files(&self) -> usize;

    /// Size of one.
    fn bytes(&self, file: usize) -> u64;

    /// What the files are, and in which state: who finds another digest has other documents.
    fn digest(&self) -> Digest;

    /// For messages.
    fn place(&self, file: usize) -> String;

    /// The first record that reading a file from number `from` on gives: `from` itself where records
    /// can be passed over, else the first of the file. Records that are passed over are documents.
    fn first(&self, _from: u64) -> u64 {
        1
    }

    /// Reads a file from [`Source::first`] on.
    ///
    /// # Errors
    /// When the file cannot be read, or is damaged beyond a record, or nobody takes the records.
    fn read(&self, file: usize, from: u64, sink: &mut Sink<'_>) -> Result<()>;

    /// Makes a document of a record.
    ///
    /// # Errors
    /// When it cannot be read.
    fn document(&self, record: Record) -> Result<Document>;
}

/// Where a source puts its records.
pub(super) struct Sink<'a> {
    file: u32,
    batch: Batch,
    bytes: usize,
    give: &'a mut dyn FnMut(Batch) -> Result<()>,
    /// Bytes of the files before this one.
    before: u64,
}

impl<'a> Sink<'a> {
    /// `before` are the bytes of the files that are left out.
    pub(super) fn new(before: u64, give: &'a mut dyn FnMut(Batch) -> Result<()>) -> Self {
        Self { file: 0, batch: Batch { records: Vec::new(), read: before }, bytes: 0, give, before }
    }

    /// What comes next is of this file.
    pub(super) fn begin(&mut self, file: usize) {
        self.file = u32::try_from(file).expect("finding files ends before there are so many");
    }

    /// A record of `bytes` bytes; `read` bytes of the file have been read.
    pub(super) fn take(&mut self, at: u64, raw: Raw, bytes: usize, read: u64) -> Result<()> {
        self.batch.records.push(Record { file: self.file, at, raw });
        self.batch.read = self.before + read;
        self.bytes += bytes;
        if self.bytes >= BATCH_BYTES || self.batch.records.len() >= BATCH_RECORDS {
            self.flush()?;
        }
        Ok(())
    }

    /// The file ends, after `bytes` bytes.
    pub(super) fn end(&mut self, bytes: u64) {
        self.before += bytes;
        self.batch.read = self.before;
    }

    /// Hands on what is there.
    pub(super) fn flush(&mut self) -> Result<()> {
        let read = self.batch.read;
        self.bytes = 0;
        (self.give)(std::mem::replace(&mut self.batch, Batch { records: Vec::new(), read }))
    }
}

/// Whether a text is held out: a share of all texts, the same ones whatever surrounds them, and the
/// same text never in both splits.
fn is_held(text: &str, share: f64) -> bool {
    let hash = blake3::Hasher::new_derive_key("looptrain validation split v2")
        .update(text.as_bytes())
        .finalize();
    let lot = u64::from_le_bytes(std::array::from_fn(|index| hash.as_bytes()[index]));
    (lot as f64) < share * 2_f64.powi(64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_share_that_is_held_is_as_asked_and_a_larger_one_holds_more_of_the_same() {
        let texts: Vec<String> = (0..20_000).map(|i| format!("text {i}")).collect();
        let held = |share| texts.iter().filter(|text| is_held(text, share)).collect::<Vec<_>>();
        let (few, many) = (held(0.05), held(0.1));
        assert!((900..1100).contains(&few.len()), "{}", few.len());
        assert!((1850..2150).contains(&many.len()), "{}", many.len());
        assert!(few.iter().all(|text| many.contains(text)));
    }

    #[test]
    fn records_are_handed_on_by_size_and_by_number_and_none_is_lost() {
        let mut batches = Vec::new();
        let mut give = |batch: Batch| {
            batches.push((batch.records.len(), batch.read));
            Ok(())
        };
        let mut sink = Sink::new(10, &mut give);
        for at in 1..=5000 {
            sink.take(at, Raw::Number, 1, at).unwrap();
        }
        sink.end(6000);
        sink.begin(1);
        sink.take(1, Raw::Number, BATCH_BYTES, 5).unwrap();
        sink.take(2, Raw::Number, 1, 6).unwrap();
        sink.flush().unwrap();
        assert_eq!(batches, [(4096, 4106), (905, 6015), (1, 6016)]);
    }
}
