//! `looptrain sequences`: the text that a step of a run is computed from.

use anyhow::{Context, Result, ensure};
use looptrain_proto::{Spec, Step};
use looptrain_storage::{Order, Split, Store, read_record};
use serde_json::{Value, json};

use crate::cli::Sequences;
use crate::trained::drawn_from;

pub(crate) async fn run(args: Sequences) -> Result<()> {
    let store = Store::open_existing(&args.of.store)?;
    let record = read_record(&store, &args.of.run).await?;
    let record =
        record.with_context(|| format!("{} has no run `{}`", args.of.store, args.of.run))?;
    let spec = Spec::parse("the run's record", &record.spec, &[])?;
    let step = Step(args.step);
    let total = spec.total_steps();
    let at = spec.position(step).with_context(|| format!("--step: the run has {total} steps"))?;
    let stage = &spec.stages[at.stage];
    if let Some(slot) = args.slot {
        let slots = at.slots;
        ensure!(slot < slots, "--slot: step {step} has {slots} slots, from 0 to {}", slots - 1);
    }
    let mut datasets = Vec::new();
    for stored in drawn_from(&store, &spec, &record.datasets, step) {
        datasets.push(stored.open().await?);
    }
    let parts: Vec<(u32, u64)> = (spec.mixture(at.stage).iter().zip(&datasets))
        .map(|((_, weight), it)| (*weight, it.sequences(Split::Train, stage.sequence_length)))
        .collect();
    let order = Order::new(spec.run.seed, at.stage, &parts);
    let slots = args.slot.map_or(0..at.slots, |slot| slot..slot + 1);
    let mut found = Vec::new();
    for slot in slots {
        let count = stage.slot_sequences as u64;
        let first = at.first_sequence + u64::from(slot) * count;
        for place in first..first + count {
            let drawn = order.at(place);
            let dataset = &datasets[drawn.part];
            let read = dataset.read_sequence(Split::Train, stage.sequence_length, drawn.sequence);
            let tokens = read.await?;
            let text = dataset.tokenizer().await?.decode(&tokens)?;
            found.push(json!({
                "slot": slot,
                "place": place,
                "dataset": dataset.manifest().name,
                "sequence": drawn.sequence,
                "epoch": drawn.epoch,
                "tokens": tokens,
                "text": text,
            }));
        }
    }
    if args.json {
        let stage = &stage.name;
        outln!(
            "{:#}",
            json!({ "run": spec.run.name, "step": step, "stage": stage, "sequences": found })
        );
        return Ok(());
    }
    for sequence in &found {
        let Value::String(text) = &sequence["text"] else { continue };
        let [slot, place, number, epoch] =
            ["slot", "place", "sequence", "epoch"].map(|key| &sequence[key]);
        let dataset = sequence["dataset"].as_str().unwrap_or_default();
        outln!(
            "== step {step}, slot {slot}, sequence {place} of stage `{}`: number {number} of dataset `{dataset}`, \
             epoch {epoch}\n{text}\n",
            stage.name
        );
    }
    Ok(())
}
