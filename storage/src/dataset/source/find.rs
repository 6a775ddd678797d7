//! Finding the files that `datasets.source.paths`, or `--input`, name.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use looptrain_proto::spec::{self, Format};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::blocks::{Place, local, open_url};
use super::sample;
use super::walk::{Entry, Links, unreadable, walk};
use crate::{ObjectInfo, Result, Store};

/// Files of a dataset at most.
const MAX_FILES: usize = 1 << 24;

/// How the bytes of a file are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// A file with documents in it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) place: Place,
    /// For messages.
    pub(super) url: String,
    pub(super) bytes: u64,
    /// Tells two states of a file of the same size apart, where the system can.
    pub(super) changed: Option<u64>,
    pub(super) format: Format,
    pub(super) packing: Packing,
    /// Named itself, not found in a directory.
    pub(super) named: bool,
}

/// All files, in the order of the paths, and below each in the order of their names.
///
/// # Errors
/// A sentence for the person who wrote the paths.
pub(super) fn find(
    source: &spec::Source,
    runtime: &Handle,
) -> std::result::Result<Vec<Found>, String> {
    let mut found = Vec::new();
    let named = source.paths.iter().filter_map(|path| here(path).ok().flatten());
    let links = Links::followed(named);
    for path in &source.paths {
        let before = found.len();
        match here(path)? {
            Some(path) => on_disk(&path, source, &links, &mut found)?,
            None => in_store(path, source, runtime, &mut found).map_err(|e| e.to_string())?,
        }
        if found.len() == before {
            return Err(format!(
                "{path} holds no files {}; name the files themselves, or another format",
                match source.format {
                    Format::Jsonl => "called .jsonl, .ndjson or .json (or these with .gz or .zst)",
                    Format::Parquet => "called .parquet",
                    _ => "whose names tell that they are JSON Lines, Parquet or plain text",
                }
            ));
        }
        if found.len() > MAX_FILES {
            return Err(format!("there are more than {MAX_FILES} files; prepare several datasets"));
        }
    }
    Ok(found)
}

/// Where a path leads on this machine; `None` for what is in a store.
fn here(path: &str) -> std::result::Result<Option<PathBuf>, String> {
    Ok(sample::registry_of(path)?.or_else(|| local(path).map(Path::to_owned)))
}

fn on_disk(
    path: &Path,
    source: &spec::Source,
    links: &Links,
    found: &mut Vec<Found>,
) -> std::result::Result<(), String> {
    let failed = |error: std::io::Error| {
        format!("cannot read {}: {error}; correct the path", path.display())
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_dir() {
        found.push(file(path, &metadata, named(&path.to_string_lossy(), source)?, true));
        return Ok(());
    }
    // Links to files are followed, too: caches of downloads are full of them.
    walk(path, links, &mut |entry: Entry| {
        let kind = kind(&entry.name, source).filter(|_| !entry.name.starts_with('.'));
        let Some(kind) = kind else { return Ok(()) };
        let metadata = fs::metadata(&entry.path);
        let metadata = metadata.map_err(|error| unreadable(&entry.path, &error))?;
        if metadata.is_file() {
            found.push(file(&entry.path, &metadata, kind, false));
        }
        Ok(())
    })
}

fn file(
    path: &Path,
    metadata: &fs::Metadata,
    (format, packing): (Format, Packing),
    named: bool,
) -> Found {
    Found {
        place: Place::File(path.to_owned()),
        url: path.display().to_string(),
        bytes: metadata.len(),
        changed: metadata.modified().ok().and_then(nanoseconds),
        format,
        packing,
        named,
    }
}

/// Since 1970.
fn nanoseconds(time: SystemTime) -> Option<u64> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok().map(|time| time.as_nanos() as u64)
}

fn in_store(
    url: &str,
    source: &spec::Source,
    runtime: &Handle,
    found: &mut Vec<Found>,
) -> Result<()> {
    let (store, prefix) = open_url(url)?;
    let object = |store: &Store, object: ObjectInfo, (format, packing), named| Found {
        url: store.place(&object.key),
        bytes: object.size,
        changed: nanoseconds(object.modified),
        place: Place::Object { store: store.clone(), key: object.key },
        format,
        packing,
        named,
    };
    if !prefix.is_empty()
        && let Some(info) = runtime.block_on(store.info(&prefix))?
    {
        let kind = named(url, source)
            .map_err(|reason| crate::Error::Malformed { place: url.to_owned(), reason })?;
        found.push(object(&store, info, kind, true));
        return Ok(());
    }
    for listed in runtime.block_on(store.list(&prefix))? {
        let name = listed.key.rsplit('/').next().unwrap_or_default();
        if let Some(kind) = kind(name, source).filter(|_| !name.starts_with('.')) {
            found.push(object(&store, listed, kind, false));
        }
    }
    Ok(())
}

/// What a file is that was named itself.
fn named(path: &str, source: &spec::Source) -> std::result::Result<(Format, Packing), String> {
    let (_, packing) = unpacked(path);
    match source.format {
        Format::Auto | Format::Sample => kind(path, source).ok_or_else(|| {
            format!("cannot tell from the name of {path} what it is; say it with the format option")
        }),
        format => Ok((format, packing)),
    }
}

/// What a file is by its name, when it is of the wanted kind.
fn kind(name: &str, source: &spec::Source) -> Option<(Format, Packing)> {
    let (name, packing) = unpacked(name);
    let extension = name.rsplit_once('.')?.1.to_ascii_lowercase();
    let is_text = || {
        let wanted =
            |wanted: &String| wanted.trim_start_matches('.').eq_ignore_ascii_case(&extension);
        source.extensions.iter().any(wanted)
    };
    let format = match extension.as_str() {
        "jsonl" | "ndjson" | "json" => Format::Jsonl,
        "parquet" => Format::Parquet,
        _ if is_text() => Format::Text,
        _ => return None,
    };
    let wanted = matches!(source.format, Format::Auto) || source.format == format;
    wanted.then_some((format, packing))
}

/// A name without what says how the file is packed.
fn unpacked(name: &str) -> (&str, Packing) {
    for (ending, packing) in [(".gz", Packing::Gzip), (".zst", Packing::Zstd)] {
        if let Some(name) = name.strip_suffix(ending) {
            return (name, packing);
        }
    }
    (name, Packing::Plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn source(format: Format) -> spec::Source {
        spec::Source { format, extensions: vec!["txt".into()], ..spec::Source::default() }
    }

    #[test]
    fn a_name_tells_format_and_packing() {
        let auto = source(Format::Auto);
        for (name, expected) in [
            ("a.jsonl", Some((Format::Jsonl, Packing::Plain))),
            ("a.json.gz", Some((Format::Jsonl, Packing::Gzip))),
            ("a.b.NDJSON.zst", Some((Format::Jsonl, Packing::Zstd))),
            ("part-0.parquet", Some((Format::Parquet, Packing::Plain))),
            ("book.txt.gz", Some((Format::Text, Packing::Gzip))),
            ("book.epub", None),
            ("README", None),
        ] {
            assert_eq!(kind(name, &auto), expected, "{name}");
        }
        assert_eq!(kind("a.parquet", &source(Format::Jsonl)), None);
        assert_eq!(named("dump", &source(Format::Jsonl)), Ok((Format::Jsonl, Packing::Plain)));
        assert!(named("dump", &auto).unwrap_err().contains("name of dump"));
    }

    #[test]
    fn endings_of_text_are_found_in_either_case_with_or_without_a_dot() {
        for ending in ["R", "r", ".R", ".r"] {
            let source = spec::Source { extensions: vec![ending.into()], ..source(Format::Auto) };
            for name in ["a.R", "a.r", "b.c.R"] {
                let expected = Some((Format::Text, Packing::Plain));
                assert_eq!(kind(name, &source), expected, "{name} by {ending}");
            }
            assert_eq!(kind("a.txt", &source), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn what_links_lead_to_is_found_and_a_link_to_nothing_is_an_error() {
        use std::os::unix::fs::symlink;

        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in ["corp/one/a.txt", "real2/b.txt", "c.txt", "real2/x.png"] {
            fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            fs::write(at(name), "text").unwrap();
        }
        symlink("../real2", at("corp/two")).unwrap();
        symlink("../../c.txt", at("corp/one/c.txt")).unwrap();
        symlink("..", at("corp/one/up")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let paths = vec![at("corp").display().to_string()];
        let source = spec::Source { paths, ..source(Format::Auto) };
        let found = find(&source, runtime.handle()).unwrap();
        let urls: Vec<&str> = found.iter().map(|found| found.url.as_str()).collect();
        let expected = ["corp/one/a.txt", "corp/one/c.txt", "corp/two/b.txt"]
            .map(|name| at(name).display().to_string());
        assert_eq!(urls, expected);

        symlink("../real3", at("corp/three")).unwrap();
        let error = find(&source, runtime.handle()).unwrap_err();
        let link = at("corp/three").display().to_string();
        assert!(error.contains(&link) && error.contains("move it away"), "{error}");
    }

    #[test]
    fn files_come_in_the_order_of_paths_and_names_from_disks_and_stores() {
        let root = tempfile::tempdir().unwrap();
        for name in
            ["b/2.jsonl", "b/10.jsonl", "b/.hidden.jsonl", "b/sub/1.jsonl", "b/x.png", "a.txt"]
        {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "{}").unwrap();
        }
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = Store::open("memory://found").unwrap();
        for key in ["d/2.parquet", "d/1.parquet", "d/notes.doc", "e.jsonl"] {
            runtime.block_on(store.put(key, "....")).unwrap();
        }
        let mut source = source(Format::Auto);
        let at = |name: &str| root.path().join(name).display().to_string();
        source.paths = vec![
            "memory://found/e.jsonl".into(),
            at("b"),
            format!("file://{}", at("a.txt")),
            "memory://found/d".into(),
        ];
        let found = find(&source, runtime.handle()).unwrap();
        let urls: Vec<&str> = found.iter().map(|found| found.url.as_str()).collect();
        let expected = [
            "memory://found/e.jsonl".to_owned(),
            at("b/10.jsonl"),
            at("b/2.jsonl"),
            at("b/sub/1.jsonl"),
            at("a.txt"),
            "memory://found/d/1.parquet".to_owned(),
            "memory://found/d/2.parquet".to_owned(),
        ];
        assert_eq!(urls, expected);
        let named: Vec<bool> = found.iter().map(|found| found.named).collect();
        assert_eq!(named, [true, false, false, false, true, false, false]);

        for (path, words) in [
            (at("nowhere"), "nowhere: No such file"),
            (at("b/x.png"), "x.png what it is"),
            ("memory://found/f".to_owned(), "holds no files"),
        ] {
            source.paths = vec![path];
            let error = find(&source, runtime.handle()).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
