//! An even sample of text files: what a first run trains on.
//!
//! Directories give their files of the wanted extensions, one document each; lock files, hidden
//! directories, links to files and files above 1 MiB (generated tables, mostly) are passed over. A
//! file that is named itself is taken whatever its name and size, and cut into documents of at most
//! 64 KiB at blank lines, so that one long file also has a training and a validation part.
//!
//! Documents come in the order of the hash of their path, not of the path: cut off at any number of
//! bytes, they are an even sample of everything, and neighbours in the stream are strangers. Paths
//! count from the directory that was named, so the order does not depend on where that lies.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use looptrain_proto::{Digest, spec};
use rayon::prelude::*;

use super::walk::{Entry, Links, unreadable, walk};
use super::{Document, Raw, Record, Sink, Source};
use crate::{Error, Result};

/// Stands for the sources of the crates in the local cargo home.
const CARGO_REGISTRY: &str = "cargo-registry";
pub(super) const LARGEST_FILE: u64 = 1 << 20;
pub(super) const LARGEST_PIECE: usize = 64 << 10;
const NO_HOME: &str = "cannot tell where cargo's registry is: set CARGO_HOME, or name your own files in datasets.source.paths";
/// Files looked into at once.
const BATCH: usize = 256;
/// Collecting ends after this many documents in a row that the bytes left have no room for.
const MISFITS: usize = 16;

/// A piece of text, still in its file.
#[derive(Clone, Debug)]
struct Piece {
    path: PathBuf,
    /// Where the text starts in the file, in bytes.
    start: u64,
    /// Bytes of text.
    bytes: u64,
    /// What orders documents.
    order: blake3::Hash,
    /// What decides on the split.
    lot: blake3::Hash,
}

impl Piece {
    fn new(path: PathBuf, key: &str, start: u64, bytes: u64) -> Self {
        let hash = |context, key: &str| {
            blake3::Hasher::new_derive_key(context).update(key.as_bytes()).finalize()
        };
        let key = format!("{key}#{start}");
        let order = hash("looptrain document order v1", &key);
        let lot = hash("looptrain validation split v1", &key);
        Self { path, start, bytes, order, lot }
    }

    /// The text.
    fn read(&self) -> io::Result<String> {
        let mut file = fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.start))?;
        let mut text = String::with_capacity(self.bytes as usize);
        file.take(self.bytes).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Digest of the text; `None` for what is no text.
    fn look(&self) -> Option<blake3::Hash> {
        let text = self.read().ok()?;
        let is_text = !text.contains('\0') && !text.trim().is_empty();
        (is_text && text.len() as u64 == self.bytes).then(|| blake3::hash(text.as_bytes()))
    }
}

/// All documents of a sample, in order.
#[derive(Debug, Default)]
struct Collection {
    documents: Vec<Piece>,
    /// Digests of their texts.
    texts: Vec<blake3::Hash>,
    /// Bytes of text.
    bytes: u64,
    files: u64,
    duplicates: u64,
    unreadable: u64,
}

/// A sample that was taken, in the order of its documents: as a source, one file.
pub(in super::super) struct Sample {
    collection: Collection,
    /// For each document whether it is held out.
    held: Vec<bool>,
    /// Bytes of the documents before each.
    before: Vec<u64>,
}

impl Sample {
    /// Takes a sample; `progress` is told documents and bytes so far.
    ///
    /// # Errors
    /// A sentence for the person who wrote the spec.
    pub(in super::super) fn take(
        source: &spec::Source,
        progress: impl FnMut(u64, u64) -> std::result::Result<(), String>,
    ) -> std::result::Result<Self, String> {
        let collection = collect(source, cargo_home().as_deref(), progress)?;
        let held = hold_out(&collection, source.validation_fraction)?;
        let mut sum = 0;
        let before = collection.documents.iter().map(|document| (sum, sum += document.bytes).0);
        let before = before.collect();
        Ok(Self { collection, held, before })
    }

    /// Documents.
    pub(in super::super) fn documents(&self) -> u64 {
        self.collection.documents.len() as u64
    }

    /// Files looked at, documents that were there before, and files that are no text.
    pub(in super::super) fn counts(&self) -> (u64, u64, u64) {
        let Collection { files, duplicates, unreadable, .. } = self.collection;
        (files, duplicates, unreadable)
    }

    /// Training texts of about so many bytes, an even sample of all.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(in super::super) fn texts(&self, bytes: u64) -> Result<Vec<String>> {
        let train = self.collection.documents.iter().zip(&self.held).filter(|(_, held)| !**held);
        let mut sum = 0;
        // Documents come in the order of a hash: the first ones are an even sample of all.
        let sample: Vec<&Piece> = train
            .map(|(document, _)| document)
            .take_while(|document| {
                let before = sum;
                sum += document.bytes;
                before < bytes
            })
            .collect();
        sample.into_par_iter().map(read).collect()
    }
}

fn read(piece: &Piece) -> Result<String> {
    piece.read().map_err(|error| Error::Malformed {
        place: piece.path.display().to_string(),
        reason: error.to_string(),
    })
}

impl Source for Sample {
    fn files(&self) -> usize {
        1
    }

    fn bytes(&self, _: usize) -> u64 {
        self.collection.bytes
    }

    fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for (document, text) in self.collection.documents.iter().zip(&self.collection.texts) {
            hasher.update(document.order.as_bytes()).update(text.as_bytes());
        }
        Digest::of(hasher.finalize().as_bytes())
    }

    fn place(&self, _: usize) -> String {
        "the sample".to_owned()
    }

    fn first(&self, from: u64) -> u64 {
        from.max(1)
    }

    fn read(&self, _: usize, from: u64, sink: &mut Sink<'_>) -> Result<()> {
        let documents = self.collection.documents.iter().enumerate();
        for (index, document) in documents.skip(self.first(from) as usize - 1) {
            let read = self.before[index] + document.bytes;
            sink.take(index as u64 + 1, Raw::Number, document.bytes as usize, read)?;
        }
        Ok(())
    }

    fn document(&self, record: Record) -> Result<Document> {
        let index = record.at as usize - 1;
        let text = read(&self.collection.documents[index])?;
        Ok(Document::Text { text, held: self.held[index] })
    }
}

/// Which documents validation takes: by the hash of their path until it has its share of the bytes,
/// so that more text later moves few of them.
fn hold_out(collection: &Collection, share: f64) -> std::result::Result<Vec<bool>, String> {
    let documents = &collection.documents;
    if documents.len() < 2 {
        return Err(format!(
            "too little text for a validation split: {} bytes in one document; name more files in datasets.source.paths or raise max_bytes",
            collection.bytes
        ));
    }
    let mut drawn: Vec<usize> = (0..documents.len()).collect();
    drawn.sort_by_key(|&index| *documents[index].lot.as_bytes());
    let wanted = (share * collection.bytes as f64).ceil() as u64;
    let mut held = vec![false; documents.len()];
    let mut bytes = 0;
    // One document at least stays for training.
    for &index in &drawn[..documents.len() - 1] {
        held[index] = true;
        bytes += documents[index].bytes;
        if bytes >= wanted {
            break;
        }
    }
    Ok(held)
}

/// Collects up to `source.max_bytes` of text. `progress` is told documents and bytes so far. The
/// error is a sentence for the person who wrote the spec.
fn collect(
    source: &spec::Source,
    cargo_home: Option<&Path>,
    mut progress: impl FnMut(u64, u64) -> std::result::Result<(), String>,
) -> std::result::Result<Collection, String> {
    let mut found = find(source, cargo_home)?;
    found.sort_by(|a, b| a.order.as_bytes().cmp(b.order.as_bytes()).then(a.path.cmp(&b.path)));

    let mut collection = Collection { files: found.len() as u64, ..Collection::default() };
    let mut seen = HashSet::new();
    let mut misfits = 0;
    'full: for batch in found.chunks(BATCH) {
        let looked: Vec<Option<blake3::Hash>> = batch.par_iter().map(Piece::look).collect();
        for (document, text) in batch.iter().zip(looked) {
            let Some(text) = text else {
                collection.unreadable += 1;
                continue;
            };
            if seen.contains(&text) {
                collection.duplicates += 1;
                continue;
            }
            if collection.bytes + document.bytes > source.max_bytes {
                misfits += 1;
                if misfits == MISFITS {
                    break 'full;
                }
                continue;
            }
            misfits = 0;
            seen.insert(text);
            collection.bytes += document.bytes;
            collection.texts.push(text);
            collection.documents.push(document.clone());
        }
        progress(collection.documents.len() as u64, collection.bytes)?;
    }
    if collection.documents.is_empty() {
        return Err(nothing(source, cargo_home, &collection));
    }
    Ok(collection)
}

fn nothing(source: &spec::Source, cargo_home: Option<&Path>, collection: &Collection) -> String {
    let places: Vec<String> =
        source.paths.iter().map(|path| place(path, cargo_home).display().to_string()).collect();
    format!(
        "found no text in {} (of {} files with extension {}, none is UTF-8 text that fits into max_bytes = {}); name your own files or directories in datasets.source.paths",
        places.join(", "),
        collection.files,
        source.extensions.join(", "),
        source.max_bytes
    )
}

/// Where a path leads.
fn place(path: &str, cargo_home: Option<&Path>) -> PathBuf {
    match (path, cargo_home) {
        (CARGO_REGISTRY, Some(home)) => registry(home),
        _ => path.into(),
    }
}

fn registry(cargo_home: &Path) -> PathBuf {
    cargo_home.join("registry").join("src")
}

/// Where cargo keeps what it has downloaded.
fn cargo_home() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("CARGO_HOME").or_else(|| Some(set("HOME")?.join(".cargo")))
}

/// The directory that a path stands for when it stands for the cargo registry.
pub(super) fn registry_of(path: &str) -> std::result::Result<Option<PathBuf>, String> {
    if path != CARGO_REGISTRY {
        return Ok(None);
    }
    cargo_home().map(|home| Some(registry(&home))).ok_or_else(|| NO_HOME.to_owned())
}

/// Everything that by its name could be text.
fn find(
    source: &spec::Source,
    cargo_home: Option<&Path>,
) -> std::result::Result<Vec<Piece>, String> {
    let links = Links::followed(source.paths.iter().map(|path| place(path, cargo_home)));
    let mut found = Vec::new();
    for path in &source.paths {
        if path == CARGO_REGISTRY {
            // Below src/ there is a directory per index; crates are one level further down.
            for index in indexes(&registry(cargo_home.ok_or(NO_HOME)?))? {
                below(&index, &Links::PassedOver, &source.extensions, &mut found)?;
            }
            continue;
        }
        let path = Path::new(path);
        let failed = |error: io::Error| {
            format!("cannot read {}: {error}; correct datasets.source.paths", path.display())
        };
        if fs::metadata(path).map_err(failed)?.is_dir() {
            below(path, &links, &source.extensions, &mut found)?;
            continue;
        }
        let mut file = fs::File::open(path).map_err(failed)?;
        let pieces =
            pieces_of_file(&mut file, LARGEST_PIECE).map_err(failed)?.ok_or_else(|| {
                format!("{} is not UTF-8 text; correct datasets.source.paths", path.display())
            })?;
        let key = path.file_name().unwrap_or_default().to_string_lossy();
        let piece = |(start, length)| Piece::new(path.to_owned(), &key, start, length);
        found.extend(pieces.into_iter().map(piece));
    }
    Ok(found)
}

/// The directories of the registry's indexes.
fn indexes(registry: &Path) -> std::result::Result<Vec<PathBuf>, String> {
    let failed = |error: io::Error| {
        format!(
            "cannot read {}: {error}; name your own files or directories in datasets.source.paths",
            registry.display()
        )
    };
    let entries: Vec<fs::DirEntry> =
        fs::read_dir(registry).map_err(failed)?.collect::<io::Result<_>>().map_err(failed)?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// The files below a directory that by their names could be text.
fn below(
    directory: &Path,
    links: &Links,
    extensions: &[String],
    found: &mut Vec<Piece>,
) -> std::result::Result<(), String> {
    walk(directory, links, &mut |entry: Entry| {
        if entry.is_link || !is_wanted(&entry.path, extensions) {
            return Ok(());
        }
        let metadata = fs::symlink_metadata(&entry.path);
        let metadata = metadata.map_err(|error| unreadable(&entry.path, &error))?;
        if metadata.is_file() && (1..=LARGEST_FILE).contains(&metadata.len()) {
            found.push(Piece::new(entry.path, &entry.key, 0, metadata.len()));
        }
        Ok(())
    })
}

fn is_wanted(path: &Path, extensions: &[String]) -> bool {
    let Some(extension) = path.extension().and_then(|extension| extension.to_str()) else {
        return false;
    };
    let is = |wanted: &str| wanted.trim_start_matches('.').eq_ignore_ascii_case(extension);
    !is("lock") && extensions.iter().any(|wanted| is(wanted))
}

/// Cuts a text into (start, length) of at most `largest` bytes.
pub(in super::super) fn pieces(text: &str, largest: usize) -> Vec<(usize, usize)> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let length = cut(&text[start..], largest);
        pieces.push((start, length));
        start += length;
    }
    pieces
}

/// Cuts a file as [`pieces`] cuts its text, of which it holds a piece at a time; `None` when it is none.
fn pieces_of_file(file: &mut dyn Read, largest: usize) -> io::Result<Option<Vec<(u64, u64)>>> {
    // Where a piece ends depends on the character behind it, which has four bytes at most.
    let room = largest + 4;
    let (mut pieces, mut start, mut buffer) = (Vec::new(), 0, Vec::with_capacity(room));
    loop {
        let missing = (room - buffer.len()) as u64;
        (&mut *file).take(missing).read_to_end(&mut buffer)?;
        if buffer.is_empty() {
            return Ok(Some(pieces));
        }
        let goes_on = buffer.len() == room;
        let text = match std::str::from_utf8(&buffer) {
            Ok(text) => text,
            // A character may go on behind the buffer.
            Err(error) if goes_on && error.error_len().is_none() => {
                std::str::from_utf8(&buffer[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Ok(None),
        };
        if text.contains('\0') {
            return Ok(None);
        }
        let length = cut(text, largest);
        pieces.push((start, length as u64));
        start += length as u64;
        buffer.drain(..length);
    }
}

/// Where to cut a text off that goes on: after `largest` bytes at most, best at a blank line, else at
/// a line's end, else between characters.
pub(super) fn cut(text: &str, largest: usize) -> usize {
    if text.len() <= largest {
        return text.len();
    }
    let mut end = largest;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // Only the second half is searched, so that pieces do not get small.
    let mut half = largest / 2;
    while !text.is_char_boundary(half) {
        half += 1;
    }
    let window = &text[half..end];
    let blank = window.rfind("\n\n").map(|at| at + 2);
    blank.or_else(|| window.rfind('\n').map(|at| at + 1)).map_or(end, |at| half + at)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn source(paths: &[&Path], max_bytes: u64) -> spec::Source {
        spec::Source {
            paths: paths.iter().map(|path| path.display().to_string()).collect(),
            extensions: vec!["rs".into(), ".md".into()],
            max_bytes,
            ..spec::Source::default()
        }
    }

    fn write(root: &Path, files: &[(&str, &[u8])]) {
        for (name, content) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
    }

    fn names(collection: &Collection, root: &Path) -> Vec<String> {
        let name =
            |document: &Piece| document.path.strip_prefix(root).unwrap().display().to_string();
        collection.documents.iter().map(name).collect()
    }

    fn quiet(_: u64, _: u64) -> std::result::Result<(), String> {
        Ok(())
    }

    #[test]
    fn only_text_of_the_wanted_kind_is_taken_and_the_same_text_once() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(
            root,
            &[
                ("a/lib.rs", b"fn a() {}"),
                ("b/README.MD", b"# b"),
                ("b/copy.rs", b"fn a() {}"),
                ("b/Cargo.lock", b"[[package]]"),
                ("c/binary.rs", b"fn\0"),
                ("c/latin1.rs", b"caf\xe9"),
                ("c/blank.rs", b" \n"),
                ("c/empty.rs", b""),
                ("c/large.rs", &vec![b'x'; 1 + LARGEST_FILE as usize]),
                ("c/picture.png", b"png"),
                (".git/x.md", b"hidden"),
            ],
        );
        let collection = collect(&source(&[root], 1000), None, quiet).unwrap();
        let mut taken = names(&collection, root);
        taken.sort();
        assert_eq!(taken.len(), 2, "{taken:?}");
        assert_eq!(taken[1], "b/README.MD");
        assert_eq!((collection.duplicates, collection.unreadable), (1, 3));
        assert_eq!(collection.bytes, 9 + 3);
    }

    #[test]
    fn a_limit_takes_an_even_sample_that_does_not_depend_on_the_place() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let text = |i: usize| format!("// {i:04}\n").into_bytes();
        for root in [here.path(), there.path()] {
            for i in 0..1000 {
                write(root, &[(&format!("crate-{}/f{i}.rs", i / 100), &text(i))]);
            }
        }
        let collected =
            |root: &Path| names(&collect(&source(&[root], 1600), None, quiet).unwrap(), root);
        let sample = collected(here.path());
        assert_eq!(sample, collected(there.path()));
        assert_eq!(sample.len(), 200);
        for i in 0..10 {
            let taken =
                sample.iter().filter(|name| name.starts_with(&format!("crate-{i}/"))).count();
            assert!((6..=40).contains(&taken), "{taken} of crate {i}, 20 expected");
        }
    }

    #[test]
    fn the_cargo_registry_is_found_below_the_cargo_home() {
        let home = tempfile::tempdir().unwrap();
        let file = "registry/src/index-1/serde-1.0/src/lib.rs";
        write(home.path(), &[(file, b"pub fn x() {}")]);
        let source = source(&[Path::new(CARGO_REGISTRY)], 1000);
        let collection = collect(&source, Some(home.path()), quiet).unwrap();
        assert_eq!(names(&collection, home.path()), [file]);

        let empty = tempfile::tempdir().unwrap();
        let error = collect(&source, Some(empty.path()), quiet).unwrap_err();
        let looked = empty.path().join("registry/src").display().to_string();
        assert!(error.contains(&looked) && error.contains("datasets.source.paths"), "{error}");
    }

    #[test]
    fn a_named_file_is_taken_whole_in_pieces() {
        let root = tempfile::tempdir().unwrap();
        let book: String = (0..20_000).map(|i| format!("Line ä {i}.\n\n")).collect();
        write(root.path(), &[("book", book.as_bytes())]);
        let path = root.path().join("book");
        let mut collection = collect(&source(&[&path], u64::MAX), None, quiet).unwrap();
        assert!(collection.documents.len() >= 4);
        collection.documents.sort_by_key(|document| document.start);
        let texts: Vec<String> =
            collection.documents.iter().map(|document| document.read().unwrap()).collect();
        assert_eq!(texts.concat(), book);
        assert!(texts.iter().all(|text| text.len() <= LARGEST_PIECE && text.ends_with("\n\n")));
    }

    #[test]
    fn a_text_without_lines_is_cut_between_characters() {
        let text = "ä".repeat(100_000);
        let pieces = pieces(&text, LARGEST_PIECE);
        assert_eq!(pieces.iter().map(|(_, length)| length).sum::<usize>(), text.len());
        assert!(pieces.iter().all(|&(start, _)| text.is_char_boundary(start)));
    }

    #[test]
    fn a_file_is_cut_piece_by_piece_where_its_text_is() {
        let lines: String = (0..400).map(|i| format!("Line ä\u{1f600} {i}.\n\n")).collect();
        let words = "ein zwei drüi ".repeat(300);
        for text in ["", "a", &lines, &lines[..4095], &words, &"ä\u{1f600}€".repeat(500)] {
            for largest in (16..80).chain([1000, 1024, text.len(), text.len() + 1]) {
                let expected = pieces(text, largest);
                let expected: Vec<_> =
                    expected.into_iter().map(|(at, length)| (at as u64, length as u64)).collect();
                let cut = pieces_of_file(&mut text.as_bytes(), largest).unwrap();
                assert_eq!(cut, Some(expected), "{largest}");
            }
        }
    }

    #[test]
    fn a_file_that_is_no_text_is_refused_at_the_piece_that_tells_so() {
        struct Endless(u64);
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0 += buffer.len() as u64;
                assert!(self.0 < 2 << 20, "it holds more than a piece");
                buffer.fill(b'a');
                Ok(buffer.len())
            }
        }
        let text = "a".repeat(3 * LARGEST_PIECE);
        for bad in [&b"\0"[..], b"\xe9a", b"\xff"] {
            let begin = [text.as_bytes(), bad].concat();
            let mut file = (&begin[..]).chain(Endless(0));
            assert_eq!(pieces_of_file(&mut file, LARGEST_PIECE).unwrap(), None);
            let whole = [text.as_bytes(), &bad[..1]].concat();
            assert_eq!(pieces_of_file(&mut &whole[..], LARGEST_PIECE).unwrap(), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn directories_behind_links_are_sampled_and_what_cannot_be_followed_is_named() {
        use std::os::unix::fs::symlink;

        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        write(
            root.path(),
            &[("corp/a.rs", b"a"), ("corp/sub/c.rs", b"c"), ("real2/b.rs", b"b"), ("d.rs", b"d")],
        );
        symlink("../real2", at("corp/two")).unwrap();
        symlink("..", at("corp/sub/up")).unwrap();
        symlink("../d.rs", at("corp/d.rs")).unwrap();
        let source = source(&[&at("corp")], 1000);
        let mut taken = names(&collect(&source, None, quiet).unwrap(), &at("corp"));
        taken.sort();
        assert_eq!(taken, ["a.rs", "sub/c.rs", "two/b.rs"]);

        symlink("nowhere", at("corp/gone")).unwrap();
        let error = collect(&source, None, quiet).unwrap_err();
        assert!(error.contains(&at("corp/gone").display().to_string()), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn links_of_the_cargo_registry_are_passed_over() {
        use std::os::unix::fs::symlink;

        let home = tempfile::tempdir().unwrap();
        let file = "registry/src/index-1/serde-1.0/src/lib.rs";
        write(home.path(), &[(file, b"pub fn x() {}"), ("other/y.rs", b"fn y() {}")]);
        let package = home.path().join("registry/src/index-1/serde-1.0");
        symlink("nowhere", package.join("gone")).unwrap();
        symlink(home.path().join("other"), package.join("other")).unwrap();
        let source = source(&[Path::new(CARGO_REGISTRY)], 1000);
        let collection = collect(&source, Some(home.path()), quiet).unwrap();
        assert_eq!(names(&collection, home.path()), [file]);
    }

    #[test]
    fn a_path_that_is_missing_or_no_text_is_named() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        let error = collect(&source(&[&missing], 10), None, quiet).unwrap_err();
        assert!(error.contains(&missing.display().to_string()), "{error}");
        write(root.path(), &[("picture", b"\x89PNG\0")]);
        let error = collect(&source(&[&root.path().join("picture")], 10), None, quiet).unwrap_err();
        assert!(error.contains("is not UTF-8 text"), "{error}");
    }
}
