//! Shards that are files of this machine: the system keeps what was read of them in memory, for all
//! processes, so they need neither a copy in this one nor a cache on the disk that they are on.
//!
//! A few tokens cost the read of a few bytes. Their block is read whole and hashed when it is read
//! for the first time, and then again after every so many reads, for a disk may go bad meanwhile.
//!
//! Everything here blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::contents::Contents;
use super::tree::{self, BLOCK};

/// Reads of a block after which it is hashed again.
const TRUSTED_READS: u8 = 64;

/// An open shard.
#[derive(Debug)]
pub(super) struct LocalFile {
    file: File,
    /// For messages.
    name: String,
    contents: Arc<Contents>,
    bytes: u64,
    /// For each block, how many more reads trust it.
    trusted: Vec<AtomicU8>,
}

/// Why tokens could not be read.
#[derive(Debug)]
pub(super) enum LocalFault {
    Io(io::Error),
    /// The bytes of this block are not those that were written.
    Damaged {
        block: usize,
        expected: tree::BlockHash,
        found: tree::BlockHash,
    },
}

impl From<io::Error> for LocalFault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Blocks that were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LocalReads {
    /// Whole, and hashed.
    pub(super) hashed: u64,
    /// Of which a part was read.
    pub(super) trusted: u64,
}

impl LocalFile {
    /// Opens the shard at `path`, which messages call `name`.
    pub(super) fn open(
        path: &Path,
        name: String,
        contents: Arc<Contents>,
        bytes: u64,
    ) -> io::Result<Self> {
        let trusted = contents.hashes.iter().map(|_| AtomicU8::new(0)).collect();
        Ok(Self { file: File::open(path)?, name, contents, bytes, trusted })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The first byte of a block, and its length.
    pub(super) fn place(&self, block: usize) -> (u64, u64) {
        let begin = block as u64 * BLOCK;
        (begin, (self.bytes - begin).min(BLOCK))
    }

    /// Appends `count` tokens from `first` on to `out`, with `scratch` for their bytes.
    pub(super) fn append(
        &self,
        first: u64,
        count: u64,
        out: &mut Vec<u32>,
        scratch: &mut Vec<u8>,
    ) -> Result<LocalReads, LocalFault> {
        let mut reads = LocalReads::default();
        for range in self.contents.ranges(first, count) {
            for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                let begin = range.start.max(block * BLOCK);
                let end = range.end.min((block + 1) * BLOCK);
                let bytes = self.read(block as usize, begin..end, scratch, &mut reads)?;
                self.contents.dtype.extend(out, bytes);
            }
        }
        Ok(reads)
    }

    /// Some bytes of a block.
    fn read<'a>(
        &self,
        block: usize,
        range: Range<u64>,
        scratch: &'a mut Vec<u8>,
        reads: &mut LocalReads,
    ) -> Result<&'a [u8], LocalFault> {
        let left = |trusted: u8| trusted.checked_sub(1);
        let trust = &self.trusted[block];
        if trust.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
            reads.trusted += 1;
            scratch.resize((range.end - range.start) as usize, 0);
            self.file.read_exact_at(scratch, range.start)?;
            return Ok(scratch);
        }
        reads.hashed += 1;
        let (begin, length) = self.place(block);
        scratch.resize(length as usize, 0);
        self.file.read_exact_at(scratch, begin)?;
        let (expected, found) = (self.contents.hashes[block], tree::hash(block, scratch));
        if found != expected {
            return Err(LocalFault::Damaged { block, expected, found });
        }
        trust.store(TRUSTED_READS, Ordering::Relaxed);
        Ok(&scratch[(range.start - begin) as usize..(range.end - begin) as usize])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::super::contents::Ending;
    use super::super::{TokenType, shard};
    use super::*;

    const TOKENS: u64 = 400_000;

    fn tokens() -> Vec<u32> {
        (0..TOKENS as u32).map(|i| i * 31 % 70_001).collect()
    }

    /// A shard of [`TOKENS`] tokens, open, and the same file to be written to.
    fn open() -> (LocalFile, File, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens.arrow");
        let all = tokens();
        let bytes = shard::encode(TokenType::U32, &all, &vec![false; all.len()]).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let Ending::Complete(contents, _) = Contents::of_ending(&bytes, 0).unwrap() else {
            panic!("all of it was there");
        };
        let local = LocalFile::open(&path, "shard".into(), Arc::new(contents), bytes.len() as u64);
        let local = local.unwrap();
        (local, File::options().write(true).open(path).unwrap(), directory)
    }

    fn read(
        local: &LocalFile,
        first: u64,
        count: u64,
    ) -> Result<(Vec<u32>, LocalReads), LocalFault> {
        let mut out = Vec::new();
        let reads = local.append(first, count, &mut out, &mut Vec::new())?;
        Ok((out, reads))
    }

    #[test]
    fn tokens_are_read_as_they_were_written_and_a_block_is_hashed_once_at_first() {
        let (local, ..) = open();
        let all = tokens();
        for (first, count) in [(0, 10), (16_000, 2049), (60_000, 9_000), (0, TOKENS)] {
            let (read, _) = read(&local, first, count).unwrap();
            assert_eq!(read, all[first as usize..(first + count) as usize]);
        }
        let (_, reads) = read(&local, 0, TOKENS).unwrap();
        assert_eq!(reads.hashed, 0, "{reads:?}");
        assert!(reads.trusted >= 4 * TOKENS / BLOCK, "{reads:?}");
    }

    #[test]
    fn damage_is_found_at_the_first_read_of_a_block_and_again_after_some() {
        let (local, mut file, _directory) = open();
        let (_, reads) = read(&local, 100_000, 10).unwrap();
        assert_eq!(reads, LocalReads { hashed: 1, trusted: 0 });
        let place = local.contents.ranges(100_000, 1).next().unwrap().start;
        file.seek(SeekFrom::Start(place)).unwrap();
        file.write_all(&[0xff; 2]).unwrap();
        let until = (0..=TRUSTED_READS).find(|_| read(&local, 100_020, 10).is_err());
        assert_eq!(until, Some(TRUSTED_READS), "so many reads trust the block");
        let Err(LocalFault::Damaged { block, .. }) = read(&local, 100_000, 10) else {
            panic!("it stays damaged");
        };
        assert_eq!(block as u64, place / BLOCK);
        // Others are fine.
        read(&local, 300_000, 10).unwrap();
    }

    #[test]
    fn a_file_that_was_cut_off_is_an_error() {
        let (local, file, _directory) = open();
        file.set_len(BLOCK + 5).unwrap();
        assert!(read(&local, 0, 10).is_ok());
        assert!(matches!(read(&local, 300_000, 10), Err(LocalFault::Io(_))));
    }
}
