//! A tokenizer of its own for several inputs: trained before there is any dataset of them, since all datasets
//! of a run share one, and put where [`read_tokenizer`] finds it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use looptrain_proto::spec;
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use serde::Serialize;
use tokio::runtime::Handle;

use super::PrepareEvent;
use super::source::{Batch, Document, Files, Sink, Source, first_texts, open_url};
use super::tokenizer::{LARGEST_VOCABULARY, TextTokenizer, failed};
use crate::{Error, Result, blocking};

/// A tokenizer that was trained, and on what.
#[derive(Debug)]
pub struct TrainedTokenizer {
    /// Its `tokenizer.json`.
    pub json: Vec<u8>,
    /// The same, to use.
    pub tokenizer: TextTokenizer,
    /// What each input gave, in the order of the inputs.
    pub inputs: Vec<InputSample>,
    /// Tokens that all these texts have now.
    pub tokens: u64,
}

/// What an input gave to train a tokenizer on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InputSample {
    /// The input as given.
    pub input: String,
    /// Documents, of which the last one may be cut.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
}

impl TrainedTokenizer {
    /// Bytes of text that it was trained on.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inputs.iter().map(|input| input.bytes).sum()
    }
}

/// Trains byte-level BPE on the paths of `source`, which are taken as for a dataset with the same options: of
/// `tokenizer_bytes` each path gives about the same share, and what a small one has not, larger ones give. No
/// text is seen that a dataset with its `validation_fraction` holds out. With one path it is the tokenizer that
/// [`super::prepare()`] trains. The format `sample` is for datasets alone.
///
/// `threads` are all of the machine's by default, and change nothing of what comes out. `progress` is called on
/// the thread that works.
///
/// # Errors
/// When a path cannot be read, or gives no text to train on.
pub async fn train_tokenizer(
    source: &spec::Source,
    threads: Option<usize>,
    progress: impl Fn(PrepareEvent) + Send + 'static,
) -> Result<TrainedTokenizer> {
    let (source, runtime) = (source.clone(), Handle::current());
    blocking(move || train_on(&source, threads, &runtime, progress)).await?
}

fn train_on(
    source: &spec::Source,
    threads: Option<usize>,
    runtime: &Handle,
    progress: impl Fn(PrepareEvent),
) -> Result<TrainedTokenizer> {
    let vocabulary = source.tokenizer_vocabulary;
    if vocabulary > LARGEST_VOCABULARY {
        let most = LARGEST_VOCABULARY;
        return Err(failed(format!("{vocabulary} entries are more than the {most} there may be")));
    }
    let samples = samples(source, runtime)?;
    let inputs: Vec<InputSample> = source.paths.iter().zip(&samples).map(sampled).collect();
    let texts: Vec<String> = samples.into_iter().flatten().collect();
    // 0 is all of the machine's.
    let pool = ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build();
    let pool = pool.map_err(failed)?;
    progress(PrepareEvent::TrainingTokenizer { bytes: size(&texts), vocabulary });
    let json = pool.install(|| TextTokenizer::train(&texts, vocabulary))?;
    let tokenizer = TextTokenizer::from_json(&json, None)?;
    progress(PrepareEvent::TokenizerTrained { vocabulary: tokenizer.vocabulary_size() });
    let count = |text: &String| tokenizer.encode(text).map(|tokens| tokens.len() as u64);
    let count = || texts.par_iter().map(count).try_reduce(|| 0, |a, b| Ok(a + b));
    let tokens = pool.install(count)?;
    Ok(TrainedTokenizer { json, tokenizer, inputs, tokens })
}

fn sampled((input, texts): (&String, &Vec<String>)) -> InputSample {
    InputSample { input: input.clone(), documents: texts.len() as u64, bytes: size(texts) }
}

fn size(texts: &[String]) -> u64 {
    texts.iter().map(|text| text.len() as u64).sum()
}

/// The texts of each input. The smallest inputs come first, so that it is known what they leave to others.
fn samples(source: &spec::Source, runtime: &Handle) -> Result<Vec<Vec<String>>> {
    let options = spec::Source { paths: Vec::new(), ..source.clone() };
    let find = |path: &String| {
        let one = spec::Source { paths: vec![path.clone()], ..options.clone() };
        Files::find(&one, runtime.clone()).map_err(failed)
    };
    let inputs: Vec<Files> = source.paths.iter().map(find).collect::<Result<_>>()?;
    let bytes = |input: &Files| (0..input.files()).map(|file| input.bytes(file)).sum::<u64>();
    let mut order: Vec<usize> = (0..inputs.len()).collect();
    order.sort_by_cached_key(|&index| bytes(&inputs[index]));
    let mut samples = vec![Vec::new(); inputs.len()];
    let mut left = source.tokenizer_bytes;
    for (done, index) in order.into_iter().enumerate() {
        let share = (left / (inputs.len() - done) as u64).max(1);
        let mut texts = first_texts(&inputs[index], share)?;
        if texts.is_empty() {
            return Err(no_text(&source.paths[index], &inputs[index]));
        }
        if inputs.len() > 1 {
            cut(&mut texts, share);
        }
        left = left.saturating_sub(size(&texts));
        samples[index] = texts;
    }
    Ok(samples)
}

/// Cuts off the last text what goes beyond so many bytes; the others have fewer.
fn cut(texts: &mut [String], bytes: u64) {
    let over = size(texts).saturating_sub(bytes) as usize;
    if let Some(last) = texts.last_mut() {
        last.truncate(last.floor_char_boundary(last.len().saturating_sub(over)));
    }
}

/// Says of an input that nothing of it can be trained on, and why, by its first malformed record.
fn no_text(input: &str, source: &dyn Source) -> Error {
    let mut malformed = None;
    let mut give = |batch: Batch| {
        for record in batch.records {
            let (file, at) = (record.file as usize, record.at);
            if let Document::Malformed(reason) = source.document(record)? {
                malformed = Some(format!("{}:{at} is malformed: {reason}", source.place(file)));
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    };
    let mut sink = Sink::new(0, &mut give);
    let read = |file| {
        sink.begin(file);
        source.read(file, 0, &mut sink).and_then(|()| sink.flush())
    };
    // It was read to its end before, and the first malformed record ends this.
    let _ = (0..source.files()).try_for_each(read);
    let why = malformed
        .unwrap_or_else(|| "its documents are empty, or all held out for validation".to_owned());
    failed(format!(
        "{input} gives no text to train on: {why}; leave it out, or say how its texts lie in it (--format, --field)"
    ))
}

/// The path of what is on this machine.
fn path_of(place: &str) -> Option<&Path> {
    let is_path = !place.contains("://");
    place.strip_prefix("file://").or(is_path.then_some(place)).map(Path::new)
}

/// The `tokenizer.json` at a path or URL.
///
/// # Errors
/// When it cannot be read.
pub async fn read_tokenizer(place: &str) -> Result<Vec<u8>> {
    if let Some(path) = path_of(place) {
        let read = tokio::fs::read(path).await;
        return read.map_err(|error| failed(format!("cannot read {place}: {error}")));
    }
    let (store, key) = open_url(place)?;
    Ok(store.get(&key).await?.to_vec())
}

/// Puts a `tokenizer.json` at a path or URL: all of it or nothing, and in no other's place.
///
/// # Errors
/// [`Error::Conflict`] when another one is there; or when it cannot be written.
pub async fn write_tokenizer(place: &str, json: &[u8]) -> Result<()> {
    let found = match path_of(place) {
        Some(path) => {
            let (path, json) = (path.to_owned(), json.to_vec());
            let written = blocking(move || write_file(&path, &json)).await?;
            written.map_err(|error| failed(format!("cannot write {place}: {error}")))?
        }
        None => {
            let (store, key) = open_url(place)?;
            match store.put_if_absent(&key, json.to_vec()).await? {
                true => None,
                false => Some(store.get(&key).await?.to_vec()),
            }
        }
    };
    if found.is_some_and(|found| found != json) {
        let reason =
            "it is not what these inputs and options give; remove it, or choose another --output";
        return Err(Error::Conflict { place: place.to_owned(), reason: reason.to_owned() });
    }
    Ok(())
}

/// Writes a file, or gives what is there already.
fn write_file(path: &Path, bytes: &[u8]) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        found => return found.map(Some),
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!("{name}.partial-{}", std::process::id()));
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // Unlike a rename, this leaves alone what somebody else has put there meanwhile.
        fs::hard_link(&partial, path)
    };
    let written = write();
    let _ = fs::remove_file(&partial);
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::read(path).map(Some),
        written => written.map(|()| None),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::Digest;

    use super::super::prepare;
    use super::*;
    use crate::Store;

    /// Inputs of very different sizes and kinds, of lines of about a hundred bytes.
    fn corpus(root: &Path) -> spec::Source {
        let text = |kind: &str, number: usize| {
            format!("{kind} {number} of many, {} and then {};\n", number * 7, number % 13).repeat(3)
        };
        let lines: String = (0..5000)
            .map(|i| format!("{}\n", serde_json::json!({ "text": text("record", i) })))
            .collect();
        fs::write(root.join("large.jsonl"), lines).unwrap();
        for (folder, files) in [("folder", 300), ("small", 20)] {
            fs::create_dir(root.join(folder)).unwrap();
            for i in 0..files {
                fs::write(root.join(format!("{folder}/{i:03}.txt")), text(folder, i)).unwrap();
            }
        }
        spec::Source {
            paths: ["large.jsonl", "small", "folder"]
                .map(|name| root.join(name).display().to_string())
                .into(),
            format: spec::Format::Auto,
            extensions: vec!["txt".into()],
            tokenizer_vocabulary: 400,
            tokenizer_bytes: 32_000,
            validation_fraction: 0.2,
            ..spec::Source::default()
        }
    }

    #[tokio::test]
    async fn each_of_several_inputs_gives_its_share_and_large_ones_what_a_small_one_has_not() {
        let root = tempfile::tempdir().unwrap();
        let source = corpus(root.path());
        let trained = train_tokenizer(&source, Some(1), |_| ()).await.unwrap();
        let [large, small, folder] = [0, 1, 2].map(|index| &trained.inputs[index]);
        assert!(large.input.ends_with("large.jsonl") && folder.input.ends_with("folder"));
        // All of it but what is held out.
        assert!((8..20).contains(&small.documents) && small.bytes < 2500, "{small:?}");
        let share = (32_000 - small.bytes) / 2;
        assert!(large.bytes.abs_diff(share) <= 1 && folder.bytes.abs_diff(share) <= 1);
        assert_eq!(trained.bytes(), 32_000);
        assert!(trained.tokens < trained.bytes() / 2, "{}", trained.tokens);
        assert_eq!(trained.tokenizer.digest(), Digest::of(&trained.json));
        assert_eq!(trained.tokenizer.vocabulary_size(), 400);
        // Words of each of them have become tokens.
        let longest = trained.tokenizer.longest(400).unwrap();
        for word in ["record", "folder", "small"] {
            assert!(longest.iter().any(|(_, text)| text.trim() == word), "{word}: {longest:?}");
        }
        let again = train_tokenizer(&source, Some(3), |_| ()).await.unwrap();
        assert!(again.json == trained.json, "it depends on the number of threads");
    }

    #[tokio::test]
    async fn of_one_input_it_is_the_tokenizer_of_its_dataset_and_what_that_holds_out_is_not_seen() {
        let root = tempfile::tempdir().unwrap();
        let all = corpus(root.path());
        for path in all.paths.clone() {
            let source =
                spec::Source { paths: vec![path], tokenizer_bytes: 1 << 30, ..all.clone() };
            let trained = train_tokenizer(&source, None, |_| ()).await.unwrap();
            let store = Store::open("memory://").unwrap();
            let dataset = prepare(&store, "text", &source, &|_| ()).await.unwrap();
            let manifest = dataset.manifest();
            assert_eq!(trained.tokenizer.digest(), manifest.tokenizer_digest);
            let seen = (trained.inputs[0].documents, trained.bytes());
            assert_eq!(seen, (manifest.train.documents, manifest.train.bytes));
            assert!(manifest.validation.documents > 0);
            // An end stands after each document of the dataset.
            assert_eq!(trained.tokens + seen.0, manifest.train.tokens);
        }
    }

    #[tokio::test]
    async fn an_input_without_text_is_an_error_that_names_it_and_why() {
        let root = tempfile::tempdir().unwrap();
        let source = corpus(root.path());
        let refusal = async |change: fn(&mut spec::Source)| {
            let mut changed = source.clone();
            change(&mut changed);
            train_tokenizer(&changed, None, |_| ()).await.unwrap_err().to_string()
        };
        let other_field = refusal(|source| source.field = "body".into()).await;
        for part in ["large.jsonl gives no text", "large.jsonl:1", "no field `body`", "--field"] {
            assert!(other_field.contains(part), "`{part}` is missing in: {other_field}");
        }
        let held = refusal(|source| source.validation_fraction = 1.0).await;
        assert!(held.contains("small gives no text") && held.contains("held out"), "{held}");
        let missing = refusal(|source| source.paths.push("nowhere".into())).await;
        assert!(missing.contains("nowhere"), "{missing}");
        let many = refusal(|source| source.tokenizer_vocabulary = usize::MAX).await;
        assert!(many.contains("16777216"), "{many}");
    }

    #[tokio::test]
    async fn a_tokenizer_is_written_once_and_takes_the_place_of_no_other() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("of/team/tokenizer.json").display().to_string();
        let url = "memory://written-tokenizer/team/tokenizer.json";
        for place in [path.clone(), format!("file://{path}"), url.to_owned()] {
            // The second time it is there already.
            for _ in 0..2 {
                write_tokenizer(&place, b"{}").await.unwrap();
            }
            let error = write_tokenizer(&place, b"{ }").await.unwrap_err().to_string();
            assert!(error.starts_with(&place) && error.contains("--output"), "{error}");
            assert_eq!(read_tokenizer(&place).await.unwrap(), b"{}");
        }
        assert_eq!(fs::read_dir(root.path().join("of/team")).unwrap().count(), 1);
        let in_the_way = format!("{path}/tokenizer.json");
        let error = write_tokenizer(&in_the_way, b"{}").await.unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains(&in_the_way), "{error}");
    }
}
