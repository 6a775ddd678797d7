//! Datasets of which a file is any bytes, and the sources and tokenizers that one is made of.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use looptrain_proto::fuzzing::{MEMORY, Target};
use looptrain_proto::{Digest, Spec, Step, spec};
use object_store::memory::InMemory;
use tempfile::TempDir;

use super::contents::{Contents, Ending};
use super::resume::Progress;
use super::source::{Document, Files, Sink, Source};
use super::tree::BLOCK;
use super::{
    Dataset, DatasetManifest, PrepareEvent, ShardEntry, SourceSummary, Split, SplitManifest,
    TextTokenizer, TokenType, check_fit, inspect, prepare, read_sequences, shard, verify,
};
use crate::fuzzing::{handle, store_of, wait};
use crate::{Order, SlotUse, StepUse, Store};

pub(crate) const TARGETS: [Target; 10] = [
    Target { name: "dataset_manifest", run: manifest, samples: manifests, memory: MEMORY },
    Target { name: "dataset_shard", run: one_shard, samples: shards, memory: MEMORY },
    Target { name: "shard_ending", run: ending, samples: endings, memory: MEMORY },
    Target { name: "progress", run: progress, samples: progresses, memory: 2 * MEMORY },
    Target { name: "tokenizer", run: tokenizer, samples: tokenizers, memory: 2 * MEMORY },
    Target { name: "jsonl", run: jsonl, samples: lines, memory: MEMORY },
    Target { name: "jsonl_gzip", run: gzip, samples: gzipped, memory: 2 * MEMORY },
    // A frame may ask for a window of 2 GiB, of which only what its text fills is taken; AddressSanitizer
    // sees the request, and wants -malloc_limit_mb=4096.
    Target { name: "jsonl_zstd", run: zstd, samples: zstd_frames, memory: 10 * MEMORY },
    Target { name: "text", run: text, samples: texts, memory: MEMORY },
    Target { name: "parquet", run: parquet, samples: tables, memory: 2 * MEMORY },
];

// ---- datasets ----------------------------------------------------------------------------------

/// Entries of the sample's vocabulary.
const VOCABULARY: usize = 300;

fn trained() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let text = "fn main() { println!(\"one two three, one two\"); }\n".to_owned();
        TextTokenizer::train(&[text], VOCABULARY).expect("any text has tokens")
    })
}

fn vocabulary() -> usize {
    let tokenizer = TextTokenizer::with_end_of_text(trained(), 0).expect("it was just made");
    tokenizer.vocabulary_size()
}

/// A shard of `count` tokens, a document every seven.
fn shard_of(count: u32) -> Bytes {
    let tokens: Vec<u32> = (0..count).map(|i| if i % 7 == 6 { 0 } else { i % 250 }).collect();
    let starts: Vec<bool> = (0..count).map(|i| i % 7 == 0).collect();
    shard::encode(TokenType::U16, &tokens, &starts).expect("tokens have 16 bits")
}

/// The manifest of a dataset whose training split is in these files; the validation split is in the
/// first one, too.
fn manifest_of(files: &[(String, Bytes, u64, u64)]) -> DatasetManifest {
    let entry = |(file, bytes, tokens, documents): &(String, Bytes, u64, u64)| ShardEntry {
        file: file.clone(),
        tokens: *tokens,
        documents: *documents,
        bytes: bytes.len() as u64,
        digest: Digest::of(bytes),
    };
    let split = |shards: Vec<ShardEntry>| SplitManifest {
        tokens: shards.iter().map(|shard| shard.tokens).sum(),
        documents: shards.iter().map(|shard| shard.documents).sum(),
        bytes: 100,
        shards,
    };
    DatasetManifest {
        version: DatasetManifest::VERSION,
        name: "d".into(),
        vocabulary_size: vocabulary(),
        tokenizer: "tokenizer.json".into(),
        tokenizer_digest: Digest::of(trained()),
        end_of_text: 0,
        dtype: TokenType::U16,
        train: split(files.iter().map(entry).collect()),
        validation: split(vec![entry(&files[0])]),
        unigram_loss: None,
        source: SourceSummary::default(),
    }
}

fn named(number: usize, bytes: Bytes, tokens: u64, documents: u64) -> (String, Bytes, u64, u64) {
    (format!("tokens-{number:05}.arrow"), bytes, tokens, documents)
}

fn sample_files() -> Vec<(String, Bytes, u64, u64)> {
    vec![named(0, shard_of(70), 70, 10), named(1, shard_of(21), 21, 3)]
}

fn stored(manifest: Vec<u8>, files: &[(String, Bytes, u64, u64)]) -> Store {
    let files = files.iter().map(|(file, bytes, ..)| (format!("datasets/d/{file}"), bytes.clone()));
    let tokenizer = ("datasets/d/tokenizer.json".to_owned(), Bytes::from_static(trained()));
    let manifest = ("datasets/d/manifest.json".to_owned(), manifest.into());
    store_of(files.chain([tokenizer, manifest]))
}

/// Reads a dataset in every way there is; whether it is one, and whole.
fn read(store: &Store) -> bool {
    let Ok(Some(dataset)) = wait(Dataset::open(store, "d")) else { return false };
    let _ = dataset.digest();
    let _ = check_fit(&spec(), std::slice::from_ref(&dataset));
    let _ = dataset.check_source(&spec::Source::default());
    let mut whole = true;
    for (split, length) in [(Split::Train, 9), (Split::Validation, 4), (Split::Train, 1 << 10)] {
        let count = dataset.sequences(split, length);
        for index in [0, 1, count / 2, count.saturating_sub(1), count] {
            let tokens = wait(dataset.read_sequence(split, length, index));
            if let Ok(tokens) = &tokens {
                assert!(tokens.len() == length + 1 && index < count);
            }
            whole &= tokens.is_ok() || index >= count;
        }
        whole &= wait(inspect(store, &dataset, split, 3, |_| {})).is_ok();
    }
    let _ = wait(read_sequences(&[(&dataset, 0), (&dataset, 1)], Split::Train, 5));
    whole &= wait(dataset.unigram_loss()).is_ok_and(|loss| loss.is_finite());
    whole &= wait(verify(store, dataset.manifest(), |_, _| {})).is_ok_and(|bad| bad.is_empty());
    whole && wait(dataset.tokenizer()).is_ok()
}

/// The manifest of a dataset whose files are there.
fn manifest(bytes: &[u8]) -> bool {
    read(&stored(bytes.to_vec(), &sample_files()))
}

fn manifests() -> Vec<Vec<u8>> {
    let manifest = manifest_of(&sample_files());
    let known = DatasetManifest { unigram_loss: Some(5.0), ..manifest.clone() };
    [manifest, known].map(|it| serde_json::to_vec_pretty(&it).expect("it has a JSON form")).into()
}

/// A shard of a dataset whose manifest names it as it is.
fn one_shard(bytes: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(bytes);
    let tokens = match Contents::of_ending(&bytes, 0) {
        Ok(Ending::Complete(contents, _)) => Some(contents.tokens),
        _ => Contents::of_file(&bytes, TokenType::U16).ok().map(|contents| contents.tokens),
    };
    let starts = shard::starts(&bytes).map_or(10, |starts| starts.len() as u64);
    // Larger ones do not add up, which is the manifest's fault.
    let tokens = tokens.filter(|tokens| *tokens < 1 << 60).unwrap_or(70);
    let files = [named(0, bytes, tokens, starts), named(1, shard_of(21), 21, 3)];
    let manifest = manifest_of(&files);
    read(&stored(serde_json::to_vec(&manifest).expect("it has a JSON form"), &files))
}

fn shards() -> Vec<Vec<u8>> {
    let tokens: Vec<u32> = (0..70).collect();
    let wide = shard::encode(TokenType::U32, &tokens, &[false; 70]).expect("any tokens");
    // The second one has more than one block, so that its end alone is read first.
    [shard_of(70), shard_of(45_000), wide].map(|bytes| bytes.to_vec()).into()
}

/// The end of a shard, from a block on that the first byte tells, and the same as a whole file.
fn ending(bytes: &[u8]) -> bool {
    let Some((&block, bytes)) = bytes.split_first() else { return false };
    let read = Contents::of_ending(bytes, u64::from(block % 4) * BLOCK);
    let (first, count) = (3, 50_000);
    let check = |contents: &Contents| {
        let (size, says) = (bytes.len() as u64 + u64::from(block % 4) * BLOCK, contents.tokens);
        if contents.complaint(size, says).is_none() {
            assert!(
                contents.ranges(first, count.min(says)).all(|range| range.end <= size + 100_000)
            );
        }
    };
    if let Ok(Ending::Complete(contents, _)) = &read {
        check(contents);
    }
    if let Ok(contents) = Contents::of_file(bytes, TokenType::U32) {
        check(&contents);
    }
    let _ = (shard::decode(bytes), shard::starts(bytes));
    matches!(read, Ok(Ending::Complete(..)))
}

fn endings() -> Vec<Vec<u8>> {
    let (small, large) = (shard_of(70), shard_of(45_000));
    let behind = |blocks: u8, file: &Bytes| {
        [&[blocks][..], &file[usize::from(blocks) * BLOCK as usize..]].concat()
    };
    vec![behind(0, &small), behind(1, &large), behind(0, &large)]
}

// ---- the audit ---------------------------------------------------------------------------------

fn spec() -> Spec {
    let tiny = include_str!("../../../examples/tiny.toml");
    let overrides = ["stages.0.sequence_length=9", "stages.0.slots=2", "stages.0.slot_sequences=2"];
    Spec::parse("tiny", tiny, &overrides.map(str::to_owned)).expect("the example is a spec")
}

fn sample() -> Dataset {
    let files = sample_files();
    let manifest = serde_json::to_vec(&manifest_of(&files)).expect("it has a JSON form");
    let opened = wait(Dataset::open(&stored(manifest, &files), "d"));
    opened.expect("it is there").expect("it has a manifest")
}

/// What the first step of the sample uses.
pub(crate) fn first_step() -> Vec<SlotUse> {
    let (spec, dataset) = (spec(), sample());
    let order = Order::of_stage(&spec, 0, std::slice::from_ref(&dataset));
    let (name, at) = (&spec.datasets[0].name, spec.position(Step(1)).expect("there is a step"));
    let of_slot = |slot: u32| {
        let first = at.first_sequence + 2 * u64::from(slot);
        let sequences: Vec<u64> =
            (first..first + 2).map(|index| order.at(index).sequence).collect();
        let read = sequences.iter().flat_map(|&sequence| {
            wait(dataset.read_sequence(Split::Train, 9, sequence)).expect("it is there")
        });
        let bytes: Vec<u8> = read.flat_map(u32::to_le_bytes).collect();
        let sequences = sequences.into_iter().map(|sequence| (name.clone(), sequence)).collect();
        SlotUse { slot, sequences, tokens: Digest::of(&bytes) }
    };
    (0..at.slots).map(of_slot).collect()
}

/// Whether steps of the sample used what they should have.
pub(crate) fn check_audit(steps: &[StepUse]) -> bool {
    thread_local! {
        static SAMPLE: (Spec, Dataset) = (spec(), sample());
    }
    SAMPLE.with(|(spec, dataset)| {
        wait(crate::check_audit(spec, std::slice::from_ref(dataset), steps, true)).is_ok()
    })
}

// ---- unfinished preparations -------------------------------------------------------------------

/// A preparation that was interrupted: its text, and what it had left.
struct Interrupted {
    _text: TempDir,
    source: spec::Source,
    left: InMemory,
    /// Where its progress lies.
    key: String,
    progress: Vec<u8>,
}

fn interrupted() -> &'static Interrupted {
    static LEFT: OnceLock<Interrupted> = OnceLock::new();
    LEFT.get_or_init(|| {
        let text = tempfile::tempdir().expect("a temporary directory");
        let line = |i: u32| format!("{{\"text\": \"line {i} says {}\"}}\n", i * 7919);
        let lines: String = (0..60).map(line).collect();
        std::fs::write(text.path().join("a.jsonl"), lines).expect("it is writable");
        let source = spec::Source {
            paths: vec![text.path().display().to_string()],
            format: spec::Format::Jsonl,
            tokenizer_vocabulary: VOCABULARY,
            tokenizer_bytes: 1000,
            validation_fraction: 0.2,
            shard_tokens: 256,
            ..spec::Source::default()
        };
        let objects = Arc::new(InMemory::new());
        let store = Store::simulated(objects.clone(), "memory://");
        let forks = Mutex::new(Vec::new());
        let fork = |event: PrepareEvent| {
            if matches!(event, PrepareEvent::Tokenizing { shards: 1.., .. }) {
                forks.lock().expect("nobody panics with it").push(objects.fork());
            }
        };
        wait(prepare(&store, "d", &source, &fork)).expect("there is text");
        let forks = forks.into_inner().expect("nobody panics with it");
        let with_progress = forks.into_iter().rev().find_map(|left| {
            let store = Store::simulated(Arc::new(left.fork()), "memory://");
            let objects = wait(store.list("datasets/d")).expect("a store in memory is listed");
            let is_progress = |key: &&String| {
                let file = key.rsplit('/').next().unwrap_or_default();
                file.starts_with("progress-") && file.matches('-').count() == 1
            };
            let key = objects.iter().map(|object| &object.key).find(is_progress)?.clone();
            let progress = wait(store.get(&key)).expect("it was just listed").to_vec();
            Some((left, key, progress))
        });
        let (left, key, progress) = with_progress.expect("progress is written after a shard");
        Interrupted { _text: text, source, left, key, progress }
    })
}

/// What an interrupted preparation has left, which another one goes on with or does not.
fn progress(bytes: &[u8]) -> bool {
    let Interrupted { source, left, key, .. } = interrupted();
    let store = Store::simulated(Arc::new(left.fork()), "memory://");
    wait(store.put(key, bytes.to_vec())).expect("a store in memory takes everything");
    let resumed = std::sync::atomic::AtomicBool::new(false);
    let note = |event: PrepareEvent| {
        if matches!(event, PrepareEvent::Resumed { .. }) {
            resumed.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    // A text may not fit what the progress says; then that is an error.
    let made = wait(prepare(&store, "d", source, &note));
    made.is_ok() && resumed.into_inner() && serde_json::from_slice::<Progress>(bytes).is_ok()
}

fn progresses() -> Vec<Vec<u8>> {
    vec![interrupted().progress.clone()]
}

// ---- tokenizers --------------------------------------------------------------------------------

/// A `tokenizer.json`.
fn tokenizer(bytes: &[u8]) -> bool {
    let _ = TextTokenizer::with_end_of_text(bytes, 1 << 20);
    let Ok(tokenizer) = TextTokenizer::from_json(bytes, None) else { return false };
    let texts =
        ["", " ", "fn main() { println!(\"it's 12 o'clock\"); }\n", "ä日本\u{301}\0\r\n\t  x"];
    for text in texts {
        let Ok(tokens) = tokenizer.encode(text) else { continue };
        assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocabulary_size()));
        let _ = tokenizer.decode(&tokens);
    }
    let size = tokenizer.vocabulary_size() as u64;
    let some: Vec<u32> = (0..size.min(300)).map(|token| token as u32).collect();
    let _ = (tokenizer.decode(&some), tokenizer.decode(&[u32::MAX]), tokenizer.token("a"));
    true
}

fn tokenizers() -> Vec<Vec<u8>> {
    // Of other kinds than those that are trained here, as small as can be.
    let words = r###"{"version":"1.0","truncation":null,"padding":null,
        "added_tokens":[{"id":3,"content":"</s>","single_word":false,"lstrip":true,"rstrip":false,
            "normalized":false,"special":true},
            {"id":5,"content":"[X]","single_word":true,"lstrip":false,"rstrip":true,
            "normalized":true,"special":false}],
        "normalizer":{"type":"Sequence","normalizers":[{"type":"NFKC"},{"type":"Lowercase"},
            {"type":"Replace","pattern":{"String":" "},"content":"_"},{"type":"Prepend","prepend":"_"},
            {"type":"Strip","strip_left":true,"strip_right":false},{"type":"StripAccents"}]},
        "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Whitespace"},
            {"type":"Split","pattern":{"Regex":"\\d{1,3}"},"behavior":"Isolated","invert":false},
            {"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true},
            {"type":"Punctuation","behavior":"Contiguous"}]},
        "post_processor":{"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}},
            {"SpecialToken":{"id":"</s>","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},
            {"Sequence":{"id":"B","type_id":1}}],
            "special_tokens":{"</s>":{"id":"</s>","ids":[3],"tokens":["</s>"]}}},
        "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"_"},
            "content":" "},{"type":"ByteFallback"},{"type":"Fuse"},
            {"type":"Strip","content":" ","start":1,"stop":0},{"type":"CTC","pad_token":"p",
            "word_delimiter_token":"|","cleanup":true},{"type":"WordPiece","prefix":"##","cleanup":true},
            {"type":"BPEDecoder","suffix":"</w>"}]},
        "model":{"type":"WordLevel","vocab":{"a":0,"main":1,"[UNK]":2,"</s>":3,"fn":9},
            "unk_token":"[UNK]"}}"###;
    let shell = |model: &str| {
        format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{{"type":"BertPreTokenizer"}},"post_processor":null,"decoder":null,
            "model":{model}}}"#
        )
    };
    let unigram = r#"{"type":"Unigram","unk_id":1,"byte_fallback":false,
        "vocab":[["</s>",0.0],["a",-1.5],["ma",-2.0],["in",-2.5]]}"#;
    let pieces = r###"{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##",
        "max_input_chars_per_word":100,"vocab":{"[UNK]":0,"[SEP]":1,"ma":2,"##in":3,"f":4,"##n":5}}"###;
    let merges = r#"{"type":"BPE","dropout":null,"unk_token":"</s>","continuing_subword_prefix":null,
        "end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":true,
        "vocab":{"</s>":0,"a":1,"i":2,"n":3,"in":4,"<0x0A>":5,"ain":6},"merges":[["i","n"],["a","in"]]}"#;
    let mut all = vec![trained().to_vec(), words.as_bytes().to_vec()];
    all.extend([unigram, pieces, merges].map(|model| shell(model).into_bytes()));
    all
}

// ---- sources -----------------------------------------------------------------------------------

/// A directory of this thread.
fn directory() -> PathBuf {
    thread_local! {
        static DIRECTORY: TempDir = tempfile::tempdir().expect("a temporary directory");
    }
    DIRECTORY.with(|directory| directory.path().to_owned())
}

/// Reads a file of this name as a dataset is made of it; the texts in it.
fn documents(name: &str, bytes: &[u8]) -> Option<usize> {
    let path = directory().join(name);
    std::fs::write(&path, bytes).expect("a temporary file is writable");
    let source = spec::Source {
        paths: vec![path.display().to_string()],
        format: spec::Format::Auto,
        ..spec::Source::default()
    };
    let files = Files::find(&source, handle()).expect("the file is there");
    let mut records = Vec::new();
    let mut give = |batch: super::source::Batch| {
        assert!(batch.read <= bytes.len() as u64);
        records.extend(batch.records);
        Ok(())
    };
    let mut sink = Sink::new(0, &mut give);
    sink.begin(0);
    let read = files.read(0, 0, &mut sink).and_then(|()| sink.flush());
    let mut texts = 0;
    for record in records {
        match files.document(record).expect("what was read can be looked into") {
            Document::Text { text, .. } => texts += usize::from(!text.is_empty()),
            Document::Empty => {}
            Document::Malformed(reason) => assert!(!reason.is_empty() && reason.len() < 10_000),
        }
    }
    read.is_ok().then_some(texts)
}

/// JSON Lines.
fn jsonl(bytes: &[u8]) -> bool {
    documents("a.jsonl", bytes).is_some_and(|texts| texts > 0)
}

/// The same, packed with gzip.
fn gzip(bytes: &[u8]) -> bool {
    documents("a.jsonl.gz", bytes).is_some_and(|texts| texts > 0)
}

/// The same, packed with Zstandard.
fn zstd(bytes: &[u8]) -> bool {
    documents("a.jsonl.zst", bytes).is_some_and(|texts| texts > 0)
}

/// Plain text.
fn text(bytes: &[u8]) -> bool {
    documents("a.txt", bytes).is_some_and(|texts| texts > 0)
}

/// Parquet.
fn parquet(bytes: &[u8]) -> bool {
    documents("a.parquet", bytes).is_some_and(|texts| texts > 0)
}

const LINES: &str = "{\"text\": \"one \\u00e4 \\ud83d\\ude00\", \"id\": 1}\n\n{\"text\": \"two\", \
    \"x\": [{\"text\": null}, 1.5e3]}\n{\"text\": 3}\n{\"text\": \"\"}";

fn lines() -> Vec<Vec<u8>> {
    vec![LINES.as_bytes().to_vec()]
}

fn gzipped() -> Vec<Vec<u8>> {
    use std::io::Write;
    let packed = |text: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(text).expect("memory is writable");
        gzip.finish().expect("memory is writable")
    };
    let one = packed(LINES.as_bytes());
    vec![one.clone(), [one, packed(b"\n{\"text\": \"three\"}")].concat()]
}

fn zstd_frames() -> Vec<Vec<u8>> {
    let packed = |text: &[u8]| ::zstd::encode_all(text, 3).expect("memory is writable");
    let many = LINES.repeat(50);
    vec![packed(LINES.as_bytes()), packed(many.as_bytes())]
}

fn texts() -> Vec<Vec<u8>> {
    // The second one has two pieces.
    let text = "A text.\n\nä \u{1f600} and more of it.\n";
    [20, 2500].map(|times| text.repeat(times).into_bytes()).into()
}

fn tables() -> Vec<Vec<u8>> {
    use ::parquet::basic::{Compression, Encoding, ZstdLevel};
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use ::parquet::file::properties::{WriterProperties, WriterVersion};
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    let table = |codec, version, encoding: Option<Encoding>| {
        let schema = "message m { required int64 id; optional binary text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).expect("it is a schema"));
        let properties = WriterProperties::builder()
            .set_compression(codec)
            .set_writer_version(version)
            .set_dictionary_enabled(encoding.is_none())
            .set_data_page_row_count_limit(8)
            .set_write_batch_size(4);
        let properties = match encoding {
            Some(encoding) => properties.set_column_encoding("text".into(), encoding),
            None => properties,
        };
        let properties = Arc::new(properties.build());
        let mut writer =
            SerializedFileWriter::new(Vec::new(), schema, properties).expect("memory is writable");
        for rows in [0..20_i64, 20..23] {
            let mut group = writer.next_row_group().expect("memory is writable");
            let ids: Vec<i64> = rows.collect();
            let mut column = group.next_column().expect("it has two").expect("it has two");
            let written = column.typed::<Int64Type>().write_batch(&ids, None, None);
            written.and_then(|_| column.close()).expect("memory is writable");
            let is_there = |id: &&i64| **id % 5 != 3;
            let text = |id: &i64| ByteArray::from(format!("row {} of some", id % 3).as_str());
            let texts: Vec<ByteArray> = ids.iter().filter(is_there).map(text).collect();
            let levels: Vec<i16> = ids.iter().map(|id| i16::from(is_there(&id))).collect();
            let mut column = group.next_column().expect("it has two").expect("it has two");
            let written = column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None);
            written.and_then(|_| column.close()).expect("memory is writable");
            group.close().expect("memory is writable");
        }
        writer.into_inner().expect("memory is writable")
    };
    use WriterVersion::{PARQUET_1_0, PARQUET_2_0};
    vec![
        table(Compression::UNCOMPRESSED, PARQUET_1_0, None),
        table(Compression::UNCOMPRESSED, PARQUET_2_0, Some(Encoding::DELTA_BYTE_ARRAY)),
        table(Compression::SNAPPY, PARQUET_2_0, Some(Encoding::DELTA_LENGTH_BYTE_ARRAY)),
        table(Compression::GZIP(Default::default()), PARQUET_1_0, Some(Encoding::PLAIN)),
        table(Compression::ZSTD(ZstdLevel::default()), PARQUET_2_0, None),
        table(Compression::LZ4_RAW, PARQUET_2_0, Some(Encoding::PLAIN)),
    ]
}
