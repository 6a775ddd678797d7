//! `looptrain data`: make datasets, look into them, check them.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use indicatif::{HumanBytes, HumanCount};
use looptrain_proto::spec;
use looptrain_storage::{
    Dataset, DatasetManifest, Lengths, Mano, Origin, Recipe, SampleText, Split, Store, inspect,
    prepare_from, verify,
};
use serde_json::{Value, json};

use crate::cli::{Data, Inspect, Making, ManoData, Prepare, Verify};
use crate::progress::{PrepareProgress, ReadProgress, print_line};
use crate::signals;

pub(crate) async fn run(data: Data) -> Result<()> {
    match data {
        Data::Prepare(args) => {
            let source = source(&args)?;
            make(&args.output, Origin::Text(source), &args.making).await
        }
        Data::Mano(args) => {
            let ManoData { modulus, validation, seed, .. } = args;
            let (operators, train) = (args.max_operators, args.exercises);
            let shard_tokens = args.making.shard_tokens;
            let mano = Mano { operators, modulus, train, validation, seed };
            let origin = Origin::Mano { mano, shard_tokens };
            mano.options(shard_tokens).check().map_err(usage)?;
            make(&args.output, origin, &args.making).await
        }
        Data::Inspect(args) => look(args).await,
        Data::Verify(args) => check(args).await,
    }
}

fn usage((key, reason): (String, String)) -> anyhow::Error {
    anyhow::anyhow!("{key}: {reason}")
}

/// What the options say, as a spec would.
fn source(args: &Prepare) -> Result<spec::Source> {
    let source = spec::Source {
        tokenizer: args.tokenizer.clone(),
        end_of_text: args.end_of_text.clone(),
        tokenizer_vocabulary: args.vocabulary,
        max_malformed: args.max_malformed,
        validation_fraction: args.validation,
        shard_tokens: args.making.shard_tokens,
        ..args.texts.source()
    };
    source.check().map_err(usage)?;
    Ok(source)
}

async fn make(url: &str, origin: Origin, args: &Making) -> Result<()> {
    let (store, name) = place(url)?;
    let stop = signals::stop_on_signals("stopping; the same command goes on from here")?;
    let store = Store::open(&store)?;
    store.check_writable().await?;
    let was_there = Dataset::open(&store, &name).await?.is_some();
    let recipe = Recipe { origin, threads: args.threads.map(|threads| threads as usize) };
    let progress = Mutex::new(PrepareProgress::new(&name));
    let show = |event| progress.lock().unwrap_or_else(PoisonError::into_inner).show(&event);
    let dataset = tokio::select! {
        made = prepare_from(&store, &name, &recipe, &show) => made?,
        () = stop.cancelled() => bail!("stopped before dataset `{name}` was complete"),
    };
    if was_there {
        print_line(&format!(
            "dataset `{name}` was there, and its inputs were not read again; to make it from what they are now, \
             remove {url} or choose another name"
        ));
    }
    let manifest = dataset.manifest();
    match args.json {
        true => outln!("{}", counts(manifest)),
        false => outln!(
            "done dataset={name} train={} validation={} shards={} malformed={} digest={}",
            manifest.train.tokens,
            manifest.validation.tokens,
            manifest.train.shards.len() + manifest.validation.shards.len(),
            manifest.source.malformed,
            dataset.digest(),
        ),
    }
    Ok(())
}

/// The store and the name in the URL of a dataset.
fn place(url: &str) -> Result<(String, String)> {
    let form = || {
        format!(
            "{url} is no dataset; write STORE/datasets/NAME, such as file://.looptrain/datasets/web"
        )
    };
    let (store, name) = url.trim_end_matches('/').rsplit_once("/datasets/").with_context(form)?;
    if !store.contains("://") || store.ends_with("://") || !spec::is_name(name) {
        bail!(form());
    }
    Ok((store.to_owned(), name.to_owned()))
}

async fn open(url: &str) -> Result<(Store, Dataset)> {
    let (store, name) = place(url)?;
    let store = Store::open_existing(&store)?;
    let dataset = Dataset::open(&store, &name).await?;
    let dataset =
        dataset.with_context(|| format!("there is no dataset `{name}` in {}", store.url()))?;
    Ok((store, dataset))
}

/// What a manifest says, but for its shards.
fn counts(manifest: &DatasetManifest) -> Value {
    let split = |split: Split| {
        let split = manifest.split(split);
        json!({
            "tokens": split.tokens,
            "documents": split.documents,
            "text_bytes": split.bytes,
            "shards": split.shards.len(),
            "bytes": split.shards.iter().map(|shard| shard.bytes).sum::<u64>(),
        })
    };
    let source = &manifest.source;
    json!({
        "dataset": manifest.name,
        "digest": manifest.digest().to_string(),
        "vocabulary": manifest.vocabulary_size,
        "end_of_text": manifest.end_of_text,
        "tokenizer": manifest.tokenizer_digest.to_string(),
        "token_type": manifest.dtype,
        "unigram_loss": manifest.unigram_loss,
        "train": split(Split::Train),
        "validation": split(Split::Validation),
        "source": {
            "options": source.options,
            "files": source.files,
            "records": source.records,
            "malformed": source.malformed,
            "empty": source.empty,
            "duplicates": source.duplicates,
            "unreadable": source.unreadable,
        },
    })
}

async fn look(args: Inspect) -> Result<()> {
    let (store, dataset) = open(&args.dataset).await?;
    let manifest = dataset.manifest();
    let mut output = counts(manifest);
    let mut found = Vec::new();
    for (split, key) in [(Split::Train, "train"), (Split::Validation, "validation")] {
        let total = manifest.split(split).shards.iter().map(|shard| shard.bytes).sum();
        let mut progress = ReadProgress::new(&manifest.name, total);
        let read = |bytes| progress.show(bytes);
        let (lengths, samples) = inspect(&store, &dataset, split, args.samples, read).await?;
        output[key]["lengths"] = json!(lengths);
        output[key]["samples"] = json!(samples);
        found.push((split, lengths, samples));
    }
    if args.json {
        outln!("{output:#}");
        return Ok(());
    }
    outln!("dataset {}  {}", manifest.name, manifest.digest());
    outln!(
        "vocabulary of {}, tokens of {:?}, end of text {}, unigram loss {:.3}",
        manifest.vocabulary_size,
        manifest.dtype,
        manifest.end_of_text,
        manifest.unigram_loss.unwrap_or(f64::NAN),
    );
    outln!(
        "from {} files: {} records, {} malformed, {} empty, {} duplicates, {} unreadable",
        HumanCount(manifest.source.files),
        HumanCount(manifest.source.records),
        HumanCount(manifest.source.malformed),
        HumanCount(manifest.source.empty),
        HumanCount(manifest.source.duplicates),
        HumanCount(manifest.source.unreadable),
    );
    for (split, lengths, samples) in &found {
        print_split(manifest, *split, lengths, samples);
    }
    Ok(())
}

/// For people: counts, a histogram, and the beginnings of some documents.
fn print_split(
    manifest: &DatasetManifest,
    split: Split,
    lengths: &Lengths,
    samples: &[SampleText],
) {
    let described = manifest.split(split);
    outln!(
        "\n{split}: {} tokens in {} documents ({} of text), {} shards",
        HumanCount(described.tokens),
        HumanCount(described.documents),
        HumanBytes(described.bytes),
        described.shards.len(),
    );
    outln!("  tokens per document: mean {:.1}, longest {}", lengths.mean, lengths.longest);
    let most = lengths.histogram.iter().map(|bucket| bucket.documents).max().unwrap_or(1).max(1);
    for bucket in lengths.histogram.iter().filter(|bucket| bucket.documents > 0) {
        let bar = "#".repeat((bucket.documents * 40).div_ceil(most) as usize);
        outln!(
            "  {:>9} to {:<9} {:>12}  {bar}",
            bucket.from,
            bucket.to,
            HumanCount(bucket.documents)
        );
    }
    for sample in samples {
        let more = if sample.goes_on { " ..." } else { "" };
        outln!("  {}:{}  {:?}{more}", sample.shard, sample.position, sample.text);
    }
}

async fn check(args: Verify) -> Result<()> {
    let (store, dataset) = open(&args.dataset).await?;
    let manifest = dataset.manifest();
    let shards = || manifest.train.shards.iter().chain(&manifest.validation.shards);
    let bytes: u64 = shards().map(|shard| shard.bytes).sum();
    let mut progress = ReadProgress::new(&manifest.name, bytes);
    let bad = verify(&store, manifest, |_, bytes| progress.show(bytes)).await?;
    let files = 1 + shards().count();
    if args.json {
        let bad: Vec<Value> =
            bad.iter().map(|bad| json!({ "file": bad.place, "reason": bad.reason })).collect();
        let (name, digest) = (&manifest.name, manifest.digest().to_string());
        outln!(
            "{}",
            json!({ "dataset": name, "digest": digest, "files": files, "bytes": bytes, "bad": bad })
        );
    } else {
        for bad in &bad {
            outln!("bad {}: {}", bad.place, bad.reason);
        }
    }
    match bad.first() {
        None if args.json => Ok(()),
        None => {
            outln!(
                "good dataset={} files={files} bytes={bytes} digest={}",
                manifest.name,
                manifest.digest()
            );
            Ok(())
        }
        Some(first) => bail!(
            "{} of {files} files are not as they were written, the first one {}: {}; restore them, or prepare the dataset anew",
            bad.len(),
            first.place,
            first.reason
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_dataset_is_a_name_below_datasets_in_a_store() {
        let of = |url| place(url).map_err(|error| error.to_string());
        let found = |store: &str, name: &str| Ok((store.to_owned(), name.to_owned()));
        assert_eq!(of("file://.looptrain/datasets/web"), found("file://.looptrain", "web"));
        assert_eq!(of("s3://b/datasets/x/datasets/a.b/"), found("s3://b/datasets/x", "a.b"));
        for wrong in
            ["file://store/web", "/tmp/datasets/web", "file:///datasets/", "s3://b/datasets/a/b"]
        {
            assert!(of(wrong).unwrap_err().contains("STORE/datasets/NAME"), "{wrong}");
        }
    }
}
