//! Datasets of any tokens, for measurements: nobody wrote the text, and no tokenizer made them.

use looptrain_proto::Digest;

use super::names::Names;
use super::prepare::write_manifest;
use super::{
    Dataset, DatasetManifest, ShardEntry, SourceSummary, Split, SplitManifest, TokenType,
    dataset_prefix, shard,
};
use crate::{Error, Result, Store, blocking};

/// Tokens of the validation split: a sequence or a few, of any length in use.
const VALIDATION_TOKENS: u64 = 1 << 18;

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    /// Tokens of the training split.
    pub tokens: u64,
    /// Tokens of a shard.
    pub shard_tokens: u64,
    /// Every token is below it.
    pub vocabulary_size: usize,
}

/// Makes the dataset `name` of tokens that look random and are the same each time; one that is there
/// is opened and left as it is.
///
/// # Errors
/// When the store fails, or somebody else has made another one meanwhile.
pub async fn synthetic(store: &Store, name: &str, what: Synthetic) -> Result<Dataset> {
    if let Some(dataset) = Dataset::open(store, name).await? {
        return Ok(dataset);
    }
    let Synthetic { tokens, shard_tokens, vocabulary_size } = what;
    let names = Names::of(&("synthetic", tokens, shard_tokens, vocabulary_size));
    let train = split(store, name, &names, Split::Train, tokens, what).await?;
    let validation = split(store, name, &names, Split::Validation, VALIDATION_TOKENS, what).await?;
    let manifest = DatasetManifest {
        version: DatasetManifest::VERSION,
        name: name.to_owned(),
        vocabulary_size: what.vocabulary_size,
        tokenizer: names.tokenizer(),
        tokenizer_digest: Digest::of(b""),
        end_of_text: 0,
        dtype: TokenType::for_vocabulary(what.vocabulary_size),
        train,
        validation,
        unigram_loss: None,
        source: SourceSummary::default(),
    };
    write_manifest(store, manifest, Vec::new(), &|_| ()).await
}

async fn split(
    store: &Store,
    name: &str,
    names: &Names,
    which: Split,
    tokens: u64,
    what: Synthetic,
) -> Result<SplitManifest> {
    let mut split = SplitManifest { tokens, documents: 1, ..SplitManifest::default() };
    let vocabulary = what.vocabulary_size as u64;
    for first in (0..tokens).step_by(what.shard_tokens as usize) {
        let count = what.shard_tokens.min(tokens - first);
        let file = names.shard(which, split.shards.len() as u64);
        let dtype = TokenType::for_vocabulary(what.vocabulary_size);
        let encoded = blocking(move || {
            let token = |place: u64| (scrambled(place) % vocabulary) as u32;
            let tokens: Vec<u32> = (first..first + count).map(token).collect();
            let mut starts = vec![false; tokens.len()];
            starts[0] = first == 0;
            shard::encode(dtype, &tokens, &starts).map(|bytes| (Digest::of(&bytes), bytes))
        });
        let malformed = |error: arrow::error::ArrowError| Error::Malformed {
            place: store.place(&file),
            reason: error.to_string(),
        };
        let (digest, bytes) = encoded.await?.map_err(malformed)?;
        split.shards.push(ShardEntry {
            file: file.clone(),
            tokens: count,
            documents: u64::from(first == 0),
            bytes: bytes.len() as u64,
            digest,
        });
        store.put_large(&format!("{}/{file}", dataset_prefix(name)), bytes).await?;
    }
    Ok(split)
}

/// The finalizer of SplitMix64.
fn scrambled(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
