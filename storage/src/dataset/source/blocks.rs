//! Bytes of files and objects, by position: read in blocks, so that neither a large file nor many
//! small reads of a remote one cost more than a block of memory or a request a block.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::{Error, Result, Store};

/// What is read at once at least.
const BLOCK: u64 = 4 << 20;

/// Something that can be read.
#[derive(Clone, Debug)]
pub(super) enum Place {
    File(PathBuf),
    Object { store: Store, key: String },
}

impl Place {
    fn read(&self, start: u64, length: usize, runtime: &Handle) -> io::Result<Bytes> {
        match self {
            Self::File(path) => {
                let mut file = std::fs::File::open(path)?;
                file.seek(SeekFrom::Start(start))?;
                let mut bytes = Vec::with_capacity(length);
                file.take(length as u64).read_to_end(&mut bytes)?;
                Ok(bytes.into())
            }
            Self::Object { store, key } => runtime
                .block_on(store.get_range(key, start..start + length as u64))
                .map_err(io::Error::other),
        }
    }
}

/// Opens the store that a URL points into: the store, and the key.
pub(in super::super) fn open_url(url: &str) -> Result<(Store, String)> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| Error::Url {
        url: url.to_owned(),
        reason: "is no URL; write s3://BUCKET/PREFIX".to_owned(),
    })?;
    let (place, key) = rest.split_once('/').unwrap_or((rest, ""));
    let store = Store::open_existing(&format!("{scheme}://{place}"))?;
    Ok((store, key.trim_matches('/').to_owned()))
}

/// The path of what is on this machine.
pub(super) fn local(url: &str) -> Option<&Path> {
    match url.split_once("://") {
        None => Some(Path::new(url)),
        Some(("file", path)) => Some(Path::new(path)),
        Some(_) => None,
    }
}

/// A file or an object of known size.
#[derive(Debug)]
pub(super) struct Blocks {
    place: Place,
    size: u64,
    runtime: Handle,
    /// The block that was read last, and where it begins.
    block: Mutex<(u64, Bytes)>,
}

impl Blocks {
    pub(super) fn new(place: Place, size: u64, runtime: Handle) -> Self {
        Self { place, size, runtime, block: Mutex::default() }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Up to `length` bytes from `start` on; fewer at the end alone.
    pub(super) fn get(&self, start: u64, length: usize) -> io::Result<Bytes> {
        let length = (self.size.saturating_sub(start)).min(length as u64);
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = |(first, bytes): &(u64, Bytes)| {
            start >= *first && start + length <= *first + bytes.len() as u64
        };
        if !inside(&block) {
            let wanted = length.max(BLOCK).min(self.size - start);
            let bytes = self.place.read(start, wanted as usize, &self.runtime)?;
            if bytes.len() as u64 != wanted {
                let (has, until) = (start + bytes.len() as u64, start + wanted);
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("it ends after {has} bytes, {until} were expected; has it changed?"),
                ));
            }
            *block = (start, bytes);
        }
        let from = (start - block.0) as usize;
        Ok(block.1.slice(from..from + length as usize))
    }
}

/// Reads on from a position.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    blocks: &'a Blocks,
    position: &'a std::cell::Cell<u64>,
}

impl<'a> Stream<'a> {
    /// From `position` on, which moves along.
    pub(super) fn new(blocks: &'a Blocks, position: &'a std::cell::Cell<u64>) -> Self {
        Self { blocks, position }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let position = self.position.get();
        // The rest of the block first, without asking for what lies behind it.
        let in_block = BLOCK - position % BLOCK;
        let wanted = (buffer.len() as u64).min(in_block) as usize;
        let bytes = self.blocks.get(position, wanted)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.position.set(position + bytes.len() as u64);
        Ok(bytes.len())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_file_of_many_blocks_is_read_whole_and_from_any_position() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let content: Vec<u8> = (0..9_500_000_u32).map(|i| (i * 7 / 3) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let blocks = Blocks::new(Place::File(path), 9_500_000, runtime.handle().clone());
        let (mut read, position) = (Vec::new(), Cell::new(0));
        Stream::new(&blocks, &position).read_to_end(&mut read).unwrap();
        assert_eq!((read == content, position.get()), (true, 9_500_000));
        for (start, length) in [(0, 10), (4_194_300, 8), (9_499_990, 100), (5, 9_000_000)] {
            let end = content.len().min(start + length);
            assert_eq!(blocks.get(start as u64, length).unwrap(), content[start..end]);
        }
    }

    #[test]
    fn a_file_that_got_shorter_is_no_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "short").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let blocks = Blocks::new(Place::File(path), 10, runtime.handle().clone());
        let error = blocks.get(0, 10).unwrap_err().to_string();
        assert!(error.contains("ends after 5 bytes, 10 were expected"), "{error}");
    }
}
