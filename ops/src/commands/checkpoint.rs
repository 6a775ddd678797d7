//! `looptrain checkpoint`: what is stored, whether it is whole, and what can go.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use indicatif::HumanBytes;
use looptrain_proto::{Spec, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Retention, RunRecord, Store, Stored, read_record,
};
use serde_json::{Value, json};

use crate::cli::{Checkpoint, CheckpointList, CheckpointPrune, CheckpointVerify, StoredRun};

pub(crate) async fn run(command: Checkpoint) -> Result<()> {
    match command {
        Checkpoint::List(args) => list(args).await,
        Checkpoint::Verify(args) => verify(args).await,
        Checkpoint::Prune(args) => prune(args).await,
    }
}

/// The record of a run that is there, its checkpoints, and the store.
async fn open(of: &StoredRun) -> Result<(RunRecord, Checkpoints, Store)> {
    let store = Store::open_existing(&of.store)?;
    let Some(record) = read_record(&store, &of.run).await? else {
        bail!("there is no run `{}` in {}", of.run, of.store);
    };
    Ok((record, Checkpoints::new(&store, &of.run), store))
}

async fn list(args: CheckpointList) -> Result<()> {
    let (record, checkpoints, _) = open(&args.of).await?;
    let stored = checkpoints.inventory().await?;
    let entries: Vec<Value> = stored.iter().map(described).collect();
    if args.json {
        let last = record.last_checkpoint;
        outln!("{:#}", json!({ "run": args.of.run, "newest": last, "stored": entries }));
        return Ok(());
    }
    if entries.is_empty() {
        outln!("run `{}` has no checkpoint yet", args.of.run);
    }
    for (stored, entry) in stored.iter().zip(&entries) {
        let state = match &entry["problem"] {
            Value::String(problem) => problem.clone(),
            _ => entry["weights"].as_str().unwrap_or_default().to_owned(),
        };
        let (step, files, size) = (stored.step, stored.files, HumanBytes(stored.bytes));
        outln!("step {step:<10} {size:>12} in {files} files, {}: {state}", ago(stored.modified));
    }
    Ok(())
}

/// An entry of the list; `problem` says why it is no checkpoint to go on from, as far as can be told
/// without reading its parts.
fn described(stored: &Stored) -> Value {
    let (manifest, problem) = match &stored.manifest {
        None => (None, Some("a save that came to nothing, or is under way".to_owned())),
        Some(Err(reason)) => (None, Some(reason.clone())),
        Some(Ok(manifest)) => {
            let missing = "parts are missing or have another size than the manifest says";
            (Some(manifest), (!stored.complete).then(|| missing.to_owned()))
        }
    };
    let modified = stored.modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "step": stored.step,
        "files": stored.files,
        "bytes": stored.bytes,
        "modified_unix_ms": modified.as_millis() as u64,
        "complete": stored.complete,
        "problem": problem,
        "parts": manifest.map(|manifest| manifest.parts.len()),
        "generation": manifest.map(|manifest| manifest.generation),
        "cursor": manifest.map(|manifest| manifest.cursor),
        "weights": manifest.map(|manifest| manifest.weights_digest.to_string()),
    })
}

fn ago(time: SystemTime) -> String {
    let seconds = SystemTime::now().duration_since(time).unwrap_or_default().as_secs();
    match (seconds / 86_400, seconds / 3600, seconds / 60) {
        (0, 0, 0) => format!("{seconds} s ago"),
        (0, 0, minutes) => format!("{minutes} min ago"),
        (0, hours, _) => format!("{hours} h ago"),
        (days, ..) => format!("{days} days ago"),
    }
}

async fn verify(args: CheckpointVerify) -> Result<()> {
    let (_, checkpoints, store) = open(&args.of).await?;
    let mut steps = match args.step {
        Some(step) => vec![Step(step)],
        None => checkpoints.list().await?,
    };
    steps.reverse();
    if steps.is_empty() {
        bail!("run `{}` has no checkpoint yet", args.of.run);
    }
    let (mut results, mut bad) = (Vec::new(), Vec::new());
    for step in steps {
        let start = Instant::now();
        let hold = checkpoints.hold(step).await;
        let verified = checkpoints.verify(step).await;
        hold.release().await;
        let seconds = start.elapsed().as_secs_f64();
        let bytes = |it: &CheckpointManifest| it.parts.iter().map(|part| part.bytes).sum::<u64>();
        let (size, problem) = match verified {
            Ok(manifest) => (Some(bytes(&manifest)), None),
            Err(error) if store.is_to_blame(&error) => return Err(error.into()),
            Err(error) => (None, Some(error.to_string())),
        };
        if !args.json {
            match (&problem, size) {
                (Some(problem), _) => outln!("step {step:<10} bad: {problem}"),
                (None, size) => {
                    let size = HumanBytes(size.unwrap_or_default());
                    outln!("step {step:<10} good: {size} in {seconds:.1} s");
                }
            }
        }
        bad.extend(problem.is_some().then(|| step.to_string()));
        results.push(json!({
            "step": step,
            "good": problem.is_none(),
            "problem": problem,
            "bytes": size,
            "seconds": seconds,
        }));
    }
    if args.json {
        outln!("{:#}", json!({ "run": args.of.run, "checkpoints": results }));
    }
    match bad.is_empty() {
        true => Ok(()),
        false => bail!("not what was saved: the checkpoints of step {}", bad.join(", ")),
    }
}

async fn prune(args: CheckpointPrune) -> Result<()> {
    let (record, checkpoints, _) = open(&args.of).await?;
    let given = Spec::parse("the run record", &record.spec, &[])?.checkpoint;
    let seconds = args.orphan_seconds.unwrap_or(given.orphan_seconds);
    let retention = Retention {
        keep: args.keep.map_or(given.keep, |keep| keep as usize),
        keep_every_steps: args.keep_every.unwrap_or(given.keep_every_steps),
        grace: Duration::from_secs(seconds),
    };
    let in_use: Vec<Step> = record.last_checkpoint.into_iter().collect();
    let plan = checkpoints.plan(&retention, &in_use, SystemTime::now()).await?;
    let removed = match args.dry_run {
        true => plan.checkpoints.clone(),
        false => checkpoints.remove(&plan).await?,
    };
    let orphans: Vec<String> =
        plan.orphans.iter().map(|(step, file)| format!("step {step}: {file}")).collect();
    if args.json {
        let (run, dry_run) = (&args.of.run, args.dry_run);
        outln!(
            "{:#}",
            json!({ "run": run, "removed": removed, "orphans": orphans, "dry_run": dry_run })
        );
        return Ok(());
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    for step in &removed {
        outln!("{verb} the checkpoint of step {step}");
    }
    for orphan in &orphans {
        outln!("{verb} what a save left, {orphan}");
    }
    if removed.is_empty() && orphans.is_empty() {
        outln!("there is nothing to remove");
    }
    Ok(())
}
