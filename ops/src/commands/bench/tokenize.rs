//! `looptrain bench tokenize`: text into token shards, as `data prepare` does it.

use std::time::Instant;

use anyhow::Result;
use looptrain_proto::spec::{self, Format};
use looptrain_storage::{Origin, Recipe, Store, dataset_prefix, prepare_from};
use serde_json::{Value, json};

use super::figures::{Samples, machine, peak_bytes, rounded};
use crate::cli::TokenizeBench;
use crate::progress::print_line;

/// What the dataset is called; nobody else's is.
const NAME: &str = "bench-tokenize";

pub(super) async fn run(args: TokenizeBench) -> Result<Value> {
    let store = Store::open(&args.store)?;
    store.check_writable().await?;
    let source = spec::Source {
        paths: args.inputs,
        format: Format::Auto,
        field: args.field,
        tokenizer: Some(args.tokenizer),
        ..spec::Source::default()
    };
    let threads = args.threads.map(|threads| threads as usize);
    let recipe = Recipe { origin: Origin::Text(source), threads };
    let mut times = Vec::new();
    let mut made = None;
    for round in 1..=args.rounds {
        store.delete_prefix(&dataset_prefix(NAME)).await?;
        let start = Instant::now();
        let dataset = prepare_from(&store, NAME, &recipe, &|_| ()).await?;
        times.push(start.elapsed().as_secs_f64());
        print_line(&format!("round {round} of {}: {:.3} s", args.rounds, times[times.len() - 1]));
        made = Some(dataset);
    }
    store.delete_prefix(&dataset_prefix(NAME)).await?;
    let manifest = made.as_ref().map(|dataset| dataset.manifest());
    let sum = |of: fn(&looptrain_storage::SplitManifest) -> u64| {
        manifest.map_or(0, |manifest| of(&manifest.train) + of(&manifest.validation))
    };
    let (bytes, tokens) = (sum(|split| split.bytes), sum(|split| split.tokens));
    let times = Samples::new(times);
    Ok(json!({
        "bench": "tokenize",
        "documents": sum(|split| split.documents),
        "text_bytes": bytes,
        "tokens": tokens,
        "rounds": args.rounds,
        "seconds": rounded(times.median()),
        "megabytes_per_second": rounded(bytes as f64 / times.median() / 1e6),
        "tokens_per_second": rounded(tokens as f64 / times.median()),
        "peak_bytes": peak_bytes(),
        "threads": args.threads.unwrap_or_else(crate::commands::all_threads),
        "machine": machine(),
    }))
}
