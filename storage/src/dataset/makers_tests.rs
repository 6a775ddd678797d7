//! Several makers under one dataset's name: one after another died, or all at once.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use looptrain_proto::spec::{self, Format};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;

use super::files_tests::{files, gzip, interrupted, key_of, lines, source, text};
use super::{
    Dataset, DatasetManifest, Mano, Origin, PrepareEvent, Recipe, Split, Synthetic, prepare_from,
    synthetic, verify,
};
use crate::{Error, Result, Store};

fn recipe(root: &Path) -> Recipe {
    Recipe { origin: Origin::Text(source(root)), threads: Some(2) }
}

fn memory() -> Store {
    Store::open("memory://").unwrap()
}

/// A file with the column `text`, in row groups of 40.
fn write_parquet(path: &Path, documents: std::ops::Range<usize>) {
    let schema = "message m { required binary text (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let texts: Vec<String> = documents.map(text).collect();
    for texts in texts.chunks(40) {
        let mut group = writer.next_row_group().unwrap();
        let values: Vec<ByteArray> =
            texts.iter().map(|text| ByteArray::from(text.as_str())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// Everything that is made without a disturbance.
async fn undisturbed(recipe: &Recipe) -> Vec<(String, Bytes)> {
    let store = memory();
    prepare_from(&store, "text", recipe, &|_| ()).await.unwrap();
    files(&store).await
}

/// Interrupts the making of a dataset after the first shard, in its middle, twice, and before its
/// last shard; whatever was written, manifest and all, is what is written without that.
async fn interruptions_change_no_byte(recipe: Recipe) -> DatasetManifest {
    let whole = undisturbed(&recipe).await;
    let shards = whole.iter().filter(|(key, _)| key.ends_with(".arrow")).count() as u64;
    assert!(shards > 4, "{shards} shards");
    for deaths in [vec![1], vec![2, shards / 2, shards - 2], vec![shards]] {
        let store = memory();
        for &done in &deaths {
            interrupted(&store, &recipe, done).await;
        }
        let resumed = AtomicBool::new(false);
        let tell = |event| {
            resumed.fetch_or(matches!(event, PrepareEvent::Resumed { .. }), Ordering::Relaxed);
        };
        prepare_from(&store, "text", &recipe, &tell).await.unwrap();
        assert!(resumed.into_inner());
        for ((key, bytes), (wanted, expected)) in files(&store).await.iter().zip(&whole) {
            assert!((key, bytes) == (wanted, expected), "{key} after {deaths:?}: {bytes:?}");
        }
        assert_eq!(files(&store).await.len(), whole.len(), "nothing else is left");
    }
    let manifest = whole.iter().find(|(key, _)| key.ends_with("manifest.json")).unwrap();
    serde_json::from_slice(&manifest.1).unwrap()
}

#[tokio::test]
async fn exercises_that_are_interrupted_end_with_the_bytes_of_undisturbed_ones() {
    let mano = Mano { operators: 4, modulus: 23, train: 900, validation: 90, seed: 1 };
    let recipe = Recipe { origin: Origin::Mano { mano, shard_tokens: 2000 }, threads: Some(2) };
    let manifest = interruptions_change_no_byte(recipe).await;
    assert_eq!(manifest.source.records, 990);
}

#[tokio::test]
async fn files_of_all_formats_that_are_interrupted_end_with_the_bytes_of_undisturbed_ones() {
    let root = tempfile::tempdir().unwrap();
    let broken = lines(0..200) + "broken\n{\"text\": \"\"}\n" + &lines(200..220);
    std::fs::write(root.path().join("0.jsonl.gz"), gzip(broken.as_bytes())).unwrap();
    write_parquet(&root.path().join("1.parquet"), 220..400);
    for file in 2..40 {
        std::fs::write(root.path().join(format!("{file}.txt")), text(400 + file)).unwrap();
    }
    write_parquet(&root.path().join("9.parquet"), 500..600);
    let manifest = interruptions_change_no_byte(recipe(root.path())).await;
    let summary = &manifest.source;
    assert_eq!((summary.records, summary.malformed, summary.empty), (222 + 180 + 38 + 100, 1, 1));
}

#[tokio::test]
async fn pieces_of_a_text_with_a_bad_byte_that_are_interrupted_end_with_the_bytes_of_undisturbed_ones()
 {
    let root = tempfile::tempdir().unwrap();
    let (texts, book) = (root.path().join("a.jsonl"), root.path().join("book.txt"));
    std::fs::write(&texts, lines(0..200)).unwrap();
    let mut content = (0..2000).map(text).collect::<String>().into_bytes();
    content[70_000] = 0xe9;
    std::fs::write(&book, content).unwrap();
    let options = spec::Source {
        paths: [&texts, &book].map(|path| path.display().to_string()).into(),
        shard_tokens: 20_000,
        ..source(root.path())
    };
    let recipe = Recipe { origin: Origin::Text(options), threads: Some(2) };
    let manifest = interruptions_change_no_byte(recipe).await;
    assert_eq!(manifest.source.malformed, 1);
    assert!(manifest.source.records > 204, "{}", manifest.source.records);
}

#[tokio::test]
async fn a_sample_that_is_interrupted_ends_with_the_bytes_of_an_undisturbed_one() {
    let root = tempfile::tempdir().unwrap();
    for file in 0..300 {
        std::fs::write(root.path().join(format!("{file}.txt")), text(file)).unwrap();
    }
    let options = spec::Source { format: Format::Sample, ..source(root.path()) };
    let recipe = Recipe { origin: Origin::Text(options), threads: Some(2) };
    let manifest = interruptions_change_no_byte(recipe).await;
    assert_eq!(manifest.source.records, 300);
}

/// Makes `slow`, and in the middle of that, when it has two shards, all of `fast` under the same name.
async fn overtaken(store: &Store, slow: &Recipe, fast: &Recipe) -> Result<Dataset> {
    let overtaken = AtomicBool::new(false);
    let overtake = |event| {
        let is_middle = matches!(event, PrepareEvent::Tokenizing { shards: 2.., .. });
        if is_middle && !overtaken.swap(true, Ordering::Relaxed) {
            tokio::task::block_in_place(|| {
                let fast = prepare_from(store, "text", fast, &|_| ());
                tokio::runtime::Handle::current().block_on(fast).unwrap();
            });
        }
    };
    let made = prepare_from(store, "text", slow, &overtake).await;
    assert!(overtaken.into_inner());
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_datasets_of_one_name_the_first_that_is_complete_stands_whole_and_the_other_says_so()
{
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(one.path().join("a.jsonl"), lines(0..600)).unwrap();
    std::fs::write(other.path().join("a.jsonl"), lines(700..900)).unwrap();
    let exercises = Recipe {
        origin: Origin::Mano {
            mano: Mano { operators: 3, modulus: 23, train: 400, validation: 40, seed: 1 },
            shard_tokens: 1000,
        },
        threads: None,
    };
    let text = recipe(one.path());
    for (slow, fast) in [(&text, &recipe(other.path())), (&exercises, &text), (&text, &exercises)] {
        let store = memory();
        let error = overtaken(&store, slow, fast).await.unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
        let error = error.to_string();
        assert!(
            error.contains("datasets/text/manifest.json") && error.contains("stands"),
            "{error}"
        );
        // What lies there is the other's, to the byte, and nothing of this one.
        assert!(files(&store).await == undisturbed(fast).await);
        let dataset = Dataset::open(&store, "text").await.unwrap().unwrap();
        assert_eq!(verify(&store, dataset.manifest(), |_, _| ()).await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_makers_of_the_same_tokens_both_end_well() {
    let (one, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for root in [&one, &copy] {
        std::fs::write(root.path().join("a.jsonl"), lines(0..400)).unwrap();
    }
    // The same files, and others of the same content, whose tag is another.
    for fast in [recipe(one.path()), recipe(copy.path())] {
        let store = memory();
        let made = overtaken(&store, &recipe(one.path()), &fast).await.unwrap();
        assert!(files(&store).await == undisturbed(&fast).await);
        assert_eq!(verify(&store, made.manifest(), |_, _| ()).await.unwrap(), []);
    }
}

#[tokio::test]
async fn what_dead_makers_have_left_beside_a_dataset_goes_and_nothing_else_does() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..600)).unwrap();
    let store = memory();
    let text = recipe(root.path());
    interrupted(&store, &text, 3).await;
    let left = files(&store).await;
    std::fs::write(root.path().join("a.jsonl"), lines(0..90)).unwrap();
    prepare_from(&store, "text", &text, &|_| ()).await.unwrap();
    let whole = files(&store).await;
    assert!(left.iter().all(|file| !whole.contains(file)));

    // Left by one that died after the dataset was complete.
    for (key, bytes) in left {
        store.put(&key, bytes).await.unwrap();
    }
    store.put("datasets/text/NOTES.md", "of a person").await.unwrap();
    prepare_from(&store, "text", &text, &|_| ()).await.unwrap();
    store.delete("datasets/text/NOTES.md").await.unwrap();
    assert!(files(&store).await == whole);
}

#[tokio::test]
async fn a_dataset_whose_files_have_the_names_of_before_is_read_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..300)).unwrap();
    let store = memory();
    let text = recipe(root.path());
    let made = prepare_from(&store, "text", &text, &|_| ()).await.unwrap();
    let expected = made.read_sequence(Split::Train, 5000, 0).await.unwrap();

    let mut manifest = serde_json::to_value(made.manifest()).unwrap();
    manifest.as_object_mut().unwrap().remove("tokenizer");
    let mut json = manifest.to_string();
    for file in made.manifest().files() {
        let (before, _) = file.rsplit_once('-').unwrap();
        let old = format!("{before}.{}", file.rsplit_once('.').unwrap().1);
        let bytes = store.get(&format!("datasets/text/{file}")).await.unwrap();
        store.delete(&format!("datasets/text/{file}")).await.unwrap();
        store.put(&format!("datasets/text/{old}"), bytes).await.unwrap();
        json = json.replace(file, &old);
    }
    store.put("datasets/text/manifest.json", json).await.unwrap();
    assert_eq!(key_of(&store, "tokens-00001").await, "datasets/text/tokens-00001.arrow");
    let before = files(&store).await;

    let dataset = prepare_from(&store, "text", &text, &|_| ()).await.unwrap();
    assert_eq!(dataset.digest(), made.digest());
    assert_eq!(dataset.read_sequence(Split::Train, 5000, 0).await.unwrap(), expected);
    dataset.tokenizer().await.unwrap();
    assert_eq!(verify(&store, dataset.manifest(), |_, _| ()).await.unwrap(), []);
    assert!(files(&store).await == before);
}

#[tokio::test]
async fn a_shard_that_is_gone_when_the_manifest_is_to_be_put_is_named_and_there_is_no_dataset() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.jsonl"), lines(0..300)).unwrap();
    let place = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", place.path().display())).unwrap();
    let gone = AtomicBool::new(false);
    let remove = |event| {
        let is_middle = matches!(event, PrepareEvent::Tokenizing { shards: 2.., .. });
        if is_middle && !gone.swap(true, Ordering::Relaxed) {
            let files = std::fs::read_dir(place.path().join("datasets/text")).unwrap();
            let mut files = files.map(|entry| entry.unwrap().path());
            let first = |path: &std::path::PathBuf| {
                path.file_name().unwrap().to_str().unwrap().starts_with("tokens-00000-")
            };
            std::fs::remove_file(files.find(first).unwrap()).unwrap();
        }
    };
    let made = prepare_from(&store, "text", &recipe(root.path()), &remove).await;
    let error = made.unwrap_err().to_string();
    assert!(error.contains("tokens-00000-") && error.contains("is not there"), "{error}");
    assert!(Dataset::open(&store, "text").await.unwrap().is_none());
}

#[tokio::test]
async fn synthetic_tokens_of_two_kinds_share_no_file() {
    let what = Synthetic { tokens: 9000, shard_tokens: 4000, vocabulary_size: 500 };
    let store = memory();
    synthetic(&store, "text", what).await.unwrap();
    let one = files(&store).await;
    store.delete("datasets/text/manifest.json").await.unwrap();
    let other = Synthetic { vocabulary_size: 400, ..what };
    synthetic(&store, "text", other).await.unwrap();
    let two = files(&store).await;
    assert!(one.len() == two.len() && one.len() > 4);
    let shards = |files: &[(String, Bytes)]| -> Vec<String> {
        let keys = files.iter().map(|(key, _)| key.clone());
        keys.filter(|key| key.ends_with(".arrow")).collect()
    };
    assert!(shards(&one).iter().all(|key| !shards(&two).contains(key)));
}
