//! `looptrain data`: from files to a dataset that a spec can name.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use serde_json::{Value, json};

use crate::support::{End, Running, SOON, Scratch, repository};

/// The project's own sources, one text a file.
pub(crate) fn texts() -> Vec<String> {
    fn walk(directory: &Path, texts: &mut Vec<(std::path::PathBuf, String)>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, texts);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                texts.push((path, text));
            }
        }
    }
    let mut texts = Vec::new();
    for folder in ["storage", "worker", "coordinator"] {
        walk(&repository().join(folder).join("src"), &mut texts);
    }
    texts.sort();
    texts.into_iter().map(|(_, text)| text).collect()
}

pub(crate) fn write_lines_gz(path: &Path, texts: &[String]) {
    let mut file =
        flate2::write::GzEncoder::new(File::create(path).unwrap(), flate2::Compression::fast());
    for (id, text) in texts.iter().enumerate() {
        writeln!(file, "{}", json!({ "id": id, "body": text })).unwrap();
    }
    file.finish().unwrap();
}

pub(crate) fn write_parquet(path: &Path, texts: &[String]) {
    let schema = "message page { optional binary body (UTF8); required int64 id; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
        .build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for texts in texts.chunks(10) {
        let mut group = writer.next_row_group().unwrap();
        let values: Vec<ByteArray> =
            texts.iter().map(|text| ByteArray::from(text.as_str())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        let defined = vec![1; values.len()];
        column.typed::<ByteArrayType>().write_batch(&values, Some(&defined), None).unwrap();
        column.close().unwrap();
        let ids: Vec<i64> = (0..texts.len() as i64).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// The spec of the other tests, with datasets that are in the store, and a part of it replaced.
pub(crate) fn spec_for(scratch: &Scratch, dataset: &str, vocabulary: u64) {
    let text = fs::read_to_string(scratch.path("spec.toml")).unwrap();
    let (before, rest) = text.split_once("[[datasets]]").unwrap();
    let (_, behind) = rest.split_once("\n[[stages]]").unwrap();
    let before = before.replace("vocab_size = 300", &format!("vocab_size = {vocabulary}"));
    let text = format!("{before}[[datasets]]\nname = \"{dataset}\"\n\n[[stages]]{behind}");
    fs::write(scratch.path("spec.toml"), text).unwrap();
}

pub(crate) fn json_of(end: &End) -> Value {
    assert_eq!(end.code, Some(0), "{end:?}");
    serde_json::from_str(&end.stdout).unwrap()
}

#[test]
fn lines_and_rows_become_a_dataset_that_is_checked_looked_into_and_trained_on() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("corpus")).unwrap();
    let texts = texts();
    let (lines, rows) = texts.split_at(texts.len() / 2);
    write_lines_gz(&scratch.path("corpus/0.jsonl.gz"), lines);
    write_parquet(&scratch.path("corpus/1.parquet"), rows);
    let prepare = |output: &str, more: &[&str]| {
        let data = ["data", "prepare", "--input", "corpus", "--field", "body", "--output", output];
        let options = ["--validation", "0.1", "--shard-tokens", "50000", "--json"];
        scratch.run(&[&data[..], &options, more].concat())
    };
    let made = json_of(&prepare("file://store/datasets/web", &["--vocabulary", "300"]));
    let documents = made["train"]["documents"].as_u64().unwrap()
        + made["validation"]["documents"].as_u64().unwrap();
    assert_eq!(documents, texts.len() as u64, "{made}");
    assert_eq!((&made["vocabulary"], &made["source"]["malformed"]), (&300.into(), &0.into()));
    assert!(made["train"]["shards"].as_u64().unwrap() > 3, "{made}");

    // The tokenizer that was trained is as good as one that is given.
    let tokenizer = scratch.file_of("web", "tokenizer-").unwrap();
    let given = ["--tokenizer", tokenizer.to_str().unwrap(), "--threads", "1"];
    let again = json_of(&prepare("file://store/datasets/same", &given));
    assert_eq!(again["digest"], made["digest"]);

    let dataset = "file://store/datasets/web";
    let seen = json_of(&scratch.run(&["data", "inspect", dataset, "--json"]));
    let samples = seen["train"]["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3, "{seen}");
    let begins = |sample: &Value| {
        let text = sample["text"].as_str().unwrap();
        texts.iter().any(|whole| whole.starts_with(text))
    };
    assert!(samples.iter().all(begins), "{samples:?}");
    let end = scratch.run(&["data", "inspect", dataset]);
    assert!(end.code == Some(0) && end.stdout.contains("tokens per document"), "{end:?}");
    let end = scratch.run(&["data", "verify", dataset]);
    assert!(end.code == Some(0) && end.stdout.starts_with("good dataset=web"), "{end:?}");

    spec_for(&scratch, "web", 300);
    scratch.train(&["--workers", "1"]).done();

    let shard = scratch.file_of("web", "tokens-00001-").unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let end = scratch.run(&["data", "verify", dataset]);
    let name = shard.file_name().unwrap().to_str().unwrap();
    end.fails(1, &["1 of ", name, "its digest is"]);
    assert!(end.stdout.contains(name), "{end:?}");
}

#[test]
fn a_killed_preparation_goes_on_with_the_shard_at_which_it_stopped() {
    let scratch = Scratch::new();
    let texts = texts();
    // Large enough that a process can be killed in the middle of it.
    let repeated: Vec<String> = (0..20)
        .flat_map(|round| texts.iter().map(move |text| format!("// {round}\n{text}")))
        .collect();
    for (number, part) in repeated.chunks(repeated.len() / 4).enumerate() {
        fs::create_dir_all(scratch.path("corpus")).unwrap();
        write_lines_gz(&scratch.path(&format!("corpus/{number}.jsonl.gz")), part);
    }
    let command_by = |by: &[&str], name: &str| {
        let output = format!("file://store/datasets/{name}");
        let data = ["data", "prepare", "--input", "corpus", "--field", "body", "--output", &output];
        let options = ["--vocabulary", "300", "--shard-tokens", "100000", "--threads", "1"];
        scratch.command_by(by, &[&data[..], &options].concat())
    };
    let command = |name: &str| command_by(&[], name);
    let end = Running::start(command("whole")).end();
    assert_eq!(end.code, Some(0), "{end:?}");
    let shards = |name: &str| {
        let files = fs::read_dir(scratch.path(&format!("store/datasets/{name}"))).unwrap();
        let mut files: Vec<String> = files
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.contains('#'))
            .collect();
        files.sort();
        files
    };
    let whole = shards("whole");
    assert!(whole.len() > 30, "{whole:?}");

    let mut kills = 0;
    // Behind all others that want the processor, this test among them, so that it is not done before
    // it is killed.
    let slow = |name: &str| command_by(&["nice", "-n", "19"], name);
    let path = |file: &str| scratch.path(&format!("store/datasets/killed/{file}"));
    // The inode and the time of each shard that was told to be finished.
    let mut finished: Vec<(String, (u64, i64, i64))> = Vec::new();
    let state = |file: &str| {
        let metadata = fs::metadata(scratch.file_of("killed", file).unwrap()).unwrap();
        (metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
    };
    for shard in [1, 4, 9] {
        let running = Running::start(slow("killed"));
        let wanted = format!("tokens-{shard:05}-");
        let begin = Instant::now();
        while scratch.file_of("killed", &wanted).is_none() {
            assert!(begin.elapsed() < SOON, "no {wanted}");
            std::thread::sleep(Duration::from_millis(1));
        }
        running.signal("KILL");
        assert_eq!(running.end().code, None);
        assert!(!path("manifest.json").exists(), "it was killed before its end");
        kills += 1;
        for (file, then) in &finished {
            assert_eq!(state(file), *then, "{file} was written again");
        }
        // Of the two splits there are others, `progress-tokens-00000-TAG.json`.
        let files = fs::read_dir(path("")).unwrap().map(|entry| entry.unwrap().path());
        let mut files = files.filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("progress-") && name.matches('-').count() == 1 && !name.contains('#')
        });
        let progress = fs::read(files.next().unwrap()).unwrap();
        let progress: Value = serde_json::from_slice(&progress).unwrap();
        let done = progress["work"]["train"]["shards"].as_u64().unwrap();
        assert!(done >= shard, "{done} shards are done, number {shard} was begun");
        finished = (0..done)
            .map(|number| format!("tokens-{number:05}-"))
            .map(|file| (file.clone(), state(&file)))
            .collect();
    }
    let end = Running::start(command("killed")).end();
    assert_eq!((end.code, kills), (Some(0), 3), "{end:?}");
    assert!(end.stderr.contains(&format!("going on behind {}", finished.len())), "{end:?}");
    for (file, then) in &finished {
        assert_eq!(state(file), *then, "{file} was written again");
    }
    assert_eq!(shards("killed"), whole);
    for file in whole.iter().filter(|file| *file != "manifest.json") {
        let here = fs::read(scratch.path(&format!("store/datasets/whole/{file}"))).unwrap();
        assert!(here == fs::read(path(file)).unwrap(), "{file} differs");
    }
}

#[test]
fn exercises_in_modular_arithmetic_are_a_dataset_that_a_spec_can_train_on() {
    let scratch = Scratch::new();
    let mano = ["data", "mano", "--max-operators", "3", "--exercises", "3000", "--validation"];
    let output = ["200", "--output", "file://store/datasets/mano", "--json"];
    let made = json_of(&scratch.run(&[&mano[..], &output].concat()));
    assert_eq!(made["vocabulary"], 32, "{made}");
    spec_for(&scratch, "mano", 32);
    let end =
        scratch.train(&["--workers", "1", "--set", "sample.prompt=\"<bos> <len_1> +\""]).done();
    assert!(end.stdout.contains("sample: <bos> <len_1> +"), "{end:?}");
    let seen = json_of(&scratch.run(&["data", "inspect", "file://store/datasets/mano", "--json"]));
    // Three operators, four numbers, four marks and the end.
    assert_eq!(seen["validation"]["lengths"]["longest"], 12, "{seen}");
}

#[test]
fn what_cannot_become_a_dataset_is_said_with_its_place_and_leaves_none() {
    let scratch = Scratch::new();
    let lines: String = (0..300)
        .map(|i| {
            if i % 10 == 7 {
                "{\"text\": 1}\n".to_owned()
            } else {
                format!("{}\n", json!({ "text": format!("text {i}") }))
            }
        })
        .collect();
    fs::write(scratch.path("lines.jsonl"), lines).unwrap();
    let prepare = |input: &str, output: &str, more: &[&str]| {
        let data = ["data", "prepare", "--input", input, "--output", output];
        scratch.run(&[&data[..], more].concat())
    };
    let output = "file://store/datasets/d";
    prepare("nowhere", output, &[]).fails(1, &["nowhere", "No such file"]);
    prepare("spec.toml", output, &[]).fails(1, &["spec.toml", "format"]);
    prepare("lines.jsonl", "file://store/d", &[]).fails(1, &["STORE/datasets/NAME"]);
    prepare("lines.jsonl", output, &["--validation", "2"])
        .fails(1, &["validation_fraction", "not 2"]);
    prepare("lines.jsonl", output, &["--tokenizer", "spec.toml"]).fails(1, &["tokenizer"]);
    let end = prepare("lines.jsonl", output, &[]);
    end.fails(1, &["30 of 300 records are malformed", "--max-malformed"]);
    assert!(
        end.stderr.contains("lines.jsonl:8 is malformed: its field `text` is a number"),
        "{end:?}"
    );
    assert!(!scratch.path("store/datasets/d/manifest.json").exists());
    let allowed = ["--max-malformed", "0.2", "--validation", "0.2", "--vocabulary", "270"];
    let end = prepare("lines.jsonl", output, &allowed);
    assert!(end.code == Some(0) && end.last_line().contains("malformed=30"), "{end:?}");
    // The same again changes nothing, other options are refused.
    let again = prepare("lines.jsonl", output, &allowed);
    assert_eq!(again.last_line(), end.last_line());
    prepare("lines.jsonl", output, &["--max-malformed", "0.2"]).fails(1, &["other options"]);
    scratch.run(&["data", "verify", "file://store/datasets/e"]).fails(1, &["no dataset `e`"]);
}
