//! Making a dataset: collect text, train the tokenizer, write token shards, write the manifest.
//!
//! The work that takes cores runs on a blocking thread (and rayon's); finished files come back over
//! a bounded channel to the async side, which writes them. So memory holds a few shards whatever
//! the size of the text, and a store that fails stops the work. Nothing is a dataset until its
//! manifest is written, last: an interrupted run is simply done again, over the same files.

use std::ops::Range;

use bytes::Bytes;
use looptrain_proto::{Digest, spec};
use rayon::prelude::*;
use tokio::sync::mpsc;

use super::collect::{self, Collection, Document};
use super::read::unigram_loss;
use super::shard;
use super::{
    Dataset, DatasetManifest, ShardEntry, SourceSummary, SplitManifest, TextTokenizer, TokenType,
    dataset_prefix, manifest_key,
};
use crate::{Error, Result, Store, blocking};

/// Text tokenized at once, in bytes.
const BATCH_BYTES: u64 = 4 << 20;

/// How far the making of a dataset has come.
#[derive(Clone, Debug, PartialEq)]
pub enum PrepareEvent {
    /// Text is being collected.
    Collecting {
        /// Documents taken so far.
        files: u64,
        /// Bytes taken so far.
        bytes: u64,
    },
    /// All text is known.
    Collected {
        /// Documents.
        documents: u64,
        /// Bytes of text.
        bytes: u64,
    },
    /// The tokenizer is being trained.
    TrainingTokenizer {
        /// Bytes of text it is trained on.
        bytes: u64,
        /// Entries asked for.
        vocabulary: usize,
    },
    /// The tokenizer is there.
    TokenizerTrained {
        /// Entries it has: fewer than asked for when the text gives no more.
        vocabulary: usize,
    },
    /// Text is being turned into tokens.
    Tokenizing {
        /// Bytes of text done.
        bytes: u64,
        /// Bytes of text in all.
        total_bytes: u64,
        /// Tokens so far.
        tokens: u64,
    },
    /// The manifest is written.
    Done {
        /// Tokens of the training split.
        train_tokens: u64,
        /// Tokens of the validation split.
        validation_tokens: u64,
        /// Files of both.
        shards: usize,
    },
}

/// What the working thread hands over.
enum Output {
    Event(PrepareEvent),
    File(String, Bytes),
}

/// Makes the dataset `name` from `source`; one that is there already and was made with the same
/// options is opened and left as it is.
///
/// `progress` is called on the calling task, between awaits.
///
/// # Errors
/// When there is no text or too little of it, a file cannot be read, or the store fails: the store
/// then has no such dataset. [`Error::OtherSource`] when it has one made with other options.
pub async fn prepare(
    store: &Store,
    name: &str,
    source: &spec::Source,
    progress: &(dyn Fn(PrepareEvent) + Send + Sync),
) -> Result<Dataset> {
    if let Some(dataset) = Dataset::open(store, name).await? {
        dataset.check_source(source)?;
        return Ok(dataset);
    }
    let (sender, mut outputs) = mpsc::channel(2);
    let maker = Maker { name: name.to_owned(), source: source.clone(), sender };
    let mut making = std::pin::pin!(blocking(move || maker.make()));
    let mut made = None;
    // The channel closes when the maker is done; its result says how.
    loop {
        tokio::select! {
            output = outputs.recv() => match output {
                Some(Output::Event(event)) => progress(event),
                Some(Output::File(file, bytes)) => {
                    store.put(&format!("{}/{file}", dataset_prefix(name)), bytes).await?;
                }
                None => break,
            },
            result = &mut making, if made.is_none() => made = Some(result?),
        }
    }
    let manifest = match made {
        Some(result) => result?,
        None => making.await??,
    };
    write_manifest(store, manifest, progress).await
}

async fn write_manifest(
    store: &Store,
    manifest: DatasetManifest,
    progress: &(dyn Fn(PrepareEvent) + Send + Sync),
) -> Result<Dataset> {
    let name = manifest.name.clone();
    let json = serde_json::to_vec_pretty(&manifest).map_err(|error| Error::Malformed {
        place: store.place(&manifest_key(&name)),
        reason: error.to_string(),
    })?;
    // Whoever made the same dataset at the same time wrote the same files.
    store.put_if_absent(&manifest_key(&name), json).await?;
    let dataset = Dataset::open(store, &name).await?;
    let dataset =
        dataset.ok_or_else(|| Error::NotFound { place: store.place(&manifest_key(&name)) })?;
    progress(PrepareEvent::Done {
        train_tokens: manifest.train.tokens,
        validation_tokens: manifest.validation.tokens,
        shards: manifest.train.shards.len() + manifest.validation.shards.len(),
    });
    Ok(dataset)
}

/// Does the work, away from the async threads.
struct Maker {
    name: String,
    source: spec::Source,
    sender: mpsc::Sender<Output>,
}

impl Maker {
    fn make(self) -> Result<DatasetManifest> {
        let collection = self.collect()?;
        let (train, validation) = self.hold_out(&collection)?;
        let tokenizer = self.train_tokenizer(&train)?;
        let mut tokens = Tokenizing {
            dtype: TokenType::for_vocabulary(tokenizer.vocabulary_size()),
            maker: &self,
            tokenizer: &tokenizer,
            total_bytes: collection.bytes,
            done_bytes: 0,
            tokens: 0,
        };
        let (train, train_counts) = tokens.split("tokens", &train)?;
        let (validation, validation_counts) = tokens.split("validation", &validation)?;
        Ok(DatasetManifest {
            version: DatasetManifest::VERSION,
            dtype: tokens.dtype,
            vocabulary_size: tokenizer.vocabulary_size(),
            tokenizer_digest: tokenizer.digest(),
            train,
            validation,
            unigram_loss: Some(unigram_loss(&train_counts, &validation_counts)),
            source: SourceSummary {
                options: self.source.clone(),
                files: collection.files,
                duplicates: collection.duplicates,
                unreadable: collection.unreadable,
            },
            name: self.name,
        })
    }

    fn collect(&self) -> Result<Collection> {
        let home = collect::cargo_home();
        let progress = |files, bytes| {
            let event = PrepareEvent::Collecting { files, bytes };
            self.send(Output::Event(event)).map_err(|error| error.to_string())
        };
        let collection = collect::collect(&self.source, home.as_deref(), progress)
            .map_err(|reason| self.text(reason))?;
        let (documents, bytes) = (collection.documents.len() as u64, collection.bytes);
        self.send(Output::Event(PrepareEvent::Collected { documents, bytes }))?;
        Ok(collection)
    }

    /// Training and validation documents, each in collection order. Validation takes documents by
    /// the hash of their path until it has its share of the bytes: more text later moves few of
    /// them.
    fn hold_out(&self, collection: &Collection) -> Result<(Vec<Document>, Vec<Document>)> {
        let documents = &collection.documents;
        if documents.len() < 2 {
            return Err(self.text(format!(
                "too little text for a validation split: {} bytes in one document; name more files in datasets.source.paths or raise max_bytes",
                collection.bytes
            )));
        }
        let mut drawn: Vec<usize> = (0..documents.len()).collect();
        drawn.sort_by_key(|&index| *documents[index].lot.as_bytes());
        let wanted = (self.source.validation_fraction * collection.bytes as f64).ceil() as u64;
        let mut held = vec![false; documents.len()];
        let mut bytes = 0;
        // One document at least stays for training.
        for &index in &drawn[..documents.len() - 1] {
            held[index] = true;
            bytes += documents[index].bytes;
            if bytes >= wanted {
                break;
            }
        }
        let pick = |validation: bool| {
            let picked = documents.iter().zip(&held).filter(|&(_, &held)| held == validation);
            picked.map(|(document, _)| document.clone()).collect::<Vec<_>>()
        };
        Ok((pick(false), pick(true)))
    }

    fn train_tokenizer(&self, documents: &[Document]) -> Result<TextTokenizer> {
        let vocabulary = self.source.tokenizer_vocabulary;
        // Documents come in the order of a hash: the first ones are an even sample of all.
        let sample = &documents[take(documents, 0, self.source.tokenizer_bytes)];
        let bytes = sample.iter().map(|document| document.bytes).sum();
        self.send(Output::Event(PrepareEvent::TrainingTokenizer { bytes, vocabulary }))?;
        let texts: Vec<String> =
            sample.par_iter().map(|document| self.read(document)).collect::<Result<_>>()?;
        let json = TextTokenizer::train(&texts, vocabulary)?;
        let tokenizer = TextTokenizer::from_json(&json)?;
        self.send(Output::File("tokenizer.json".to_owned(), json.into()))?;
        let vocabulary = tokenizer.vocabulary_size();
        self.send(Output::Event(PrepareEvent::TokenizerTrained { vocabulary }))?;
        Ok(tokenizer)
    }

    fn read(&self, document: &Document) -> Result<String> {
        let failed =
            |error| self.text(format!("cannot read {}: {error}", document.path().display()));
        document.read().map_err(failed)
    }

    /// Fails when nobody waits for the dataset any more.
    fn send(&self, output: Output) -> Result<()> {
        self.sender.blocking_send(output).map_err(|_| Error::Interrupted)
    }

    fn text(&self, reason: String) -> Error {
        Error::Text { dataset: self.name.clone(), reason }
    }
}

/// The documents from `first` on that hold about `bytes` of text, at least one.
fn take(documents: &[Document], first: usize, bytes: u64) -> Range<usize> {
    let mut sum = 0;
    let full = documents[first..].iter().position(|document| {
        sum += document.bytes;
        sum >= bytes
    });
    first..full.map_or(documents.len(), |last| first + last + 1)
}

/// The tokenizing of both splits.
struct Tokenizing<'a> {
    maker: &'a Maker,
    tokenizer: &'a TextTokenizer,
    dtype: TokenType,
    total_bytes: u64,
    done_bytes: u64,
    tokens: u64,
}

impl Tokenizing<'_> {
    /// Writes the shards of one split; gives also how often each token is in it.
    fn split(&mut self, prefix: &str, documents: &[Document]) -> Result<(SplitManifest, Vec<u64>)> {
        let mut counts = vec![0; self.tokenizer.vocabulary_size()];
        let mut stream = Stream { prefix, ..Stream::default() };
        let mut next = 0;
        while next < documents.len() {
            let batch = take(documents, next, BATCH_BYTES);
            next = batch.end;
            let encode = |document: &Document| {
                let tokens = self.tokenizer.encode(&self.maker.read(document)?)?;
                Ok((tokens, document.bytes))
            };
            let batch: Vec<(Vec<u32>, u64)> =
                documents[batch].par_iter().map(encode).collect::<Result<_>>()?;
            for (mut tokens, bytes) in batch {
                tokens.push(TextTokenizer::END_OF_TEXT);
                for &token in &tokens {
                    counts[token as usize] += 1;
                }
                stream.split.documents += 1;
                stream.split.bytes += bytes;
                stream.split.tokens += tokens.len() as u64;
                self.done_bytes += bytes;
                self.tokens += tokens.len() as u64;
                stream.push(&tokens);
                while stream.tokens.len() as u64 >= self.maker.source.shard_tokens {
                    self.cut(&mut stream, self.maker.source.shard_tokens as usize)?;
                }
            }
            self.maker.send(Output::Event(PrepareEvent::Tokenizing {
                bytes: self.done_bytes,
                total_bytes: self.total_bytes,
                tokens: self.tokens,
            }))?;
        }
        if !stream.tokens.is_empty() {
            let rest = stream.tokens.len();
            self.cut(&mut stream, rest)?;
        }
        Ok((stream.split, counts))
    }

    /// Makes a shard of the first `count` tokens of the stream.
    fn cut(&self, stream: &mut Stream<'_>, count: usize) -> Result<()> {
        let file = format!("{}-{:05}.arrow", stream.prefix, stream.split.shards.len());
        let (tokens, starts) = (&stream.tokens[..count], &stream.starts[..count]);
        let bytes = shard::encode(self.dtype, tokens, starts)
            .map_err(|error| self.maker.text(format!("cannot write {file}: {error}")))?;
        stream.split.shards.push(ShardEntry {
            file: file.clone(),
            tokens: count as u64,
            documents: starts.iter().filter(|&&start| start).count() as u64,
            bytes: bytes.len() as u64,
            digest: Digest::of(&bytes),
        });
        stream.tokens.drain(..count);
        stream.starts.drain(..count);
        self.maker.send(Output::File(file, bytes))
    }
}

/// Tokens on their way into shards.
#[derive(Default)]
struct Stream<'a> {
    prefix: &'a str,
    split: SplitManifest,
    tokens: Vec<u32>,
    starts: Vec<bool>,
}

impl Stream<'_> {
    fn push(&mut self, document: &[u32]) {
        self.starts.push(true);
        self.starts.resize(self.starts.len() + document.len() - 1, false);
        self.tokens.extend_from_slice(document);
    }
}
