//! Large objects: written in parts and read in ranges, several at a time.
//!
//! Each part and each range is retried by itself, so that a hiccup in the middle of gigabytes costs
//! a few megabytes. Parts are slices of the one buffer that is written: nothing is copied; what is copied
//! from object to object is never in memory as a whole.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use looptrain_proto::Digest;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};

use super::Store;
use super::retry::Failure;
use crate::{Error, Result};

/// Bytes of a part, unless there were too many of them then, and of a range.
pub(super) const PART_BYTES: usize = 8 << 20;

/// Parts or ranges that are under way at the same time.
pub(super) const CONCURRENT: usize = 8;

/// More parts than this no store takes; S3 takes 10,000.
const MOST_PARTS: usize = 9_000;

/// Uploads that are begun for one object, when the store loses them.
const UPLOADS: u32 = 3;

/// An upload that was begun. One that is given up half-way, for its future is dropped, is taken back: what
/// it leaves takes room.
struct Begun {
    multipart: Arc<dyn MultipartStore>,
    path: Path,
    id: MultipartId,
    ended: bool,
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // Without a runtime the process is ending.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (multipart, path) = (Arc::clone(&self.multipart), self.path.clone());
            let id = std::mem::take(&mut self.id);
            runtime.spawn(async move { multipart.abort_multipart(&path, &id).await });
        }
    }
}

/// Why an upload came to nothing.
enum Stopped {
    Writing(Failure),
    /// There was nothing to write.
    Reading(Error),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Writing(failure)
    }
}

impl Stopped {
    fn told(self, store: &Store, key: &str) -> Error {
        match self {
            Self::Writing(failure) => store.failed("write", key, failure),
            Self::Reading(error) => error,
        }
    }
}

/// The answer to the end of the upload got lost, and it is over; or the store forgot it. Whoever wrote
/// what is there now, it is not known to be this.
fn is_lost(stopped: &Stopped) -> bool {
    matches!(stopped, Stopped::Writing(Failure { error: object_store::Error::NotFound { .. }, .. }))
}

impl Store {
    /// Writes a large object, over an older one if need be; it appears when all of it is there. A
    /// writer that dies leaves parts that are no object: in a directory [`Store::sweep`] finds them,
    /// a remote store has rules for theirs.
    ///
    /// # Errors
    /// When the store fails; the older object is then still whole.
    pub async fn put_large(&self, key: &str, bytes: impl Into<Bytes>) -> Result<()> {
        self.put_chunks(key, vec![bytes.into()]).await
    }

    /// As [`Store::put_large`], with the object in pieces that need not be put together.
    ///
    /// # Errors
    /// As [`Store::put_large`].
    pub async fn put_chunks(&self, key: &str, chunks: Vec<Bytes>) -> Result<()> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let Some(multipart) = self.multipart.as_ref().filter(|_| bytes > PART_BYTES) else {
            let written = self.write(key, chunks.into_iter().collect(), PutMode::Overwrite).await;
            return written.map_err(|failure| self.failed("write", key, failure));
        };
        let parts = cut(chunks, PART_BYTES.max(bytes.div_ceil(MOST_PARTS)));
        let path = self.path(key).map_err(|error| self.unnamed("write", key, error))?;
        let mut lost = 0;
        loop {
            let parts = futures::stream::iter(parts.iter().cloned().map(Ok));
            match self.upload(multipart, key, &path, parts).await {
                Err(failure) if is_lost(&failure) && lost + 1 < UPLOADS => {
                    lost += 1;
                    tracing::warn!(key, "the store has lost an upload; beginning it again");
                }
                done => return done.map_err(|failure| failure.told(self, key)),
            }
        }
    }

    /// Writes the `size` bytes of `from` to `key` as well, over an older object if need be, and gives the
    /// digest of what is there then. A directory links the file where it can; elsewhere a few megabytes at a
    /// time go through this process.
    ///
    /// # Errors
    /// When there is no such object, or the store fails; the older object is then still whole.
    pub async fn copy_large(&self, from: &str, key: &str, size: u64) -> Result<Digest> {
        let length = PART_BYTES as u64;
        let Some(multipart) = self.multipart.as_ref().filter(|_| size > length) else {
            if size <= length {
                let bytes = self.get_range(from, 0..size).await?;
                self.put(key, bytes).await?;
            } else if !self.linked(from, key).await {
                self.written_through(from, key, size).await?;
            }
            return self.digest(key, size).await;
        };
        let length = length.max(size.div_ceil(MOST_PARTS as u64));
        let path = self.path(key).map_err(|error| self.unnamed("write", key, error))?;
        let mut lost = 0;
        loop {
            let mut hasher = blake3::Hasher::new();
            let read = futures::stream::iter(ranges(size, length))
                .map(|range| self.get_range(from, range))
                .buffered(CONCURRENT);
            let parts = read.map(|part| {
                let part = part.map_err(Stopped::Reading)?;
                hasher.update(&part);
                Ok(part.into())
            });
            match self.upload(multipart, key, &path, parts).await {
                Err(failure) if is_lost(&failure) && lost + 1 < UPLOADS => {
                    lost += 1;
                    tracing::warn!(key, "the store has lost an upload; beginning it again");
                }
                Err(failure) => return Err(failure.told(self, key)),
                Ok(()) => return Ok(hasher.finalize().into()),
            }
        }
    }

    /// Whether a directory has given the object another name.
    async fn linked(&self, from: &str, key: &str) -> bool {
        let (Ok(from), Ok(key)) = (self.path(from), self.path(key)) else { return false };
        self.objects.copy(&from, &key).await.is_ok()
    }

    /// Copies an object through the client's own upload, which a directory has as well.
    async fn written_through(&self, from: &str, key: &str, size: u64) -> Result<()> {
        let failed = |error| self.unnamed("write", key, error);
        let path = self.path(key).map_err(failed)?;
        let mut upload = self.objects.put_multipart(&path).await.map_err(failed)?;
        let written = async {
            let mut chunks = std::pin::pin!(self.stream(from, size));
            while let Some(chunk) = chunks.try_next().await? {
                upload.put_part(chunk.into()).await.map_err(failed)?;
            }
            upload.complete().await.map_err(failed)
        };
        let written = written.await;
        if written.is_err() {
            // What it leaves takes room, and is no reason to fail in another way.
            let _ = upload.abort().await;
        }
        written.map(drop)
    }

    async fn digest(&self, key: &str, size: u64) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        let mut chunks = std::pin::pin!(self.stream(key, size));
        while let Some(chunk) = chunks.try_next().await? {
            hasher.update(&chunk);
        }
        Ok(hasher.finalize().into())
    }

    async fn upload(
        &self,
        multipart: &Arc<dyn MultipartStore>,
        key: &str,
        path: &Path,
        parts: impl Stream<Item = std::result::Result<PutPayload, Stopped>>,
    ) -> std::result::Result<(), Stopped> {
        let create = || self.patience.answer(0, multipart.create_multipart(path));
        let id = self.retried("write", key, create).await?;
        let id = &id;
        let mut begun = Begun {
            multipart: Arc::clone(multipart),
            path: path.clone(),
            id: id.clone(),
            ended: false,
        };
        let put = |(index, part): (usize, std::result::Result<PutPayload, Stopped>)| async move {
            let part = part?;
            let bytes = part.content_length();
            let put =
                || self.patience.answer(bytes, multipart.put_part(path, id, index, part.clone()));
            Ok::<_, Stopped>(self.retried("write", key, put).await?)
        };
        let finished = async {
            let parts: Vec<PartId> =
                parts.enumerate().map(put).buffered(CONCURRENT).try_collect().await?;
            // The server may put the parts together only now.
            let complete = || {
                let complete = multipart.complete_multipart(path, id, parts.clone());
                self.patience.answer(PART_BYTES, complete)
            };
            Ok::<_, Stopped>(self.retried("write", key, complete).await?)
        };
        let finished = finished.await;
        begun.ended = true;
        if finished.is_err() {
            // What it leaves takes room, and is no reason to fail in another way.
            let _ = multipart.abort_multipart(path, id).await;
        }
        finished.map(drop)
    }

    /// What [`Store::put_large`] is compared with: the same bytes through the client's own multipart
    /// upload, with as many parts of the same size under way, and nothing around it.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_bare(&self, key: &str, bytes: Bytes) -> Result<()> {
        let put = async {
            let upload = self.objects.put_multipart(&self.path(key)?).await?;
            let mut writer = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
            for range in ranges(bytes.len() as u64, PART_BYTES as u64) {
                writer.wait_for_capacity(CONCURRENT).await?;
                writer.put(bytes.slice(range.start as usize..range.end as usize));
            }
            writer.finish().await
        };
        put.await.map(drop).map_err(|error| self.unnamed("write", key, error))
    }

    /// The `size` bytes of an object in order, range by range, several of them under way at a time.
    pub fn stream<'a>(
        &'a self,
        key: &'a str,
        size: u64,
    ) -> impl Stream<Item = Result<Bytes>> + Send + 'a {
        futures::stream::iter(ranges(size, PART_BYTES as u64))
            .map(move |range| self.get_range(key, range))
            .buffered(CONCURRENT)
    }

    /// What a key that is none says.
    pub(super) fn unnamed(
        &self,
        operation: &'static str,
        key: &str,
        error: object_store::Error,
    ) -> Error {
        let elapsed = std::time::Duration::ZERO;
        self.failed(operation, key, Failure { error, attempts: 0, elapsed })
    }
}

/// Chunks cut and put together to parts of `length` bytes, of which the last may be shorter.
fn cut(chunks: Vec<Bytes>, length: usize) -> Vec<PutPayload> {
    let (mut parts, mut part, mut room) = (Vec::new(), Vec::new(), length);
    for mut chunk in chunks {
        while chunk.len() >= room {
            part.push(chunk.split_to(room));
            parts.push(std::mem::take(&mut part).into_iter().collect());
            room = length;
        }
        if !chunk.is_empty() {
            room -= chunk.len();
            part.push(chunk);
        }
    }
    if !part.is_empty() {
        parts.push(part.into_iter().collect());
    }
    parts
}

/// `0..size` in pieces of `length`, of which the last may be shorter.
fn ranges(size: u64, length: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size.div_ceil(length)).map(move |index| index * length..((index + 1) * length).min(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_any_size_become_parts_of_one_size() {
        let all: Vec<u8> = (0..100).collect();
        for sizes in [vec![100], vec![1; 100], vec![0, 7, 0, 30, 63], vec![8, 16, 24, 52]] {
            let mut rest = Bytes::from(all.clone());
            let chunks = sizes.iter().map(|size| rest.split_to(*size)).collect();
            let parts = cut(chunks, 8);
            let lengths: Vec<usize> = parts.iter().map(PutPayload::content_length).collect();
            assert_eq!((lengths.len(), &lengths[..12]), (13, &[8; 12][..]), "{sizes:?}");
            let bytes: Vec<u8> = parts.iter().flatten().flatten().copied().collect();
            assert_eq!(bytes, all);
        }
        assert_eq!(cut(vec![Bytes::from_static(&[0; 16])], 8).len(), 2);
    }

    #[test]
    fn ranges_cover_an_object_without_a_gap() {
        assert_eq!(ranges(0, 4).count(), 0);
        assert_eq!(ranges(8, 4).collect::<Vec<_>>(), [0..4, 4..8]);
        assert_eq!(ranges(9, 4).collect::<Vec<_>>(), [0..4, 4..8, 8..9]);
    }
}
