//! The blocks of shards, on their way from the store to whoever wants a few tokens of one: by the
//! memory of the process, the disk of the machine, and last the store. A block that comes by one of
//! these ways is hashed before anybody sees it; [`super::local`] is the short way for local files.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::future::try_join_all;
use looptrain_proto::Digest;
use tokio::sync::Semaphore;

use super::TokenType;
use super::cache::Cache;
use super::contents::{Contents, Ending};
use super::disk::{DiskCache, Found};
use super::hedge::{Hedge, Winner};
use super::local::{LocalFile, LocalReads};
use super::tree::{self, BLOCK};
use crate::{Error, Result, Store, Tries, blocking};

/// Reads of the store that are under way at once.
const READERS: usize = 32;

/// Memory for blocks, unless told otherwise.
const MEMORY: usize = 256 << 20;

/// Shards that are open at once, at most: a process may have 1,024 files and more.
const OPEN_FILES: usize = 256;

/// How much of the memory may be used for what is known of shards.
const CONTENTS_SHARE: usize = 4;

/// How datasets are read, and by whom together: datasets that are opened with one of these share its
/// memory. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    blocks: Cache<tree::BlockHash, Bytes>,
    contents: Cache<Digest, Arc<Contents>>,
    files: Cache<Digest, Arc<LocalFile>>,
    disk: Option<Arc<DiskCache>>,
    hedge: Hedge,
    readers: Semaphore,
    counts: Counts,
}

/// What [`Reading`] has room for.
#[derive(Clone, Debug)]
pub struct ReadingOptions {
    /// Bytes of memory for blocks.
    pub memory: usize,
    /// Where blocks are kept on the local disk, and in how many bytes.
    pub disk: Option<(PathBuf, u64)>,
}

impl Default for ReadingOptions {
    fn default() -> Self {
        Self { memory: MEMORY, disk: None }
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self::new(MEMORY, None)
    }
}

impl Inner {
    fn new(memory: usize, disk: Option<Arc<DiskCache>>) -> Self {
        Self {
            blocks: Cache::new(memory, Bytes::len),
            contents: Cache::new(memory / CONTENTS_SHARE, |contents| contents.bytes()),
            files: Cache::new(OPEN_FILES, |_| 1),
            disk,
            hedge: Hedge::default(),
            readers: Semaphore::new(READERS),
            counts: Counts::default(),
        }
    }
}

/// Where blocks have come from so far.
#[derive(Debug, Default)]
struct Counts {
    memory: AtomicU64,
    disk: AtomicU64,
    store: AtomicU64,
    store_bytes: AtomicU64,
    hedged: AtomicU64,
    overtaken: AtomicU64,
    damaged: AtomicU64,
}

/// A snapshot of where blocks have come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// Blocks that were in memory; of local files, reads of blocks that had been hashed before.
    pub memory: u64,
    /// Blocks that were on the local disk.
    pub disk: u64,
    /// Reads of the store.
    pub store: u64,
    /// Bytes that these gave.
    pub store_bytes: u64,
    /// Reads of the store that were slow and got a second one beside them.
    pub hedged: u64,
    /// Of these, those that the second one overtook.
    pub overtaken: u64,
    /// Blocks that were not what was written, in the cache on the disk or from the store, and were
    /// read again.
    pub damaged: u64,
}

/// Some tokens, and what holds them.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// A part of a block in memory.
    Block { dtype: TokenType, bytes: Bytes },
    /// A file of this machine, which has not been read yet.
    Local { file: Arc<LocalFile>, first: u64, count: u64 },
}

/// A shard as it lies in the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShardFile<'a> {
    pub(super) store: &'a Store,
    pub(super) key: &'a str,
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) tokens: u64,
    pub(super) dtype: TokenType,
    /// Where the dataset is, for the remedy.
    pub(super) dataset: &'a str,
}

impl Reading {
    /// With room as in `options`. A directory that cannot be made is warned of and done without.
    #[must_use]
    pub fn new(options: ReadingOptions) -> Self {
        let disk = options.disk.and_then(|(directory, limit)| {
            let opened = DiskCache::open(&directory, limit);
            let path = directory.display();
            opened
                .inspect_err(|error| tracing::warn!(%path, %error, "going on without the cache"))
                .ok()
        });
        Self { inner: Arc::new(Inner::new(options.memory, disk.map(Arc::new))) }
    }

    /// Where blocks have come from so far.
    #[must_use]
    pub fn counts(&self) -> ReadCounts {
        let Counts { memory, disk, store, store_bytes, hedged, overtaken, damaged } =
            &self.inner.counts;
        let [memory, disk, store, store_bytes, hedged, overtaken, damaged] =
            [memory, disk, store, store_bytes, hedged, overtaken, damaged]
                .map(|count| count.load(Ordering::Relaxed));
        ReadCounts { memory, disk, store, store_bytes, hedged, overtaken, damaged }
    }

    /// Adds what holds `count` tokens of a shard from `first` on to `out`.
    pub(super) async fn pieces(
        &self,
        shard: ShardFile<'_>,
        first: u64,
        count: u64,
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        if let Some(file) = self.local(shard).await? {
            out.push(Piece::Local { file, first, count });
            return Ok(());
        }
        let contents = self.contents(shard).await?;
        for range in contents.ranges(first, count) {
            self.range(shard, &contents, range, out).await?;
        }
        Ok(())
    }

    /// The shard as an open file, if it is one of this machine and not to be cached elsewhere.
    async fn local(&self, shard: ShardFile<'_>) -> Result<Option<Arc<LocalFile>>> {
        if self.inner.disk.is_some() {
            return Ok(None);
        }
        if let Some(file) = self.inner.files.peek(&shard.digest) {
            return Ok(Some(file));
        }
        let Some(path) = shard.store.local_path(shard.key) else { return Ok(None) };
        let contents = self.contents(shard).await?;
        let open = async {
            let (name, bytes) = (shard.store.place(shard.key), shard.bytes);
            let opened = blocking(move || LocalFile::open(&path, name, contents, bytes)).await?;
            opened.map(Arc::new).map_err(|error| shard.unreadable(&error))
        };
        self.inner.files.get(&shard.digest, open).await.map(Some)
    }

    /// Takes note of what was read of local files.
    pub(super) fn count(&self, reads: LocalReads) {
        self.inner.counts.store.fetch_add(reads.hashed, Ordering::Relaxed);
        self.inner.counts.store_bytes.fetch_add(reads.hashed * BLOCK, Ordering::Relaxed);
        self.inner.counts.memory.fetch_add(reads.trusted, Ordering::Relaxed);
    }

    /// Adds what holds some bytes of a shard's file to `out`. Tokens are as wide as a divisor of a
    /// block and begin at multiples of that, so that none is in two blocks.
    async fn range(
        &self,
        shard: ShardFile<'_>,
        contents: &Contents,
        range: Range<u64>,
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        let dtype = contents.dtype;
        let piece = |block: u64, bytes: &Bytes| {
            let start = block * BLOCK;
            let begin = (range.start.max(start) - start) as usize;
            let end = (range.end.min(start + BLOCK) - start) as usize;
            Piece::Block { dtype, bytes: bytes.slice(begin..end) }
        };
        let mut missing = Vec::new();
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            match self.inner.blocks.peek(&contents.hashes[block as usize]) {
                Some(bytes) if missing.is_empty() => {
                    self.inner.counts.memory.fetch_add(1, Ordering::Relaxed);
                    out.push(piece(block, &bytes));
                }
                _ => missing.push(block),
            }
        }
        let fetched = missing.iter().map(|&block| self.block(shard, contents, block as usize));
        for (block, bytes) in missing.iter().zip(try_join_all(fetched).await?) {
            out.push(piece(*block, &bytes));
        }
        Ok(())
    }

    async fn block(
        &self,
        shard: ShardFile<'_>,
        contents: &Contents,
        index: usize,
    ) -> Result<Bytes> {
        let name = contents.hashes[index];
        let begin = index as u64 * BLOCK;
        let length = (shard.bytes - begin).min(BLOCK);
        let genuine =
            move |bytes: &[u8]| bytes.len() as u64 == length && tree::hash(index, bytes) == name;
        let fetch = async {
            let checked = move |bytes: Vec<u8>| genuine(&bytes).then(|| Bytes::from(bytes));
            if let Some(bytes) = self.on_disk(name, checked).await? {
                return Ok(bytes);
            }
            let mut bytes = self.fetch(shard, begin..begin + length).await?;
            if !genuine(&bytes) {
                // On its way, it may be: once more.
                self.inner.counts.damaged.fetch_add(1, Ordering::Relaxed);
                bytes = self.fetch(shard, begin..begin + length).await?;
            }
            if !genuine(&bytes) {
                let found = Digest(tree::hash(index, &bytes));
                let place = format!("{} (bytes {begin} to {})", shard.key, begin + length - 1);
                return Err(shard.corrupt(&place, Digest(name), found));
            }
            self.put_on_disk(name, bytes.clone()).await?;
            Ok(bytes)
        };
        self.inner.blocks.get(&name, fetch).await
    }

    /// What is known of a shard, once its end, or all of it, has been read.
    async fn contents(&self, shard: ShardFile<'_>) -> Result<Arc<Contents>> {
        match self.inner.contents.peek(&shard.digest) {
            Some(contents) => Ok(contents),
            None => self.inner.contents.get(&shard.digest, self.read_contents(shard)).await,
        }
    }

    async fn read_contents(&self, shard: ShardFile<'_>) -> Result<Arc<Contents>> {
        let (bytes, digest) = (shard.bytes, shard.digest);
        let complete = move |ending: &[u8]| match Contents::of_ending(
            ending,
            bytes.checked_sub(ending.len() as u64)?,
        ) {
            Ok(Ending::Complete(contents, found)) if found == digest => Some(contents),
            _ => None,
        };
        // On the disk, an ending has the name of the file's digest, which no block has.
        let contents = match self.on_disk(digest.0, move |ending| complete(&ending)).await? {
            Some(contents) => contents,
            None => {
                let begin = Contents::guess(bytes);
                let mut ending = self.fetch(shard, begin..bytes).await?;
                if let Ok(Ending::From(begin)) = Contents::of_ending(&ending, begin) {
                    ending = self.fetch(shard, begin..bytes).await?;
                }
                match complete(&ending) {
                    Some(contents) => {
                        self.put_on_disk(digest.0, ending).await?;
                        contents
                    }
                    // Of before, or damaged: which of them, the whole file tells.
                    None => self.read_whole(shard).await?,
                }
            }
        };
        match contents.complaint(bytes, shard.tokens) {
            None => Ok(Arc::new(contents)),
            Some(reason) => Err(shard.malformed(reason)),
        }
    }

    async fn read_whole(&self, shard: ShardFile<'_>) -> Result<Contents> {
        let file = self.fetch(shard, 0..shard.bytes).await?;
        let dtype = shard.dtype;
        let (found, contents) =
            blocking(move || (Digest::of(&file), Contents::of_file(&file, dtype))).await?;
        if found != shard.digest {
            return Err(shard.corrupt(shard.key, shard.digest, found));
        }
        contents.map_err(|reason| shard.malformed(reason))
    }

    /// Bytes of a shard, from the store.
    async fn fetch(&self, shard: ShardFile<'_>, range: Range<u64>) -> Result<Bytes> {
        let counts = &self.inner.counts;
        // Never closed.
        let _reader = self.inner.readers.acquire().await;
        let read = || shard.store.get_range(shard.key, range.clone());
        let (read, winner) = match shard.store.is_remote() {
            true => self.inner.hedge.read(read).await,
            false => (read().await, Winner::Alone),
        };
        let bytes = read?;
        let count = |count: &AtomicU64, by: u64| count.fetch_add(by, Ordering::Relaxed);
        count(&counts.store, 1);
        count(&counts.store_bytes, bytes.len() as u64);
        count(&counts.hedged, u64::from(winner != Winner::Alone));
        count(&counts.overtaken, u64::from(winner == Winner::Second));
        Ok(bytes)
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        name: tree::BlockHash,
        check: impl FnOnce(Vec<u8>) -> Option<T> + Send + 'static,
    ) -> Result<Option<T>> {
        let Some(disk) = self.inner.disk.clone() else { return Ok(None) };
        let counts = &self.inner.counts;
        Ok(match blocking(move || disk.read(&name, check)).await? {
            Found::Whole(found) => {
                counts.disk.fetch_add(1, Ordering::Relaxed);
                Some(found)
            }
            Found::Damaged => {
                counts.damaged.fetch_add(1, Ordering::Relaxed);
                None
            }
            Found::Nothing => None,
        })
    }

    async fn put_on_disk(&self, name: tree::BlockHash, bytes: Bytes) -> Result<()> {
        match self.inner.disk.clone() {
            Some(disk) => blocking(move || disk.write(&name, &bytes)).await,
            None => Ok(()),
        }
    }
}

impl ShardFile<'_> {
    fn unreadable(&self, error: &std::io::Error) -> Error {
        let (operation, place) = ("read", self.store.place(self.key));
        let (reason, tries) = (error.to_string(), Tries::default());
        Error::Operation { operation, place, reason, tries }
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { place: self.store.place(self.key), reason }
    }

    fn corrupt(&self, place: &str, expected: Digest, found: Digest) -> Error {
        let remedy = super::read::remedy(self.store, self.dataset);
        Error::Corrupt { place: self.store.place(place), expected, found, remedy }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "blocks_tests.rs"]
mod tests;
