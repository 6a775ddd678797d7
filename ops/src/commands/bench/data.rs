//! `looptrain bench data`: how fast tokens come, and how soon the first of them.
//!
//! The feed is that of a worker that has all slots, over one data epoch: every sequence once, in the
//! order of training, from a process that has read nothing before. `tests/peers/feed` compares with
//! another loader on the same tokens.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use looptrain_proto::{Spec, Step};
use looptrain_storage::{ReadingOptions, Store, Synthetic, synthetic};
use looptrain_worker::bench::Feeding;
use serde_json::{Value, json};

use super::figures::{Samples, machine, rounded};
use crate::cli::DataBench;
use crate::progress::print_line;

/// Sequences of a step, in slots of [`SLOT_SEQUENCES`].
const STEP_SEQUENCES: u64 = 64;
const SLOT_SEQUENCES: u64 = 8;

/// A position far into a run, which is the beginning of a step.
const FAR: u64 = 1_000_000_000_000;

/// Entries of a vocabulary whose tokens have 16 bits; that of Ouro.
const VOCABULARY: usize = 49_152;

pub(super) async fn run(args: DataBench) -> Result<Value> {
    let DataBench { million_tokens, sequence_length, rounds, .. } = args;
    let own = std::env::temp_dir().join(format!("looptrain-bench-data-{}", std::process::id()));
    let url = args.store.clone().unwrap_or_else(|| format!("file://{}", own.display()));
    let measured = measure(&args, &url).await;
    if args.store.is_none() {
        std::fs::remove_dir_all(&own)
            .with_context(|| format!("cannot remove {}", own.display()))?;
    }
    let Measured { near, far, seconds, sequences, sum, counts } = measured?;
    let (near, far) = (near.median() * 1e3, far.median() * 1e3);
    Ok(json!({
        "bench": "data",
        "store": url.split("://").next(),
        "tokens": million_tokens * 1_000_000,
        "sequence_length": sequence_length,
        "samples": sequences,
        "sum_of_tokens": sum,
        "seconds": rounded(seconds),
        "samples_per_second": rounded(sequences as f64 / seconds),
        "tokens_per_second": rounded((sequences * sequence_length) as f64 / seconds),
        "blocks": { "memory": counts.memory, "disk": counts.disk, "store": counts.store },
        "store_bytes": counts.store_bytes,
        "first_batch_ms": { "at_0": rounded(near), "at_1e12": rounded(far) },
        "first_batch_ratio": rounded(far / near),
        "rounds": rounds,
        "machine": machine(),
    }))
}

struct Measured {
    /// Seconds from nothing to the first batch, at 0 and at [`FAR`].
    near: Samples,
    far: Samples,
    /// Of one epoch, from nothing.
    seconds: f64,
    sequences: u64,
    sum: u64,
    counts: looptrain_storage::ReadCounts,
}

async fn measure(args: &DataBench, url: &str) -> Result<Measured> {
    let DataBench { million_tokens, sequence_length, rounds, .. } = *args;
    let store = Store::open(url)?;
    let name = format!("bench-{million_tokens}");
    let what = Synthetic {
        tokens: million_tokens * 1_000_000,
        shard_tokens: 1 << 24,
        vocabulary_size: VOCABULARY,
    };
    print_line(&format!("the dataset: {name} in {url}"));
    synthetic(&store, &name, what).await?;
    let spec = spec(url, &name, sequence_length)?;
    let disk = args.cache.clone().map(|directory| (directory, 1 << 40));
    let options = || ReadingOptions { disk: disk.clone(), ..ReadingOptions::default() };

    let first = async |index: u64| {
        let start = Instant::now();
        let feeding = Feeding::open(spec.clone(), options()).await?;
        let fed = feeding.step(Step(index / STEP_SEQUENCES + 1)).await?;
        ensure!(fed.sequences == STEP_SEQUENCES, "a step has {} sequences", fed.sequences);
        Ok(start.elapsed().as_secs_f64())
    };
    // Once for what the process does but once, whatever the place.
    first(FAR / 2).await?;
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        near.push(first(0).await?);
        far.push(first(FAR).await?);
        let [near, far] = [&near, &far].map(|all| all[all.len() - 1] * 1e3);
        print_line(&format!("round {round} of {rounds}: {near:.2} ms at 0, {far:.2} ms at 10^12"));
    }

    let all = (million_tokens * 1_000_000 - 1) / sequence_length;
    let steps = all / STEP_SEQUENCES;
    ensure!(steps > 0, "{all} sequences are less than one step of {STEP_SEQUENCES}");
    let start = Instant::now();
    let feeding = Feeding::open(spec, options()).await?;
    let (mut sequences, mut sum) = (0, 0_u64);
    for step in (1..=steps).map(Step) {
        let fed = feeding.step(step).await?;
        sequences += fed.sequences;
        sum = sum.wrapping_add(fed.sum);
    }
    let seconds = start.elapsed().as_secs_f64();
    let (near, far) = (Samples::new(near), Samples::new(far));
    Ok(Measured { near, far, seconds, sequences, sum, counts: feeding.counts() })
}

/// A run that has the dataset for its only one; nothing is trained.
fn spec(url: &str, dataset: &str, sequence_length: u64) -> Result<Spec> {
    let text = format!(
        r#"
        run = {{ name = "bench-data", store = "{url}", seed = 7 }}
        datasets = [{{ name = "{dataset}" }}]
        evaluation = {{ sequences = 1 }}
        [model]
        hidden_size = 2
        num_hidden_layers = 1
        num_attention_heads = 1
        intermediate_size = 1
        vocab_size = {VOCABULARY}
        [[stages]]
        name = "only"
        steps = {}
        sequence_length = {sequence_length}
        slots = {}
        slot_sequences = {SLOT_SEQUENCES}
        loops = 1
        entropy_weight = 0.0
        learning_rate = {{ peak = 0.0 }}
        "#,
        2 * FAR / STEP_SEQUENCES,
        STEP_SEQUENCES / SLOT_SEQUENCES,
    );
    Ok(Spec::parse("the bench's spec", &text, &[])?)
}
