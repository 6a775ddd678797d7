//! Datasets made from JSON Lines, Parquet and text files, end to end in a store.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use bytes::Bytes;
use looptrain_proto::spec::{self, Format};

use super::{
    Dataset, Mano, Origin, PrepareEvent, Recipe, Split, inspect, prepare, prepare_from, verify,
};
use crate::{Error, Store};

pub(super) fn text(i: usize) -> String {
    let line = format!("Document {i} says {} and \"quotes\".\n", i * 7919 % 1000);
    line.repeat(1 + i % 9)
}

pub(super) fn lines(documents: std::ops::Range<usize>) -> String {
    documents.map(|i| format!("{}\n", serde_json::json!({ "id": i, "text": text(i) }))).collect()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn source(root: &Path) -> spec::Source {
    spec::Source {
        paths: vec![root.display().to_string()],
        format: Format::Auto,
        tokenizer_vocabulary: 320,
        tokenizer_bytes: 20_000,
        validation_fraction: 0.1,
        shard_tokens: 3000,
        ..spec::Source::default()
    }
}

pub(super) async fn files(store: &Store) -> Vec<(String, Bytes)> {
    let mut files = Vec::new();
    for object in store.list("datasets").await.unwrap() {
        let bytes = store.get(&object.key).await.unwrap();
        files.push((object.key, bytes));
    }
    files
}

/// All documents of a split, as text.
async fn documents(dataset: &Dataset, split: Split) -> Vec<String> {
    let tokenizer = dataset.tokenizer().await.unwrap();
    let length = dataset.manifest().split(split).tokens as usize - 1;
    let tokens = dataset.read_sequence(split, length, 0).await.unwrap();
    let mut texts: Vec<String> = tokens
        .split(|&token| token == tokenizer.end_of_text())
        .map(|tokens| tokenizer.decode(tokens).unwrap())
        .collect();
    assert_eq!(texts.pop().as_deref(), Some(""), "the last document ends, too");
    texts
}

#[tokio::test]
async fn documents_come_in_the_order_of_files_and_lines_whatever_packs_them() {
    let root = tempfile::tempdir().unwrap();
    // Two members in one file, as `cat a.gz b.gz` makes it.
    let members = [gzip(lines(0..150).as_bytes()), gzip(lines(150..200).as_bytes())].concat();
    std::fs::write(root.path().join("0.jsonl.gz"), members).unwrap();
    let zstd = zstd::encode_all(lines(200..300).as_bytes(), 3).unwrap();
    std::fs::write(root.path().join("1.jsonl.zst"), zstd).unwrap();
    std::fs::write(root.path().join("2.jsonl"), lines(300..400)).unwrap();
    std::fs::write(root.path().join("3.txt"), text(400)).unwrap();
    std::fs::write(root.path().join("4.txt.gz"), gzip(text(401).as_bytes())).unwrap();
    std::fs::write(root.path().join("5.jsonl"), "").unwrap();
    let store = Store::open("memory://").unwrap();
    let dataset = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap();

    let train = documents(&dataset, Split::Train).await;
    let held = documents(&dataset, Split::Validation).await;
    let mut all = train.iter().peekable();
    let mut held = held.iter().peekable();
    for i in 0..402 {
        let expected = text(i);
        let is_next = all.next_if_eq(&&expected).or_else(|| held.next_if_eq(&&expected));
        assert!(is_next.is_some(), "document {i}");
    }
    assert!(all.next().is_none() && held.next().is_none());
    let manifest = dataset.manifest();
    assert!((20..70).contains(&manifest.validation.documents), "{}", manifest.validation.documents);
    assert!(manifest.train.shards.len() > 5);
    assert_eq!((manifest.source.files, manifest.source.records), (6, 402));
    assert_eq!(manifest.source.inputs.len(), 6);
    assert!(manifest.source.inputs[0].url.ends_with("0.jsonl.gz"));
    let left: Vec<String> = files(&store).await.into_iter().map(|(key, _)| key).collect();
    assert!(left.iter().all(|key| !key.contains("progress")), "{left:?}");
}

/// A frame of one block as `zstd --long=31` begins one: its window is of 2 GiB.
fn zstd_of_a_long_window(bytes: &[u8]) -> Vec<u8> {
    let magic_and_no_sizes = [0x28_u8, 0xb5, 0x2f, 0xfd, 0];
    let window = [(31_u8 - 10) << 3];
    let last_and_raw = (((bytes.len() << 3) | 1) as u32).to_le_bytes();
    [&magic_and_no_sizes[..], &window, &last_and_raw[..3], bytes].concat()
}

#[tokio::test]
async fn a_zstd_file_of_the_longest_window_is_read() {
    let root = tempfile::tempdir().unwrap();
    let packed = zstd_of_a_long_window(lines(0..200).as_bytes());
    std::fs::write(root.path().join("a.jsonl.zst"), packed).unwrap();
    let store = Store::open("memory://").unwrap();
    let dataset = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap();
    assert_eq!(dataset.manifest().source.records, 200);
    let mut texts = documents(&dataset, Split::Train).await;
    texts.extend(documents(&dataset, Split::Validation).await);
    texts.sort();
    let mut expected: Vec<String> = (0..200).map(text).collect();
    expected.sort();
    assert_eq!(texts, expected);
}

#[tokio::test]
async fn the_number_of_threads_changes_no_byte() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..900)).unwrap();
    let mut first: Option<Vec<_>> = None;
    for threads in [None, Some(1), Some(2), Some(7)] {
        let store = Store::open("memory://").unwrap();
        let recipe = Recipe { origin: Origin::Text(source(root.path())), threads };
        prepare_from(&store, "text", &recipe, &|_| ()).await.unwrap();
        let files = files(&store).await;
        assert!(files.len() > 6);
        assert!(*first.get_or_insert(files.clone()) == files, "{threads:?} threads");
    }
}

#[tokio::test]
async fn malformed_records_are_told_with_file_and_line_and_counted() {
    let root = tempfile::tempdir().unwrap();
    let text = lines(0..100) + "{\"text\": 5}\n{\"text\": \"\"}\nnothing\n" + &lines(100..200);
    let path = root.path().join("a.jsonl");
    std::fs::write(&path, text).unwrap();
    let mut options = source(root.path());
    let store = Store::open("memory://").unwrap();
    let told = Mutex::new(Vec::new());
    let tell = |event| {
        if let PrepareEvent::Malformed { place, reason } = event {
            told.lock().unwrap().push((place, reason));
        }
    };
    let error = {
        options.max_malformed = 0.005;
        prepare(&store, "text", &options, &tell).await.unwrap_err().to_string()
    };
    assert!(error.contains("2 of 203 records are malformed"), "{error}");
    assert!(error.contains("--max-malformed"), "{error}");
    assert!(Dataset::open(&store, "text").await.unwrap().is_none());
    // What was done is not done again when more may be malformed.
    let resumed = Mutex::new(false);
    options.max_malformed = 0.05;
    let tell_again =
        |event| *resumed.lock().unwrap() |= matches!(event, PrepareEvent::Resumed { .. });
    let dataset = prepare(&store, "text", &options, &tell_again).await.unwrap();
    assert!(resumed.into_inner().unwrap());
    let source = &dataset.manifest().source;
    assert_eq!((source.records, source.malformed, source.empty), (203, 2, 1));
    let path = path.display();
    let expected = [
        (format!("{path}:101"), "its field `text` is a number, not a string"),
        (format!("{path}:103"), "it is no JSON object: expected ident at line 1 column 2"),
    ];
    let told = told.into_inner().unwrap();
    let told: Vec<_> =
        told.iter().map(|(place, reason)| (place.clone(), reason.as_str())).collect();
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_bad_byte_of_a_text_file_leaves_one_piece_out_and_takes_what_comes_behind_it() {
    let root = tempfile::tempdir().unwrap();
    let (texts, book) = (root.path().join("a.jsonl"), root.path().join("book.txt"));
    std::fs::write(&texts, lines(0..200)).unwrap();
    let mut content = (0..2000).map(text).collect::<String>().into_bytes();
    content[70_000] = 0xe9;
    std::fs::write(&book, &content).unwrap();
    let options = spec::Source {
        paths: [&texts, &book].map(|path| path.display().to_string()).into(),
        ..source(root.path())
    };
    let store = Store::open("memory://").unwrap();
    let told = Mutex::new(Vec::new());
    let tell = |event| {
        if let PrepareEvent::Malformed { place, reason } = event {
            told.lock().unwrap().push((place, reason));
        }
    };
    let dataset = prepare(&store, "text", &options, &tell).await.unwrap();
    let told = told.into_inner().unwrap();
    let second = format!("{}:2", book.display());
    assert_eq!(told, [(second, "it is not UTF-8 text".to_owned())]);
    let manifest = dataset.manifest();
    assert_eq!(manifest.source.malformed, 1);
    let bytes: u64 = manifest.train.bytes + manifest.validation.bytes;
    let all = (0..200).map(|i| text(i).len() as u64).sum::<u64>() + content.len() as u64;
    // Its piece and no more.
    assert!((all - (64 << 10)..all - (32 << 10)).contains(&bytes), "{bytes} of {all}");
}

#[tokio::test]
async fn a_damaged_file_ends_the_work_and_is_named() {
    let root = tempfile::tempdir().unwrap();
    let packed = gzip(lines(0..500).as_bytes());
    std::fs::write(root.path().join("a.jsonl.gz"), &packed[..packed.len() / 2]).unwrap();
    let store = Store::open("memory://").unwrap();
    let error = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("a.jsonl.gz:") && error.contains("restore the file"), "{error}");
}

/// The key of the file of the dataset `text` whose name begins so.
pub(super) async fn key_of(store: &Store, begin: &str) -> String {
    let listed = store.list("datasets/text").await.unwrap();
    let begin = format!("datasets/text/{begin}");
    let mut keys =
        listed.into_iter().map(|object| object.key).filter(|key| key.starts_with(&begin));
    let key = keys.next().unwrap();
    assert_eq!(keys.next(), None);
    key
}

/// Begins a preparation that dies when `done` shards, or more, are in the store.
pub(super) async fn interrupted(store: &Store, recipe: &Recipe, done: u64) {
    let (store, recipe) = (store.clone(), recipe.clone());
    let making = tokio::spawn(async move {
        let die = |event| match event {
            PrepareEvent::Tokenizing { shards, .. } if shards >= done => {
                std::panic::resume_unwind(Box::new("interrupted"))
            }
            _ => {}
        };
        prepare_from(&store, "text", &recipe, &die).await.map(drop)
    });
    let end = making.await;
    assert!(end.is_err_and(|end| end.is_panic()), "it ended before {done} shards were there");
}

#[tokio::test]
async fn an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    for file in 0..6 {
        let broken = if file % 2 == 0 { "broken\n" } else { "" };
        let text = lines(file * 150..file * 150 + 150) + broken;
        std::fs::write(root.path().join(format!("{file}.jsonl.gz")), gzip(text.as_bytes()))
            .unwrap();
    }
    let recipe = Recipe { origin: Origin::Text(source(root.path())), threads: Some(2) };
    let whole = Store::open("memory://").unwrap();
    prepare_from(&whole, "text", &recipe, &|_| ()).await.unwrap();
    let whole = files(&whole).await;

    for done in [1, 4, 9] {
        let store = Store::open("memory://").unwrap();
        interrupted(&store, &recipe, done).await;
        // What is finished is not made again, so this stays (and is found by its size alone).
        let key = &key_of(&store, "tokens-00000-").await;
        let marked = vec![7; store.get(key).await.unwrap().len()];
        store.put(key, marked.clone()).await.unwrap();
        let resumed = Mutex::new(0);
        let tell = |event| {
            if let PrepareEvent::Resumed { shards, .. } = event {
                *resumed.lock().unwrap() = shards;
            }
        };
        prepare_from(&store, "text", &recipe, &tell).await.unwrap();
        assert!(resumed.into_inner().unwrap() >= done);
        assert_eq!(store.get(key).await.unwrap(), marked);
        let original = whole.iter().find(|(name, _)| name == key).unwrap().1.clone();
        store.put(key, original).await.unwrap();
        assert!(files(&store).await == whole, "interrupted after {done} shards");
    }
}

#[tokio::test]
async fn what_lies_there_of_other_texts_is_removed() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..600)).unwrap();
    let recipe = Recipe { origin: Origin::Text(source(root.path())), threads: None };
    let store = Store::open("memory://").unwrap();
    interrupted(&store, &recipe, 5).await;
    std::fs::write(root.path().join("a.jsonl"), lines(10..90)).unwrap();
    let restarted = Mutex::new(false);
    let tell = |event| *restarted.lock().unwrap() |= event == PrepareEvent::Restarted;
    let dataset = prepare_from(&store, "text", &recipe, &tell).await.unwrap();
    assert!(restarted.into_inner().unwrap());
    let manifest = dataset.manifest();
    let shards = manifest.train.shards.len() + manifest.validation.shards.len();
    assert_eq!(files(&store).await.len(), shards + 2, "shards, tokenizer and manifest alone");
}

#[tokio::test]
async fn objects_of_a_store_and_a_tokenizer_there_are_as_good_as_files() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..300)).unwrap();
    let store = Store::open("memory://").unwrap();
    let by_file = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap();
    let tokenizer = store.get(&key_of(&store, "tokenizer").await).await.unwrap();

    let corpus = Store::open("memory://corpus").unwrap();
    corpus.put("web/0.jsonl", lines(0..300)).await.unwrap();
    corpus.put("tokenizer.json", tokenizer).await.unwrap();
    let mut options = source(root.path());
    options.paths = vec!["memory://corpus/web".into()];
    options.tokenizer = Some("memory://corpus/tokenizer.json".into());
    let by_object = prepare(&store, "other", &options, &|_| ()).await.unwrap();
    assert_eq!(by_object.digest(), by_file.digest());

    options.tokenizer = Some("memory://corpus/none.json".into());
    let error = prepare(&store, "third", &options, &|_| ()).await.unwrap_err().to_string();
    assert!(error.contains("memory://corpus/none.json does not exist"), "{error}");
}

#[tokio::test]
async fn verifying_names_each_bad_file_and_inspecting_shows_what_is_there() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..400)).unwrap();
    let store = Store::open("memory://").unwrap();
    let dataset = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap();
    let manifest = dataset.manifest();
    let mut read = (0, 0);
    assert_eq!(verify(&store, manifest, |files, bytes| read = (files, bytes)).await.unwrap(), []);
    let shards = || manifest.train.shards.iter().chain(&manifest.validation.shards);
    let bytes: u64 = shards().map(|shard| shard.bytes).sum();
    assert_eq!(read, (1 + shards().count() as u64, bytes));

    for split in [Split::Train, Split::Validation] {
        let described = manifest.split(split);
        let (lengths, samples) = inspect(&store, &dataset, split, 4, |_| ()).await.unwrap();
        let sum = |of: fn(&super::Bucket) -> u64| lengths.histogram.iter().map(of).sum::<u64>();
        assert_eq!(sum(|bucket| bucket.documents), described.documents);
        assert_eq!(sum(|bucket| bucket.tokens), described.tokens);
        assert_eq!(samples.len(), 4);
        assert!(samples.iter().all(|sample| sample.text.starts_with("Document ")), "{samples:?}");
    }

    let (tokenizer, shard) =
        (key_of(&store, "tokenizer").await, key_of(&store, "tokens-00002-").await);
    let missing = key_of(&store, "validation-00000-").await;
    let mut bytes = store.get(&shard).await.unwrap().to_vec();
    bytes[700] ^= 1;
    store.put(&shard, bytes).await.unwrap();
    store.delete(&missing).await.unwrap();
    store.put(&tokenizer, "{}").await.unwrap();
    let bad = verify(&store, manifest, |_, _| ()).await.unwrap();
    let places: Vec<&str> =
        bad.iter().map(|bad| bad.place.strip_prefix("memory://").unwrap()).collect();
    assert_eq!(places, [&tokenizer, &shard, &missing]);
    assert!(bad[1].reason.contains("its digest is blake3:"), "{}", bad[1].reason);
    assert_eq!(bad[2].reason, "it is missing");
}

#[tokio::test]
async fn exercises_become_a_dataset_a_word_a_token() {
    let store = Store::open("memory://").unwrap();
    let mano = Mano { operators: 4, modulus: 23, train: 500, validation: 50, seed: 1 };
    let recipe = Recipe { origin: Origin::Mano { mano, shard_tokens: 2000 }, threads: None };
    let dataset = prepare_from(&store, "mano", &recipe, &|_| ()).await.unwrap();
    let manifest = dataset.manifest();
    assert_eq!((manifest.train.documents, manifest.validation.documents), (500, 50));
    // The end, two marks, three operators, 23 numbers, four lengths.
    assert_eq!(manifest.vocabulary_size, 33);
    for text in documents(&dataset, Split::Validation).await {
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!((words.len(), words[0], words[1]), (13, "<bos>", "<len_4>"), "{text}");
    }
    // An exercise has a token a word, and the end after it.
    assert_eq!(manifest.validation.tokens, 50 * 14);
}
