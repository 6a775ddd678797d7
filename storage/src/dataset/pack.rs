//! Packing: documents, in their order, become a stream of tokens a split, cut into shards.
//!
//! A [`Packer`] decides everything that is written, and can be begun anywhere that a shard ended: its
//! [`Work`] says after each shard which record the next one begins in, and at which of its tokens. So
//! a preparation that was interrupted goes on with the shard at which it stopped, and what it writes
//! is what it would have written.

use std::collections::VecDeque;

use bytes::Bytes;
use looptrain_proto::Digest;
use serde::{Deserialize, Serialize};

use super::names::Names;
use super::{ShardEntry, Split, SplitManifest, TokenType, shard};
use crate::{Error, Result};

/// A place among the records: all before it are done, and of this one so many tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Cut {
    /// Index of the file.
    pub(super) file: u32,
    /// Number of the record in it.
    pub(super) at: u64,
    /// Tokens of that record that are done, the end of text counted.
    pub(super) tokens: u64,
}

impl Cut {
    /// Whether any token of a record comes behind the cut.
    pub(super) fn wants(&self, file: u32, at: u64) -> bool {
        (file, at) >= (self.file, self.at)
    }
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) records: u64,
    pub(super) malformed: u64,
    pub(super) empty: u64,
}

/// How far one split has come; all of it is in shards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct SplitWork {
    pub(super) shards: u64,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) bytes: u64,
    pub(super) cut: Cut,
    /// How often each token is in it.
    pub(super) counts: Vec<u64>,
}

/// How far a preparation has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Work {
    pub(super) train: SplitWork,
    pub(super) validation: SplitWork,
    /// The file to begin with: none before it has a token that is not in a shard.
    pub(super) file: u32,
    /// What was read before that file.
    pub(super) before: Counts,
}

impl Work {
    pub(super) fn new(vocabulary: usize) -> Self {
        let split = SplitWork { counts: vec![0; vocabulary], ..SplitWork::default() };
        Self { train: split.clone(), validation: split, ..Self::default() }
    }

    pub(super) fn split(&self, split: Split) -> &SplitWork {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// The first record of the first file that has a token to be done.
    pub(super) fn from(&self) -> u64 {
        let first = self.train.cut.min(self.validation.cut);
        if first.file == self.file { first.at } else { 0 }
    }
}

/// A record that has been looked into.
pub(super) enum Packed {
    /// A document, with its tokens when its split wants them.
    Document {
        split: Split,
        tokens: Vec<u32>,
        bytes: u64,
    },
    Empty,
    /// What is wrong with it.
    Malformed(String),
}

/// A shard that is complete.
pub(super) struct Shard {
    pub(super) split: Split,
    pub(super) entry: ShardEntry,
    pub(super) bytes: Bytes,
}

/// Puts documents into shards.
pub(super) struct Packer {
    names: Names,
    shard_tokens: usize,
    dtype: TokenType,
    train: Stream,
    validation: Stream,
    counts: Counts,
    /// What had been read when each file began, from that on that holds the earliest cut.
    files: VecDeque<(u32, Counts)>,
}

impl Packer {
    /// Begins where `work` ends; `passed` records of its first file lie before the first that comes.
    pub(super) fn new(
        names: Names,
        work: Work,
        passed: u64,
        shard_tokens: u64,
        dtype: TokenType,
    ) -> Self {
        let records = work.before.records + passed;
        Self {
            names,
            shard_tokens: shard_tokens as usize,
            dtype,
            counts: Counts { records, ..work.before },
            files: [(work.file, work.before)].into(),
            train: Stream::new(work.train),
            validation: Stream::new(work.validation),
        }
    }

    /// What has been read, by this maker and by those before it.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Shards that have been cut.
    pub(super) fn shards(&self) -> u64 {
        self.train.work.shards + self.validation.work.shards
    }

    /// Tokens in shards or on their way.
    pub(super) fn tokens(&self) -> u64 {
        [&self.train, &self.validation]
            .map(|stream| stream.work.tokens + stream.tokens.len() as u64)
            .iter()
            .sum()
    }

    /// Takes the next record. Records that were taken before the cut of their split may come again.
    pub(super) fn take(&mut self, file: u32, at: u64, packed: Packed) {
        if self.files.back().is_none_or(|(last, _)| *last < file) {
            self.files.push_back((file, self.counts));
        }
        self.counts.records += 1;
        match packed {
            Packed::Empty => self.counts.empty += 1,
            Packed::Malformed(_) => self.counts.malformed += 1,
            Packed::Document { split, tokens, bytes } => {
                self.stream(split).push(file, at, &tokens, bytes);
            }
        }
    }

    /// The next shard that is full, or with `rest` any that has tokens.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(super) fn cut(&mut self, rest: bool) -> Result<Option<Shard>> {
        for split in [Split::Train, Split::Validation] {
            let (full, dtype) = (self.shard_tokens, self.dtype);
            let stream = self.stream(split);
            let (there, number) = (stream.tokens.len(), stream.work.shards);
            if there >= full || (rest && there > 0) {
                let file = self.names.shard(split, number);
                return self.stream(split).cut(split, file, there.min(full), dtype).map(Some);
            }
        }
        Ok(None)
    }

    /// How far it has come with the shards that have been cut.
    pub(super) fn work(&mut self) -> Work {
        let (train, validation) = (self.train.work.clone(), self.validation.work.clone());
        let first = train.cut.min(validation.cut).file;
        while self.files.get(1).is_some_and(|(file, _)| *file <= first) {
            self.files.pop_front();
        }
        let (file, before) = self.files.front().copied().unwrap_or_default();
        Work { train, validation, file, before }
    }

    fn stream(&mut self, split: Split) -> &mut Stream {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
        }
    }
}

/// Tokens of a split on their way into shards.
struct Stream {
    work: SplitWork,
    /// Where this stream began: what lies before it is there already.
    begin: Cut,
    tokens: Vec<u32>,
    starts: Vec<bool>,
    documents: VecDeque<Waiting>,
}

/// A document with tokens in the stream.
struct Waiting {
    /// Its place, and its tokens that are in shards.
    done: Cut,
    /// Its tokens that are in the stream.
    left: usize,
    bytes: u64,
}

impl Stream {
    fn new(work: SplitWork) -> Self {
        let begin = work.cut;
        let (tokens, starts, documents) = (Vec::new(), Vec::new(), VecDeque::new());
        Self { work, begin, tokens, starts, documents }
    }

    fn push(&mut self, file: u32, at: u64, tokens: &[u32], bytes: u64) {
        if !self.begin.wants(file, at) {
            return;
        }
        let is_begun = (file, at) == (self.begin.file, self.begin.at);
        let done = if is_begun { self.begin.tokens } else { 0 };
        let Some(left) = tokens.get(done as usize..).filter(|left| !left.is_empty()) else {
            return;
        };
        self.starts.push(done == 0);
        self.starts.resize(self.starts.len() + left.len() - 1, false);
        self.tokens.extend_from_slice(left);
        let done = Cut { file, at, tokens: done };
        self.documents.push_back(Waiting { done, left: left.len(), bytes });
    }

    /// Makes the shard `file` of the first `count` tokens.
    fn cut(&mut self, split: Split, file: String, count: usize, dtype: TokenType) -> Result<Shard> {
        let (tokens, starts) = (&self.tokens[..count], &self.starts[..count]);
        let bytes = shard::encode(dtype, tokens, starts).map_err(|error| Error::Malformed {
            place: file.clone(),
            reason: format!("it cannot be written: {error}"),
        })?;
        for &token in tokens {
            self.work.counts[token as usize] += 1;
        }
        let entry = ShardEntry {
            file,
            tokens: count as u64,
            documents: starts.iter().filter(|&&start| start).count() as u64,
            bytes: bytes.len() as u64,
            digest: Digest::of(&bytes),
        };
        self.tokens.drain(..count);
        self.starts.drain(..count);
        self.work.shards += 1;
        self.work.tokens += count as u64;
        let mut left = count;
        while let Some(document) = self.documents.front_mut().filter(|_| left > 0) {
            let taken = document.left.min(left);
            left -= taken;
            document.left -= taken;
            document.done.tokens += taken as u64;
            self.work.cut = document.done;
            if document.left == 0 {
                self.work.documents += 1;
                self.work.bytes += document.bytes;
                self.documents.pop_front();
            }
        }
        Ok(Shard { split, entry, bytes })
    }
}

impl SplitWork {
    /// The split with all its shards.
    pub(super) fn manifest(&self, shards: Vec<ShardEntry>) -> SplitManifest {
        let Self { tokens, documents, bytes, .. } = *self;
        SplitManifest { tokens, documents, bytes, shards }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A record: its file, its number, and the document when it is one.
    type Given = (u32, u64, Option<(Split, Vec<u32>)>);

    /// Records as they come.
    fn records(seed: &[(u8, u16)]) -> Vec<Given> {
        let (mut file, mut at) = (0, 0);
        let mut records = Vec::new();
        for &(kind, length) in seed {
            if kind % 7 == 0 {
                (file, at) = (file + 1 + u32::from(kind) / 100, 0);
            }
            at += 1 + u64::from(kind % 2);
            let split = if kind % 5 == 0 { Split::Validation } else { Split::Train };
            let tokens = (0..u32::from(length) % 60 + 1).map(|t| t % 50).collect();
            records.push((file, at, (kind % 11 != 0).then_some((split, tokens))));
        }
        records
    }

    fn packed(record: &Option<(Split, Vec<u32>)>) -> Packed {
        match record {
            None => Packed::Malformed("no text".to_owned()),
            Some((split, tokens)) => {
                Packed::Document { split: *split, tokens: tokens.clone(), bytes: 3 }
            }
        }
    }

    /// Takes the records from where the work begins; the work after each shard, and the shards.
    fn pack(records: &[Given], work: Work) -> (Vec<(Work, ShardEntry)>, Counts) {
        let file = work.file;
        let mut packer = Packer::new(Names::of(&"test"), work, 0, 37, TokenType::U16);
        let mut shards = Vec::new();
        let wanted = records.iter().filter(|record| record.0 >= file);
        for (file, at, record) in wanted {
            packer.take(*file, *at, packed(record));
            while let Some(shard) = packer.cut(false).unwrap() {
                shards.push((packer.work(), shard.entry));
            }
        }
        while let Some(shard) = packer.cut(true).unwrap() {
            shards.push((packer.work(), shard.entry));
        }
        (shards, packer.counts())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn from_the_end_of_any_shard_the_rest_is_the_same(
            seed in prop::collection::vec((any::<u8>(), any::<u16>()), 1..200),
        ) {
            let records = records(&seed);
            let (whole, counts) = pack(&records, Work::new(50));
            for (number, (work, _)) in whole.iter().enumerate() {
                let (rest, again) = pack(&records, work.clone());
                prop_assert_eq!(&rest[..], &whole[number + 1..]);
                prop_assert_eq!(again, counts);
            }
            let last = whole.last().map(|(work, _)| work.clone()).unwrap_or_default();
            let documents = records.iter().filter(|record| record.2.is_some()).count() as u64;
            prop_assert_eq!(last.train.documents + last.validation.documents, documents);
            prop_assert_eq!(last.train.bytes + last.validation.bytes, 3 * documents);
            let counted: u64 = last.train.counts.iter().sum();
            prop_assert_eq!(counted, last.train.tokens);
        }
    }
}
