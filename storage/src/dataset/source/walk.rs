//! Going through a directory that is named: the files below it, in the order of their names.
//!
//! What could hold documents is not passed over in silence: what cannot be read is an error that names
//! it. Links to directories are followed, each directory once; what lies below a directory that is
//! named itself is read there alone. So links that form a circle come to an end, and links from one
//! place of a tree to another change nothing.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What is no directory: a file, or a link to one.
pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) name: String,
    /// The names from the directory that is gone through on, with `/` between them.
    pub(super) key: String,
    pub(super) is_link: bool,
}

/// What becomes of links.
pub(super) enum Links {
    /// As if there were none.
    PassedOver,
    /// Followed, unless they lead to where one of these directories is read without them.
    Followed { named: Vec<PathBuf> },
}

impl Links {
    /// Followed; `named` are all paths that are read, of which a missing one is told of elsewhere.
    pub(super) fn followed(named: impl Iterator<Item = PathBuf>) -> Self {
        Self::Followed { named: named.filter_map(|path| fs::canonicalize(path).ok()).collect() }
    }

    /// Whether a directory is read without following a link.
    fn lead_where_it_is_read(&self, real: &Path) -> bool {
        let Self::Followed { named } = self else { return false };
        named
            .iter()
            .any(|named| real.strip_prefix(named).is_ok_and(|below| !below.iter().any(is_hidden)))
    }
}

/// Gives what lies below a directory; hidden directories and hidden links are passed over.
///
/// # Errors
/// A sentence that names what cannot be read, or the one of `take`.
pub(super) fn walk(
    directory: &Path,
    links: &Links,
    take: &mut dyn FnMut(Entry) -> Result<(), String>,
) -> Result<(), String> {
    let real = fs::canonicalize(directory).map_err(|error| unreadable(directory, &error))?;
    let (path, key) = (directory.to_owned(), String::new());
    let first = Directory { path, real, key, is_linked: false };
    Walk { links, followed: HashSet::new(), take }.directory(&first)
}

/// Says of something below a directory that it cannot be read, and what to do.
pub(super) fn unreadable(path: &Path, error: &io::Error) -> String {
    let what = if path.is_symlink() { "follow the link" } else { "read" };
    format!("cannot {what} {}: {error}; make it readable or move it away", path.display())
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

struct Walk<'a> {
    links: &'a Links,
    /// Directories that a link has led to, and those below them, without links.
    followed: HashSet<PathBuf>,
    take: &'a mut dyn FnMut(Entry) -> Result<(), String>,
}

struct Directory {
    path: PathBuf,
    /// Where it lies without links.
    real: PathBuf,
    key: String,
    /// Whether a link has led here.
    is_linked: bool,
}

impl Walk<'_> {
    fn directory(&mut self, directory: &Directory) -> Result<(), String> {
        let failed = |error: io::Error| unreadable(&directory.path, &error);
        let entries = fs::read_dir(&directory.path).map_err(failed)?;
        let mut entries: Vec<fs::DirEntry> = entries.collect::<io::Result<_>>().map_err(failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        entries.iter().try_for_each(|entry| self.entry(directory, entry))
    }

    fn entry(&mut self, parent: &Directory, entry: &fs::DirEntry) -> Result<(), String> {
        let (path, file_name) = (entry.path(), entry.file_name());
        let failed = |error: io::Error| unreadable(&path, &error);
        let kind = entry.file_type().map_err(failed)?;
        let (is_link, is_hidden) = (kind.is_symlink(), is_hidden(&file_name));
        if is_link && (is_hidden || matches!(self.links, Links::PassedOver)) {
            return Ok(());
        }
        let is_directory = match is_link {
            true => fs::metadata(&path).map_err(failed)?.is_dir(),
            false => kind.is_dir(),
        };
        if is_directory && is_hidden {
            return Ok(());
        }
        let name = file_name.to_string_lossy().into_owned();
        let key = match parent.key.as_str() {
            "" => name.clone(),
            above => format!("{above}/{name}"),
        };
        if !is_directory {
            return (self.take)(Entry { path, name, key, is_link });
        }
        let real = match is_link {
            true => fs::canonicalize(&path).map_err(failed)?,
            false => parent.real.join(&file_name),
        };
        let is_linked = is_link || parent.is_linked;
        let is_elsewhere = is_linked
            && (self.links.lead_where_it_is_read(&real) || !self.followed.insert(real.clone()));
        if is_elsewhere {
            return Ok(());
        }
        self.directory(&Directory { path, real, key, is_linked })
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(root: &Path, files: &[&str]) {
        for name in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
    }

    fn link(root: &Path, links: &[(&str, &str)]) {
        for (name, target) in links {
            symlink(target, root.join(name)).unwrap();
        }
    }

    /// What is found below `corp`, of directories of which these are named.
    fn keys(root: &Path, named: &[&str]) -> Result<Vec<String>, String> {
        let links = Links::followed(named.iter().map(|name| root.join(name)));
        let mut keys = Vec::new();
        walk(&root.join("corp"), &links, &mut |entry: Entry| {
            assert!(entry.path.starts_with(root.join("corp")));
            assert!(entry.path.ends_with(&entry.name) && entry.key.ends_with(&entry.name));
            keys.push(entry.key);
            Ok(())
        })?;
        Ok(keys)
    }

    #[test]
    fn directories_behind_links_are_read_once_and_circles_end() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, &["corp/a", "corp/sub/c", "real2/b", "real2/inner/d"]);
        link(root, &[("corp/two", "../real2"), ("corp/zwei", "../real2")]);
        link(root, &[("corp/here", "."), ("corp/sub/up", ".."), ("real2/back", "../corp/sub")]);
        assert_eq!(keys(root, &["corp"]).unwrap(), ["a", "sub/c", "two/b", "two/inner/d"]);
        // A link to what lies around everything, and another one to a part of that.
        link(root, &[("corp/above", "..")]);
        let all = ["a", "above/real2/b", "above/real2/inner/d", "sub/c"];
        assert_eq!(keys(root, &["corp"]).unwrap(), all);
        assert_eq!(keys(root, &["corp", "real2"]).unwrap(), ["a", "sub/c"], "it is read there");
    }

    #[test]
    fn links_within_a_tree_change_nothing_unless_they_show_what_is_hidden() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, &["corp/z/d", "corp/.store/e", "corp/.f"]);
        link(root, &[("corp/0", "z"), ("corp/shown", ".store"), ("corp/g", "z/d")]);
        assert_eq!(keys(root, &["corp"]).unwrap(), [".f", "g", "shown/e", "z/d"]);
        let mut found = Vec::new();
        walk(&root.join("corp"), &Links::PassedOver, &mut |entry: Entry| {
            found.push(entry.key);
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [".f", "z/d"]);
    }

    #[test]
    fn a_link_to_nothing_is_named_unless_it_is_hidden() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, &["corp/sub/a"]);
        link(root, &[("corp/sub/.lock", "nobody")]);
        assert_eq!(keys(root, &["corp"]).unwrap(), ["sub/a"]);
        for (name, target) in [("corp/sub/gone", "nowhere"), ("corp/around", "around")] {
            link(root, &[(name, target)]);
            let error = keys(root, &["corp"]).unwrap_err();
            let begin = format!("cannot follow the link {}: ", root.join(name).display());
            assert!(error.starts_with(&begin) && error.ends_with("move it away"), "{error}");
            fs::remove_file(root.join(name)).unwrap();
        }
    }

    /// Not even a superuser can read a directory whose path is too long for the system.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_directory_that_cannot_be_read_is_named() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let name = "d".repeat(200);
        let deep = |begin: &str| (0..15).fold(root.join(begin), |path, _| path.join(&name));
        fs::create_dir_all(deep("corp")).unwrap();
        fs::create_dir_all(deep("other")).unwrap();
        assert_eq!(keys(root, &["corp"]).unwrap(), [""; 0]);
        fs::rename(root.join("other"), deep("corp").join("other")).unwrap();
        let error = keys(root, &["corp"]).unwrap_err();
        assert!(error.starts_with("cannot read ") && error.contains("too long"), "{error}");
    }
}
