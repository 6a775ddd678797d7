//! Whether a dataset is what its manifest says: every file is read and hashed again.

use futures::StreamExt;
use looptrain_proto::Digest;

use super::shard;
use super::{DatasetManifest, ShardEntry, Split, TextTokenizer, dataset_prefix};
use crate::{Error, Result, Store, blocking};

/// Files that are read at once.
const AT_ONCE: usize = 4;

/// A file of a dataset that is not what the manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFile {
    /// Where it lies.
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Reads every file of a dataset and checks size, digest, tokens and document boundaries against
/// the manifest; gives the bad ones. `progress` is told files and bytes that have been read.
///
/// # Errors
/// When the store fails, but for files that are missing.
pub async fn verify(
    store: &Store,
    manifest: &DatasetManifest,
    mut progress: impl FnMut(u64, u64),
) -> Result<Vec<BadFile>> {
    let mut bad = Vec::new();
    bad.extend(check_tokenizer(store, manifest).await?);
    let shards = [Split::Train, Split::Validation]
        .into_iter()
        .flat_map(|split| manifest.split(split).shards.iter());
    let mut checks = futures::stream::iter(
        shards.map(|entry| async move { (entry, check_shard(store, manifest, entry).await) }),
    )
    .buffered(AT_ONCE);
    let (mut files, mut bytes) = (1, 0);
    while let Some((entry, check)) = checks.next().await {
        bad.extend(check?);
        files += 1;
        bytes += entry.bytes;
        progress(files, bytes);
    }
    Ok(bad)
}

async fn check_tokenizer(store: &Store, manifest: &DatasetManifest) -> Result<Option<BadFile>> {
    let key = manifest.tokenizer_key();
    let (expected, end) = (manifest.tokenizer_digest, manifest.end_of_text);
    let vocabulary = manifest.vocabulary_size;
    let check = move |bytes: bytes::Bytes| {
        check_digest(&bytes, expected)?;
        let tokenizer = TextTokenizer::with_end_of_text(&bytes, end);
        let tokenizer = tokenizer.map_err(|error| error.to_string())?;
        match tokenizer.vocabulary_size() == vocabulary {
            true => Ok(()),
            false => Err(format!(
                "it has {} entries, the manifest says {vocabulary}",
                tokenizer.vocabulary_size()
            )),
        }
    };
    check_file(store, &key, check).await
}

async fn check_shard(
    store: &Store,
    manifest: &DatasetManifest,
    entry: &ShardEntry,
) -> Result<Option<BadFile>> {
    let key = format!("{}/{}", dataset_prefix(&manifest.name), entry.file);
    let (entry, vocabulary) = (entry.clone(), manifest.vocabulary_size);
    let check = move |bytes: bytes::Bytes| {
        let size = bytes.len() as u64;
        if size != entry.bytes {
            return Err(format!("it has {size} bytes, the manifest says {}", entry.bytes));
        }
        check_digest(&bytes, entry.digest)?;
        let tokens = shard::decode(&bytes)?;
        let documents = shard::starts(&bytes)?.len() as u64;
        if (tokens.len() as u64, documents) != (entry.tokens, entry.documents) {
            return Err(format!(
                "it has {} tokens and {documents} document starts, the manifest says {} and {}",
                tokens.len(),
                entry.tokens,
                entry.documents
            ));
        }
        match tokens.largest() {
            Some(token) if token as usize >= vocabulary => {
                Err(format!("token {token} is not in the vocabulary of {vocabulary}"))
            }
            _ => Ok(()),
        }
    };
    check_file(store, &key, check).await
}

async fn check_file(
    store: &Store,
    key: &str,
    check: impl FnOnce(bytes::Bytes) -> std::result::Result<(), String> + Send + 'static,
) -> Result<Option<BadFile>> {
    let place = store.place(key);
    let found = match store.get(key).await {
        Ok(bytes) => blocking(move || check(bytes)).await?,
        Err(Error::NotFound { .. }) => Err("it is missing".to_owned()),
        Err(error) => return Err(error),
    };
    Ok(found.err().map(|reason| BadFile { place, reason }))
}

fn check_digest(bytes: &[u8], expected: Digest) -> std::result::Result<(), String> {
    let found = Digest::of(bytes);
    match found == expected {
        true => Ok(()),
        false => Err(format!("its digest is {found}, the manifest says {expected}")),
    }
}
