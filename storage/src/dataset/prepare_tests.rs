//! Datasets made from small texts, end to end in a store.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Mutex;

use looptrain_proto::spec;

use super::{Dataset, PrepareEvent, Split, prepare};
use crate::{Error, Store};

fn write_texts(root: &Path, documents: usize) {
    for i in 0..documents {
        let body: String = (0..20 + i % 7)
            .map(|line| format!("/// Item {i} of the list.\nfn item_{i}_{line}() {{}}\n"))
            .collect();
        let directory = root.join(format!("crate-{}", i % 5));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(format!("file{i}.rs")), body).unwrap();
    }
}

fn source(root: &Path) -> spec::Source {
    spec::Source {
        paths: vec![root.display().to_string()],
        extensions: vec!["rs".into()],
        max_bytes: 1 << 20,
        tokenizer_vocabulary: 400,
        tokenizer_bytes: 20_000,
        validation_fraction: 0.1,
        shard_tokens: 5000,
        ..spec::Source::default()
    }
}

async fn made(store: &Store, source: &spec::Source) -> Dataset {
    prepare(store, "text", source, &|_| ()).await.unwrap()
}

#[tokio::test]
async fn the_stream_holds_every_document_once_with_an_end_after_each() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 60);
    let store = Store::open("memory://").unwrap();
    let dataset = made(&store, &source(root.path())).await;
    let tokenizer = dataset.tokenizer().await.unwrap();
    assert_eq!(tokenizer.vocabulary_size(), dataset.manifest().vocabulary_size);

    let end = tokenizer.end_of_text();
    let mut texts = Vec::new();
    for split in [Split::Train, Split::Validation] {
        let described = dataset.manifest().split(split).clone();
        // One sequence of all tokens but the last, which the sequence's target is.
        let length = described.tokens as usize - 1;
        let tokens = dataset.read_sequence(split, length, 0).await.unwrap();
        let documents: Vec<_> = tokens.split(|&t| t == end).collect();
        assert_eq!(documents.len() as u64, described.documents + 1, "the last one ends, too");
        assert_eq!(documents.last().unwrap().len(), 0);
        for document in &documents[..documents.len() - 1] {
            texts.push(tokenizer.decode(document).unwrap());
        }
        let begun: u64 = described.shards.iter().map(|shard| shard.documents).sum();
        assert_eq!(begun, described.documents);
        assert!(described.shards.iter().all(|shard| shard.tokens <= 5000));
    }
    texts.sort();
    let mut files: Vec<String> = (0..60)
        .map(|i| root.path().join(format!("crate-{}/file{i}.rs", i % 5)))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    files.sort();
    assert_eq!(texts, files);

    let (train, validation) = (&dataset.manifest().train, &dataset.manifest().validation);
    assert!(train.shards.len() > 2);
    let share = validation.bytes as f64 / (train.bytes + validation.bytes) as f64;
    assert!((0.1..0.15).contains(&share), "{share}");
    let loss = dataset.unigram_loss().await.unwrap();
    assert!(loss > 0.0 && loss < (400.0_f64).ln(), "{loss}");
}

#[tokio::test]
async fn the_same_files_and_options_give_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 40);
    let mut first: Option<Vec<_>> = None;
    for _ in 0..3 {
        let store = Store::open("memory://").unwrap();
        made(&store, &source(root.path())).await;
        let mut files = Vec::new();
        for object in store.list("datasets/text").await.unwrap() {
            let bytes = store.get(&object.key).await.unwrap();
            files.push((object.key, bytes));
        }
        assert!(files.len() > 4);
        assert_eq!(*first.get_or_insert(files.clone()), files);
    }
}

#[tokio::test]
async fn a_dataset_that_is_there_is_used_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 20);
    let store = Store::open("memory://").unwrap();
    let options = source(root.path());
    let dataset = made(&store, &options).await;
    let events = Mutex::new(Vec::new());
    let report = |event| events.lock().unwrap().push(event);
    // The text has changed since, the options have not.
    write_texts(root.path(), 25);
    let again = prepare(&store, "text", &options, &report).await.unwrap();
    assert_eq!(again.manifest(), dataset.manifest());
    assert!(events.into_inner().unwrap().is_empty());
}

#[tokio::test]
async fn a_dataset_made_with_other_options_is_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 20);
    let store = Store::open("memory://").unwrap();
    let options = source(root.path());
    let dataset = made(&store, &options).await;
    let other = spec::Source {
        tokenizer_vocabulary: 300,
        extensions: vec!["rs".into(), "md".into()],
        ..options
    };
    let error = prepare(&store, "text", &other, &|_| ()).await.unwrap_err().to_string();
    for part in [
        "`text`",
        "tokenizer_vocabulary is 300, was 400",
        r#"extensions is ["rs","md"], was ["rs"]"#,
        "put them back",
        "another name",
        "remove memory://datasets/text",
    ] {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
    assert!(!error.contains("validation_fraction") && !error.contains('\n'), "{error}");
    assert_eq!(
        Dataset::open(&store, "text").await.unwrap().unwrap().manifest(),
        dataset.manifest()
    );
}

#[tokio::test]
async fn what_an_interrupted_preparation_left_is_done_again() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 20);
    let options = source(root.path());
    let whole = Store::open("memory://").unwrap();
    let expected = made(&whole, &options).await;

    let store = Store::open("memory://").unwrap();
    for file in expected.manifest().files() {
        store.put(&format!("datasets/text/{file}"), "half a file").await.unwrap();
    }
    store.put("datasets/text/tokens-00000.arrow", "of before").await.unwrap();
    let dataset = made(&store, &options).await;
    assert!(store.size("datasets/text/tokens-00000.arrow").await.unwrap().is_none());
    assert_eq!(dataset.manifest(), expected.manifest());
    dataset.read_sequence(Split::Train, 10, 0).await.unwrap();
    dataset.tokenizer().await.unwrap();
}

#[tokio::test]
async fn progress_goes_from_text_to_the_written_dataset() {
    let root = tempfile::tempdir().unwrap();
    write_texts(root.path(), 20);
    let store = Store::open("memory://").unwrap();
    let events = Mutex::new(Vec::new());
    let report = |event| events.lock().unwrap().push(event);
    let dataset = prepare(&store, "text", &source(root.path()), &report).await.unwrap();
    let events = events.into_inner().unwrap();
    let train_tokens = dataset.manifest().train.tokens;
    assert!(matches!(events[0], PrepareEvent::Collecting { files: 20, .. }), "{events:?}");
    let vocabulary = dataset.manifest().vocabulary_size;
    assert!(events.contains(&PrepareEvent::TokenizerTrained { vocabulary }), "{events:?}");
    let done = |e: &PrepareEvent| matches!(e, PrepareEvent::Tokenizing { bytes, total_bytes, .. } if bytes == total_bytes);
    assert!(events.iter().any(done), "{events:?}");
    let last = events.last().unwrap();
    assert!(
        matches!(last, PrepareEvent::Done { train_tokens: t, .. } if *t == train_tokens),
        "{last:?}"
    );
}

#[tokio::test]
async fn too_little_text_is_said_and_leaves_no_dataset() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open("memory://").unwrap();
    let source = source(root.path());
    for (documents, said) in [(0, "found no text in"), (1, "too little text")] {
        write_texts(root.path(), documents);
        let error = prepare(&store, "text", &source, &|_| ()).await.unwrap_err();
        assert!(matches!(error, Error::Text { .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert!(store.list("").await.unwrap().is_empty());
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_store_that_fails_stops_the_preparation() {
    let (root, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_texts(root.path(), 20);
    let store = Store::open(&format!("file://{}", place.path().display())).unwrap();
    // A file where the directory of the dataset should be.
    std::fs::write(place.path().join("datasets"), "in the way").unwrap();
    let error = prepare(&store, "text", &source(root.path()), &|_| ()).await.unwrap_err();
    assert!(error.to_string().contains("datasets/text"), "{error}");
}
