//! Looking into a dataset: how long its documents are, and what some of them say.

use looptrain_proto::Digest;
use serde::Serialize;

use super::shard;
use super::{Dataset, Split, dataset_prefix};
use crate::{Error, Result, Store, blocking};

/// Tokens of a document that a sample shows.
const SHOWN: u64 = 60;

/// What the documents of a split are like.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// Documents, by their tokens with the end of text.
    pub histogram: Vec<Bucket>,
    /// Tokens of the longest one.
    pub longest: u64,
    /// Tokens per document.
    pub mean: f64,
}

/// Documents of about a length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Tokens at least.
    pub from: u64,
    /// Tokens at most.
    pub to: u64,
    /// Documents.
    pub documents: u64,
    /// Tokens of all of them.
    pub tokens: u64,
}

/// A document of a dataset, or its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SampleText {
    /// The shard in which it begins.
    pub shard: String,
    /// Its first token there.
    pub position: u64,
    /// Its tokens, or those of its beginning, as text.
    pub text: String,
    /// Whether there is more of it.
    pub goes_on: bool,
}

/// Reads all shards of a split, one after the other: the lengths of its documents, and `samples` of
/// them, evenly spread. `progress` is told bytes that have been read.
///
/// # Errors
/// When a shard cannot be read or is damaged.
pub async fn inspect(
    store: &Store,
    dataset: &Dataset,
    split: Split,
    samples: u64,
    mut progress: impl FnMut(u64),
) -> Result<(Lengths, Vec<SampleText>)> {
    let manifest = dataset.manifest();
    let described = manifest.split(split);
    let tokenizer = dataset.tokenizer().await?;
    let mut lengths = Counting::default();
    let mut texts = Vec::new();
    // The documents to show, by their number: the middle ones of as many equal parts.
    let samples = samples.min(described.documents);
    let documents = u128::from(described.documents);
    let middle = |part: u64| (2 * u128::from(part) + 1) * documents / (2 * u128::from(samples));
    let mut wanted = (0..samples).map(middle).peekable();
    let (mut read, mut number) = (0, 0);
    for entry in &described.shards {
        let key = format!("{}/{}", dataset_prefix(&manifest.name), entry.file);
        let bytes = store.get(&key).await?;
        let expected = entry.digest;
        let decoded = blocking(move || {
            let found = Digest::of(&bytes);
            if found != expected {
                return Err(format!("its digest is {found}, the manifest says {expected}"));
            }
            Ok((shard::decode(&bytes)?, shard::starts(&bytes)?))
        });
        let malformed = |reason| Error::Malformed { place: store.place(&key), reason };
        let (tokens, starts) = decoded.await?.map_err(malformed)?;
        let length = tokens.len() as u64;
        lengths.shard(length, &starts);
        for (index, &position) in starts.iter().enumerate() {
            if wanted.next_if_eq(&number).is_some() {
                let end = starts.get(index + 1).copied().unwrap_or(length);
                let shown = (end - position).min(SHOWN);
                let mut some = Vec::new();
                tokens.extend(&mut some, position as usize, shown as usize);
                let is_whole = some.last() == Some(&tokenizer.end_of_text());
                some.truncate(some.len() - usize::from(is_whole));
                let (shard, text) = (entry.file.clone(), tokenizer.decode(&some)?);
                texts.push(SampleText { shard, position, text, goes_on: !is_whole });
            }
            number += 1;
        }
        read += entry.bytes;
        progress(read);
    }
    Ok((lengths.finish(), texts))
}

/// Counts documents by the bits of their length.
#[derive(Default)]
struct Counting {
    buckets: Vec<(u64, u64)>,
    longest: u64,
    /// Tokens so far of the document that goes on.
    open: Option<u64>,
}

impl Counting {
    fn shard(&mut self, tokens: u64, starts: &[u64]) {
        let mut position = 0;
        for &start in starts {
            let open = self.open.map(|open| open + start - position);
            self.count(open);
            (self.open, position) = (Some(0), start);
        }
        self.open = self.open.map(|open| open + tokens - position);
    }

    fn count(&mut self, length: Option<u64>) {
        let Some(length) = length.filter(|length| *length > 0) else { return };
        let bucket = length.ilog2() as usize;
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, (0, 0));
        }
        self.buckets[bucket].0 += 1;
        self.buckets[bucket].1 += length;
        self.longest = self.longest.max(length);
    }

    fn finish(mut self) -> Lengths {
        let open = self.open.take();
        self.count(open);
        let sums = self.buckets.iter().fold((0, 0), |sum, b| (sum.0 + b.0, sum.1 + b.1));
        let bucket = |(bits, &(documents, tokens)): (usize, &(u64, u64))| Bucket {
            from: 1 << bits,
            to: (2 << bits) - 1,
            documents,
            tokens,
        };
        Lengths {
            histogram: self.buckets.iter().enumerate().map(bucket).collect(),
            longest: self.longest,
            mean: sums.1 as f64 / (sums.0.max(1)) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_that_goes_on_in_the_next_shard_is_counted_once_with_all_its_tokens() {
        let mut counting = Counting::default();
        counting.shard(10, &[0, 4]);
        counting.shard(10, &[]);
        counting.shard(5, &[2, 4]);
        let lengths = counting.finish();
        let counted: Vec<_> =
            lengths.histogram.iter().map(|b| (b.from, b.to, b.documents, b.tokens)).collect();
        // 4, then 6 + 10 + 2, then 2, then 1.
        assert_eq!(
            counted,
            [(1, 1, 1, 1), (2, 3, 1, 2), (4, 7, 1, 4), (8, 15, 0, 0), (16, 31, 1, 18)]
        );
        assert_eq!((lengths.longest, lengths.mean), (18, 25.0 / 4.0));
    }
}
