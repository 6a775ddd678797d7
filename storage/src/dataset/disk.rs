//! Blocks on the local disk, shared by all processes of a machine that are pointed to one directory.
//!
//! ```text
//! <directory>/blocks/<2 hex>/<62 hex>     named after what they hash to
//! <directory>/tmp/<writer>-<number>       being written
//! ```
//!
//! A file's name is the hash of what must be in it, so nobody has to trust what lies there, whoever
//! wrote it for whatever run: whoever reads a block hashes it, and takes one that is damaged away.
//! There are no locks: files come whole, by a rename, and go by being removed, and either may happen
//! while others look. A process that is killed leaves at most a file in `tmp`, which later ones
//! sweep out when it is old.
//!
//! The size is kept without anybody counting for all: a process that has written a share of its
//! limit to a part of the directory looks through that part, and removes what was not used for
//! longest (a file's time says when it was, to the minute). So with `n` processes the directory may
//! be larger than its limit by `n` times that share, 1/32.
//!
//! What goes wrong here is no failure of anything: the store has the block.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// No writer takes so long for a block: what is older in `tmp` was left by one that is dead.
const LEFT_BEHIND: Duration = Duration::from_secs(600);

/// A file's time is set anew when it is older than this.
const TOUCH_AFTER: Duration = Duration::from_secs(60);

/// Parts of the directory that are looked through at a time, at most; each holds one or more of the
/// subdirectories, of which there are 256.
const MOST_PARTS: u64 = 256;

/// A part is not looked through for less than this.
const PART_BYTES: u64 = 4 << 20;

/// A process looks through a part when it has written this share of the part's limit to it.
const SHARE: u64 = 32;

/// A directory of blocks, and its limit.
#[derive(Debug)]
pub(super) struct DiskCache {
    directory: PathBuf,
    part_limit: u64,
    /// Tells this process's drafts from those of others, on this machine or in other containers.
    writer: u64,
    /// Bytes written to each part since it was last looked through.
    written: Vec<AtomicU64>,
    next: AtomicU64,
    warned: AtomicBool,
}

impl DiskCache {
    /// Opens the cache in `directory`, which is made if need be, for at most `limit` bytes, and
    /// sweeps out what dead processes have left in it.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub(super) fn open(directory: &Path, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(directory.join("blocks"))?;
        fs::create_dir_all(directory.join("tmp"))?;
        let parts = (limit / PART_BYTES).clamp(1, MOST_PARTS);
        // The largest power of two, so that every part has as many subdirectories.
        let parts = 1 << parts.ilog2();
        let cache = Self {
            directory: directory.to_owned(),
            part_limit: limit / parts,
            writer: crate::record::unique(),
            // Full: the first block written to a part has it looked through, for others have written
            // to it before.
            written: (0..parts).map(|_| AtomicU64::new(limit)).collect(),
            next: AtomicU64::new(0),
            warned: AtomicBool::new(false),
        };
        cache.sweep(LEFT_BEHIND);
        Ok(cache)
    }

    /// What `check` makes of what lies there under this name; what it makes nothing of is taken away
    /// and is [`Found::Damaged`].
    pub(super) fn read<T>(
        &self,
        name: &[u8; 32],
        check: impl FnOnce(Vec<u8>) -> Option<T>,
    ) -> Found<T> {
        let path = self.path(name);
        let mut bytes = Vec::new();
        let Ok(mut file) = File::open(&path) else { return Found::Nothing };
        if let Err(error) = file.read_to_end(&mut bytes) {
            self.warn("read", &path, &error);
            return Found::Nothing;
        }
        let Some(checked) = check(bytes) else {
            let _ = fs::remove_file(&path);
            return Found::Damaged;
        };
        // Used just now. Whoever has removed it meanwhile does not mind.
        let touched = file.metadata().and_then(|metadata| metadata.modified());
        if touched.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > TOUCH_AFTER)) {
            let _ = file.set_modified(SystemTime::now());
        }
        Found::Whole(checked)
    }

    /// Puts bytes there under the name that they hash to.
    pub(super) fn write(&self, name: &[u8; 32], bytes: &[u8]) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let draft = self.directory.join("tmp").join(format!("{:016x}-{number}", self.writer));
        let path = self.path(name);
        if let Err(error) = self.put(&draft, &path, bytes) {
            let _ = fs::remove_file(&draft);
            self.warn("write", &path, &error);
            return;
        }
        let part = usize::from(name[0]) * self.written.len() / 256;
        let written = self.written[part].fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if written >= self.part_limit / SHARE {
            self.written[part].store(0, Ordering::Relaxed);
            self.evict(part, self.part_limit / SHARE + bytes.len() as u64);
        }
    }

    fn put(&self, draft: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
        // Not synced: what a crash of the machine leaves of it does not hash to its name.
        File::create(draft)?.write_all(bytes)?;
        match fs::rename(draft, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(path.parent().unwrap_or(&self.directory))?;
                fs::rename(draft, path)
            }
            renamed => renamed,
        }
    }

    fn path(&self, name: &[u8; 32]) -> PathBuf {
        let hex = blake3::Hash::from_bytes(*name).to_hex();
        self.directory.join("blocks").join(&hex[..2]).join(&hex[2..])
    }

    /// Removes what was not used for longest from a part until it has `room` for what is written
    /// before the next look. Others may do the same at the same time: then what is gone is gone.
    fn evict(&self, part: usize, room: u64) {
        let each = 256 / self.written.len();
        let mut files = Vec::new();
        for first in part * each..(part + 1) * each {
            let subdirectory = self.directory.join("blocks").join(format!("{first:02x}"));
            for entry in fs::read_dir(subdirectory).into_iter().flatten().flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                files.push((used, metadata.len(), entry.path()));
            }
        }
        let mut bytes: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        files.sort();
        let limit = self.part_limit.saturating_sub(room);
        for (_, size, path) in files {
            if bytes <= limit {
                break;
            }
            let _ = fs::remove_file(path);
            bytes -= size;
        }
    }

    /// Removes drafts that nobody has touched for `age`.
    fn sweep(&self, age: Duration) {
        for entry in fs::read_dir(self.directory.join("tmp")).into_iter().flatten().flatten() {
            let touched = entry.metadata().and_then(|metadata| metadata.modified());
            if touched.is_ok_and(|time| time.elapsed().is_ok_and(|old| old >= age)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Once: a full disk says the same for every block.
    fn warn(&self, operation: &str, path: &Path, error: &io::Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            let path = path.display();
            tracing::warn!(%path, %error, "cannot {operation} the cache; going on without");
        }
    }
}

/// What a cache has under a name.
#[derive(Debug, PartialEq)]
pub(super) enum Found<T> {
    Whole(T),
    Damaged,
    Nothing,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::super::tree;
    use super::*;

    fn block(seed: u32) -> (tree::BlockHash, Vec<u8>) {
        let bytes: Vec<u8> =
            (0..4096).map(|i: u32| (i * 7 + seed * 31 + (seed >> 8)) as u8).collect();
        let bytes = [&bytes[..], &seed.to_le_bytes()].concat();
        (tree::hash(3, &bytes), bytes)
    }

    fn read(cache: &DiskCache, seed: u32) -> Found<Vec<u8>> {
        let (name, _) = block(seed);
        cache.read(&name, |bytes| {
            (!bytes.is_empty() && tree::hash(3, &bytes) == name).then_some(bytes)
        })
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
    }

    fn size(directory: &Path) -> u64 {
        // Some may be removed by others while this looks.
        files(directory).iter().filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
    }

    #[test]
    fn a_block_is_found_by_all_who_share_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let one = DiskCache::open(directory.path(), 1 << 20).unwrap();
        let two = DiskCache::open(directory.path(), 1 << 30).unwrap();
        let (name, bytes) = block(1);
        assert_eq!(read(&two, 1), Found::Nothing);
        one.write(&name, &bytes);
        assert_eq!(read(&two, 1), Found::Whole(bytes));
        assert_eq!(files(&directory.path().join("tmp")), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_damaged_block_is_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(directory.path(), 1 << 20).unwrap();
        let (name, bytes) = block(1);
        let damages: [fn(&mut Vec<u8>); 3] =
            [|bytes| bytes[100] ^= 1, |bytes| bytes.truncate(50), Vec::clear];
        for damage in damages {
            cache.write(&name, &bytes);
            let file = files(&directory.path().join("blocks")).pop().unwrap();
            let mut damaged = bytes.clone();
            damage(&mut damaged);
            fs::write(&file, damaged).unwrap();
            assert_eq!(read(&cache, 1), Found::Damaged);
            assert!(!file.exists());
            assert_eq!(read(&cache, 1), Found::Nothing);
        }
        cache.write(&name, &bytes);
        assert_eq!(read(&cache, 1), Found::Whole(bytes));
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_the_limit_holds() {
        let directory = tempfile::tempdir().unwrap();
        let limit = 400 << 10;
        let cache = DiskCache::open(directory.path(), limit).unwrap();
        let hour = |seed: u32| SystemTime::now() - Duration::from_secs(3600 - u64::from(seed));
        for seed in 0..90 {
            let (name, bytes) = block(seed);
            cache.write(&name, &bytes);
            File::options()
                .write(true)
                .open(cache.path(&name))
                .unwrap()
                .set_modified(hour(seed))
                .unwrap();
        }
        // Used again, though it is the oldest.
        assert!(matches!(read(&cache, 0), Found::Whole(_)));
        for seed in 90..150 {
            let (name, bytes) = block(seed);
            cache.write(&name, &bytes);
        }
        assert!(size(directory.path()) <= limit, "{}", size(directory.path()));
        assert!(matches!(read(&cache, 0), Found::Whole(_)));
        assert_eq!(read(&cache, 1), Found::Nothing);
        assert!(matches!(read(&cache, 149), Found::Whole(_)));
    }

    #[test]
    fn old_drafts_are_swept_out_and_young_ones_stay() {
        let directory = tempfile::tempdir().unwrap();
        drop(DiskCache::open(directory.path(), 1 << 20).unwrap());
        let [old, young] = ["1-1", "1-2"].map(|name| directory.path().join("tmp").join(name));
        fs::write(&old, "half").unwrap();
        fs::write(&young, "half").unwrap();
        let before = SystemTime::now() - LEFT_BEHIND - Duration::from_secs(5);
        File::options().write(true).open(&old).unwrap().set_modified(before).unwrap();
        drop(DiskCache::open(directory.path(), 1 << 20).unwrap());
        assert!(!old.exists() && young.exists());
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_failure() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(directory.path(), 1 << 20).unwrap();
        fs::remove_dir_all(directory.path()).unwrap();
        let (name, bytes) = block(1);
        cache.write(&name, &bytes);
        assert_eq!(read(&cache, 1), Found::Nothing);
    }

    /// What a child process of the next test does: read, check and write until it is killed.
    #[test]
    #[ignore = "the next test runs it"]
    fn child_that_reads_and_writes_until_it_is_killed() {
        let directory = std::env::var("LOOPTRAIN_TEST_CACHE").unwrap();
        let cache = DiskCache::open(Path::new(&directory), 1 << 20).unwrap();
        fs::write(format!("{directory}/at-work-{}", std::process::id()), "").unwrap();
        let begin = Instant::now();
        let mut seed = std::process::id();
        while begin.elapsed() < Duration::from_secs(60) {
            seed = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let (name, bytes) = block(seed >> 22);
            match read(&cache, seed >> 22) {
                Found::Whole(found) => assert_eq!(found, bytes),
                Found::Nothing => cache.write(&name, &bytes),
                // Nobody damages anything here: a rename shows all of a file.
                Found::Damaged => fs::write(format!("{directory}/torn"), "").unwrap(),
            }
        }
    }

    #[test]
    fn processes_that_are_killed_at_any_moment_leave_a_cache_that_works() {
        let directory = tempfile::tempdir().unwrap();
        let start = || {
            Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact"])
                .arg("dataset::disk::tests::child_that_reads_and_writes_until_it_is_killed")
                .env("LOOPTRAIN_TEST_CACHE", directory.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        let wait_until = |happened: &dyn Fn() -> bool| {
            let begin = Instant::now();
            while !happened() {
                assert!(begin.elapsed() < Duration::from_secs(45), "it has not happened");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let blocks = directory.path().join("blocks");
        let mut children = [start(), start(), start()];
        for kill in 0..18_usize {
            let child = &mut children[kill % 3];
            let at_work = directory.path().join(format!("at-work-{}", child.id()));
            wait_until(&|| at_work.exists());
            std::thread::sleep(Duration::from_millis(13 * kill as u64 % 40));
            assert!(child.try_wait().unwrap().is_none(), "it works until it is killed");
            child.kill().unwrap();
            child.wait().unwrap();
            *child = start();
            // Three processes and a file each on its way.
            let bytes = size(&blocks);
            assert!(bytes <= (1 << 20) * 37 / 32, "{bytes}");
        }
        wait_until(&|| files(&blocks).len() > 50);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!directory.path().join("torn").exists());
        assert!(files(&blocks).len() > 50, "there was something in it");
        assert!(files(&directory.path().join("tmp")).len() <= 21, "one for each that was killed");
        let cache = DiskCache::open(directory.path(), 1 << 20).unwrap();
        cache.sweep(Duration::ZERO);
        assert_eq!(files(&directory.path().join("tmp")), Vec::<PathBuf>::new());
        let found = (0..1 << 10).filter(|&seed| match read(&cache, seed) {
            Found::Whole(bytes) => bytes == block(seed).1,
            Found::Nothing => false,
            Found::Damaged => panic!("a block that is not whole"),
        });
        assert_eq!(found.count(), files(&blocks).len());
    }
}
