//! Making a dataset: documents of a source, a tokenizer, token shards, and the manifest last.
//!
//! The work that takes cores runs on threads of its own (see [`super::making`]); finished files come
//! back over a bounded channel to the async side, which writes them, so that a store that fails stops
//! the work. What was finished is found again: see [`super::resume`].
//!
//! Several makers may be at work under one name, knowing nothing of each other: their files have
//! different names unless they hold the same bytes ([`super::names`]), and of their manifests the one
//! that is put first stands. All others end with an error, unless theirs says the same; and whoever
//! comes to an end removes what the manifest that stands does not name.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use looptrain_proto::spec::Format;
use looptrain_proto::{Digest, spec};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::making::Making;
use super::names::Names;
use super::pack::{Counts, Packer, Work};
use super::read::unigram_loss;
use super::resume::{Entries, Left, is_begun, tidy};
use super::source::{Exercises, Files, Mano, Sample, Source, first_texts};
use super::train_tokenizer::read_tokenizer;
use super::{
    Dataset, DatasetManifest, Input, ShardEntry, SourceSummary, Split, TextTokenizer, TokenType,
    dataset_prefix, manifest_key,
};
use crate::{Error, Result, Store, blocking};

/// Half-written files of killed writers go when they are this old.
const STALE: Duration = Duration::from_secs(3600);

/// What to make a dataset from.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Where documents come from.
    pub origin: Origin,
    /// Threads that tokenize; as many as there are cores by default. Changes nothing that is written.
    pub threads: Option<usize>,
}

/// Where documents come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// Text, as a spec describes it.
    Text(spec::Source),
    /// Exercises in modular arithmetic.
    Mano {
        /// Which ones.
        mano: Mano,
        /// Tokens per shard.
        shard_tokens: u64,
    },
}

impl Recipe {
    /// What the manifest calls the source.
    fn options(&self) -> spec::Source {
        match &self.origin {
            Origin::Text(source) => source.clone(),
            Origin::Mano { mano, shard_tokens } => mano.options(*shard_tokens),
        }
    }
}

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
    /// An earlier preparation with the same options is gone on with.
    Resumed {
        /// Shards of both splits that are there.
        shards: u64,
        /// Tokens in them.
        tokens: u64,
    },
    /// What lies there is of other options or inputs, or damaged; it goes when this one is complete.
    Restarted,
    /// A record is left out; told of the first ones alone.
    Malformed {
        /// File, and line or row.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Text is being turned into tokens.
    Tokenizing {
        /// Bytes done, as they lie in the files.
        bytes: u64,
        /// Bytes of all files.
        total_bytes: u64,
        /// Tokens so far.
        tokens: u64,
        /// Shards of both splits that are in the store.
        shards: u64,
        /// Records left out so far.
        malformed: u64,
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
pub(super) enum Output {
    Event(PrepareEvent),
    File(String, Bytes),
}

/// Makes the dataset `name` from `source`; one that is there already and was made with the same
/// options is opened and left as it is, and one that was begun with them is gone on with. What is
/// found beside a complete one, left by others, is removed.
///
/// `progress` is called on the calling task, between awaits.
///
/// # Errors
/// When there is no text or too little of it, a file cannot be read, too many records are malformed,
/// or the store fails: the store then has no such dataset. [`Error::OtherSource`] when it has one
/// made with other options, [`Error::Conflict`] when somebody else has made another one meanwhile.
pub async fn prepare(
    store: &Store,
    name: &str,
    source: &spec::Source,
    progress: &(dyn Fn(PrepareEvent) + Send + Sync),
) -> Result<Dataset> {
    let recipe = Recipe { origin: Origin::Text(source.clone()), threads: None };
    prepare_from(store, name, &recipe, progress).await
}

/// As [`prepare`], from any origin.
///
/// # Errors
/// As [`prepare`].
pub async fn prepare_from(
    store: &Store,
    name: &str,
    recipe: &Recipe,
    progress: &(dyn Fn(PrepareEvent) + Send + Sync),
) -> Result<Dataset> {
    let options = recipe.options();
    if let Some(dataset) = Dataset::open(store, name).await? {
        dataset.check_source(&options)?;
        tidy_up(store, name, &[]).await;
        return Ok(dataset);
    }
    store.sweep(&dataset_prefix(name), STALE).await?;
    let given = match (&recipe.origin, &options.tokenizer) {
        (Origin::Mano { mano, .. }, _) => Some(mano.tokenizer()),
        (Origin::Text(_), Some(place)) => Some(read_tokenizer(place).await?),
        (Origin::Text(_), None) => None,
    };
    let (sender, mut outputs) = mpsc::channel(2);
    let (name_, recipe, runtime) = (name.to_owned(), recipe.clone(), Handle::current());
    let store_ = store.clone();
    let maker = Maker { store: store_, name: name_, recipe, options, given, runtime, sender };
    let mut making = std::pin::pin!(blocking(move || maker.make()));
    let mut made = None;
    // The channel closes when the maker is done; its result says how.
    loop {
        tokio::select! {
            output = outputs.recv() => match output {
                Some(Output::Event(event)) => progress(event),
                Some(Output::File(file, bytes)) => {
                    let key = format!("{}/{file}", dataset_prefix(name));
                    store.put_large(&key, bytes).await?;
                }
                None => break,
            },
            result = &mut making, if made.is_none() => made = Some(result?),
        }
    }
    let (manifest, leftovers) = match made {
        Some(result) => result?,
        None => making.await??,
    };
    write_manifest(store, manifest, leftovers, progress).await
}

/// Shards that are asked for at a time.
const CONCURRENT_CHECKS: usize = 32;

/// Whether all shards that a manifest names are there in their right size.
pub(super) async fn check_shards(store: &Store, manifest: &DatasetManifest) -> Result<()> {
    let check = async |shard: &ShardEntry| {
        let key = format!("{}/{}", dataset_prefix(&manifest.name), shard.file);
        let place = store.place(&key);
        match store.size(&key).await? {
            Some(size) if size == shard.bytes => Ok(()),
            found => {
                let has = found.map_or("is not there".into(), |size| format!("has {size} bytes"));
                let reason = format!(
                    "it {has}, though {} were written: somebody has removed or replaced it \
                     meanwhile; run the same command again",
                    shard.bytes
                );
                Err(Error::Conflict { place, reason })
            }
        }
    };
    let shards = manifest.train.shards.iter().chain(&manifest.validation.shards);
    let checks: Vec<_> = shards.map(check).collect();
    futures::stream::iter(checks).buffered(CONCURRENT_CHECKS).try_collect().await
}

/// Puts the manifest of a dataset whose other files are there, and removes what is of no use from then
/// on; `leftovers` are files of this maker that it does not name.
pub(super) async fn write_manifest(
    store: &Store,
    manifest: DatasetManifest,
    mut leftovers: Vec<String>,
    progress: &(dyn Fn(PrepareEvent) + Send + Sync),
) -> Result<Dataset> {
    let name = manifest.name.clone();
    let json = serde_json::to_vec_pretty(&manifest).map_err(|error| Error::Malformed {
        place: store.place(&manifest_key(&name)),
        reason: error.to_string(),
    })?;
    match check_shards(store, &manifest).await {
        Ok(()) => drop(store.put_if_absent(&manifest_key(&name), json).await?),
        // Who was first has removed what his manifest does not name.
        Err(_) if Dataset::open(store, &name).await?.is_some() => {}
        Err(missing) => return Err(missing),
    }
    let dataset = Dataset::open(store, &name).await?;
    let dataset =
        dataset.ok_or_else(|| Error::NotFound { place: store.place(&manifest_key(&name)) })?;
    leftovers.extend(manifest.files().map(str::to_owned));
    tidy_up(store, &name, &leftovers).await;
    // Who made the same dataset, or had the same tokens from elsewhere, has what he wanted.
    if dataset.manifest().digest() != manifest.digest() {
        return Err(Error::Conflict {
            place: store.place(&manifest_key(&name)),
            reason: "another preparation has made another dataset of this name meanwhile, which \
                     stands; use it, or choose another name for this one"
                .into(),
        });
    }
    progress(PrepareEvent::Done {
        train_tokens: manifest.train.tokens,
        validation_tokens: manifest.validation.tokens,
        shards: manifest.train.shards.len() + manifest.validation.shards.len(),
    });
    Ok(dataset)
}

/// As [`tidy`]; the dataset is none the worse when it fails.
async fn tidy_up(store: &Store, name: &str, known: &[String]) {
    if let Err(error) = tidy(store, name, known).await {
        tracing::warn!(dataset = name, %error, "files that are of no use are left beside it");
    }
}

/// Does the work, away from the async threads.
pub(super) struct Maker {
    store: Store,
    name: String,
    pub(super) recipe: Recipe,
    pub(super) options: spec::Source,
    /// The tokenizer, unless it is to be trained.
    given: Option<Vec<u8>>,
    runtime: Handle,
    sender: mpsc::Sender<Output>,
}

impl Maker {
    /// The manifest, and the files that are of no use once it is written.
    fn make(mut self) -> Result<(DatasetManifest, Vec<String>)> {
        let found = self.find()?;
        let source = found.source();
        let sources = self.sources(source);
        let names = Names::of(&(sources, self.given.as_ref().map(|json| Digest::of(json))));
        let (tokenizer, work, mut entries) = self.begin(&found, &names, sources)?;
        let dtype = TokenType::for_vocabulary(tokenizer.vocabulary_size());
        let making = Making {
            maker: &self,
            source,
            tokenizer: &tokenizer,
            names: &names,
            begin: &work,
            total_bytes: (0..source.files()).map(|file| source.bytes(file)).sum(),
            sources,
        };
        let (shard_tokens, passed) = (self.options.shard_tokens, source.first(work.from()) - 1);
        let packer = Packer::new(names.clone(), work.clone(), passed, shard_tokens, dtype);
        let (work, counts) = making.pack(packer, &mut entries)?;
        if work.train.tokens == 0 || work.validation.tokens == 0 {
            let (train, held) = (work.train.documents, work.validation.documents);
            return Err(self.text(format!(
                "{train} documents are to train and {held} to validate, and both are needed; give it more text, or hold out another share (validation_fraction, --validation)"
            )));
        }
        let leftovers = entries.files(&names);
        let manifest = DatasetManifest {
            version: DatasetManifest::VERSION,
            dtype,
            vocabulary_size: tokenizer.vocabulary_size(),
            tokenizer: names.tokenizer(),
            tokenizer_digest: tokenizer.digest(),
            end_of_text: tokenizer.end_of_text(),
            unigram_loss: Some(unigram_loss(&work.train.counts, &work.validation.counts)),
            train: work.train.manifest(std::mem::take(entries.split(Split::Train))),
            validation: work.validation.manifest(std::mem::take(entries.split(Split::Validation))),
            source: found.summary(&self.options, counts),
            name: self.name,
        };
        Ok((manifest, leftovers))
    }

    fn find(&self) -> Result<Found> {
        let found = match (&self.recipe.origin, self.options.format) {
            (Origin::Mano { mano, .. }, _) => Exercises::new(*mano).map(Found::Exercises),
            (Origin::Text(source), Format::Sample) => {
                let progress = |files, bytes| {
                    let event = PrepareEvent::Collecting { files, bytes };
                    self.event(event).map_err(|error| error.to_string())
                };
                Sample::take(source, progress).map(Found::Sample)
            }
            (Origin::Text(source), _) => {
                Files::find(source, self.runtime.clone()).map(Found::Files)
            }
        };
        let found = found.map_err(|reason| self.text(reason))?;
        if let Found::Sample(sample) = &found {
            let (documents, bytes) = (sample.documents(), sample.bytes(0));
            self.event(PrepareEvent::Collected { documents, bytes })?;
        }
        Ok(found)
    }

    /// Digest of the options that decide what is written, and of the source's files.
    fn sources(&self, source: &dyn Source) -> Digest {
        // How many records may be malformed decides whether there is a dataset, not what is in it.
        let options = spec::Source { max_malformed: 0.0, ..self.options.clone() };
        let decides = (options, source.digest());
        let text = serde_json::to_vec(&decides).expect("options and digests have a JSON form");
        Digest::of(&text)
    }

    /// The tokenizer, and how far the work has come.
    fn begin(
        &mut self,
        found: &Found,
        names: &Names,
        sources: Digest,
    ) -> Result<(TextTokenizer, Work, Entries)> {
        let end = self.options.end_of_text.clone();
        let left = Left::find(&self.store, &self.name, names, sources);
        if let Some(left) = self.runtime.block_on(left)? {
            let tokenizer = TextTokenizer::from_json(&left.tokenizer, end.as_deref())?;
            let work = left.progress.work.clone();
            let size = tokenizer.vocabulary_size();
            if work.train.counts.len() == size && work.validation.counts.len() == size {
                let shards = work.train.shards + work.validation.shards;
                let tokens = work.train.tokens + work.validation.tokens;
                self.event(PrepareEvent::Resumed { shards, tokens })?;
                return Ok((tokenizer, work, left.entries()));
            }
        }
        if self.runtime.block_on(is_begun(&self.store, &self.name))? {
            self.event(PrepareEvent::Restarted)?;
        }
        let (json, tokenizer) = match self.given.take() {
            Some(json) => {
                let tokenizer = TextTokenizer::from_json(&json, end.as_deref())?;
                (json, tokenizer)
            }
            None => self.train_tokenizer(found)?,
        };
        self.send(Output::File(names.tokenizer(), json.into()))?;
        let work = Work::new(tokenizer.vocabulary_size());
        Ok((tokenizer, work, Entries::default()))
    }

    fn train_tokenizer(&self, found: &Found) -> Result<(Vec<u8>, TextTokenizer)> {
        let vocabulary = self.options.tokenizer_vocabulary;
        let texts = match found {
            Found::Sample(sample) => sample.texts(self.options.tokenizer_bytes)?,
            found => first_texts(found.source(), self.options.tokenizer_bytes)?,
        };
        let bytes = texts.iter().map(|text| text.len() as u64).sum();
        self.event(PrepareEvent::TrainingTokenizer { bytes, vocabulary })?;
        let json = TextTokenizer::train(&texts, vocabulary)?;
        let tokenizer = TextTokenizer::from_json(&json, None)?;
        let vocabulary = tokenizer.vocabulary_size();
        self.event(PrepareEvent::TokenizerTrained { vocabulary })?;
        Ok((json, tokenizer))
    }

    pub(super) fn event(&self, event: PrepareEvent) -> Result<()> {
        self.send(Output::Event(event))
    }

    /// Fails when nobody waits for the dataset any more.
    pub(super) fn send(&self, output: Output) -> Result<()> {
        self.sender.blocking_send(output).map_err(|_| Error::Interrupted)
    }

    pub(super) fn text(&self, reason: String) -> Error {
        Error::Text { dataset: self.name.clone(), reason }
    }
}

/// The source of a dataset.
enum Found {
    Sample(Sample),
    Files(Files),
    Exercises(Exercises),
}

impl Found {
    fn source(&self) -> &dyn Source {
        match self {
            Self::Sample(sample) => sample,
            Self::Files(files) => files,
            Self::Exercises(exercises) => exercises,
        }
    }

    fn summary(&self, options: &spec::Source, counts: Counts) -> SourceSummary {
        let input = |(url, bytes): (&str, u64)| Input { url: url.to_owned(), bytes };
        let (files, duplicates, unreadable) = match self {
            Self::Sample(sample) => sample.counts(),
            other => (other.source().files() as u64, 0, 0),
        };
        SourceSummary {
            options: options.clone(),
            files,
            inputs: match self {
                Self::Files(files) => {
                    files.list().take(SourceSummary::MAX_INPUTS).map(input).collect()
                }
                _ => Vec::new(),
            },
            inputs_digest: Some(self.source().digest()),
            records: counts.records,
            malformed: counts.malformed,
            empty: counts.empty,
            duplicates,
            unreadable,
        }
    }
}
