//! `looptrain bench step`: what a training step takes on one fixed batch.
//!
//! A step is forward, backward, the mean of the slots' gradients, clipping by the global norm and
//! AdamW, from the tokens to the new weights in the model. It is the code of a worker that is the only
//! one, with its fixed point and its digest; `--reduction none` leaves those two out.
//!
//! Operations are those of the model, whatever is computed again: for each token, loop and layer
//! `4 d^2 + 3 d f` multiply-adds in the matrices and `2 d (T + 1) / 2` in causal attention, for each
//! token and loop `V d` in the head; two operations each; the backward pass takes twice the forward
//! pass. They are compared with the rate at which this machine multiplies matrices (`matrix`).

mod matrix;
mod plain;

use anyhow::{Result, ensure};
use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use looptrain_model::{Device, SlotBatch, Trainer};
use looptrain_proto::Spec;
use looptrain_worker::bench::{BareStep, FixedSteps, fixed_steps};
use serde_json::{Map, Value, json};

use super::figures::{Samples, machine, peak_bytes, rounded};
use crate::cli::{Kernels, Recomputed, Reduced, StepBench};
use crate::commands::all_threads;
use crate::progress::print_line;
use looptrain_proto::spec::operations_per_token;

/// Steps before those that are measured: memory is new, and threads are being started.
const WARM_UP: u32 = 2;

/// Seed of tokens and weights.
const SEED: u64 = 7;

pub(super) async fn run(args: StepBench) -> Result<Value> {
    let threads = args.threads.unwrap_or_else(all_threads);
    let slots = slots(&args, threads)?;
    let reduction = reduction(&args)?;
    let spec = spec(&args, slots)?;
    let batches = batches(&spec);
    let workers = threads as usize;
    let (shape, count, device) = (spec.clone(), WARM_UP as usize, args.device);
    let trainer = Trainer::new(device, &spec.model, workers)?;
    // Before and after, for a machine has moods; a device has its matrices to itself only before.
    let before = match trainer.device_rate()? {
        Some(rate) => rate / 1e9,
        None => matrix::rate(workers)?,
    };
    let fixed = match (reduction, device) {
        (Reduced::Exact, _) => fixed_steps(spec, trainer, &batches, WARM_UP.into()).await?,
        (Reduced::None, Device::Cpu) => {
            let kernels = args.kernels;
            let steps = move || plain::steps(&spec, workers, kernels, &batches, count);
            tokio::task::spawn_blocking(steps).await??
        }
        (Reduced::None, _) => {
            let steps = move || plain::steps_on_device(&spec, trainer, &batches);
            tokio::task::spawn_blocking(steps).await??
        }
    };
    let FixedSteps { steps, sections, device_bytes } = fixed;
    let peak = peak_bytes();
    let matrix = match device {
        Device::Cpu => matrix::rate(workers)?.max(before),
        _ => before,
    };
    let (first, last) = (steps[0].loss, steps[steps.len() - 1].loss);
    let measured = &steps[count..];
    let samples = |of: fn(&BareStep) -> f64| Samples::new(measured.iter().map(of).collect());
    let whole = samples(|step| step.whole().as_secs_f64());
    let (median, minimum) = (whole.median(), whole.quantile(0.0));
    print_line(&format!("{} steps, median {median:.3} s", measured.len()));

    let tokens = shape.stages[0].step_tokens();
    let gflop = operations(&shape) / 1e9;
    // Those of a device are of the one step in which its kernels run one after the other.
    let per_thread = match device {
        Device::Cpu => f64::from(threads) * measured.len() as f64,
        _ => 1.0,
    };
    let sections: Map<String, Value> = sections
        .into_iter()
        .map(|(name, time)| (name.to_owned(), seconds(time.as_secs_f64() / per_thread)))
        .collect();
    let named = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    Ok(json!({
        "bench": "step",
        "shape": {
            "hidden": args.hidden,
            "layers": args.layers,
            "loops": args.loops,
            "heads": args.heads,
            "ffn": args.ffn,
            "vocab": args.vocab,
            "batch": args.batch,
            "sequence": args.sequence,
            "parameters": shape.model.parameters(),
        },
        "slots": slots,
        "threads": threads,
        "device": device.to_string(),
        "kernels": named(&args.kernels),
        "recompute": named(&args.recompute),
        "reduction": named(&reduction),
        "steps": measured.len(),
        "median_seconds": seconds(median),
        "min_seconds": seconds(minimum),
        "parts": {
            "compute": seconds(samples(|step| step.compute.as_secs_f64()).median()),
            "prepare": seconds(samples(|step| step.prepare.as_secs_f64()).median()),
            "update": seconds(samples(|step| step.update.as_secs_f64()).median()),
        },
        "sections": sections,
        "tokens_per_second": rounded(tokens as f64 / median),
        "gflop": rounded(gflop),
        "gflop_formula": "6 R (L (4 d d + 3 d f) + V d) + 12 R L d (T + 1) / 2 for each token",
        "gflop_per_second": rounded(gflop / median),
        "matrix_gflop_per_second": rounded(matrix),
        "share_of_matrix_rate": rounded(gflop / median / matrix),
        "peak_bytes": peak,
        "device_peak_bytes": device_bytes,
        "first_loss": first,
        "loss": last,
        "machine": machine(),
    }))
}

/// Microseconds, in seconds.
fn seconds(value: f64) -> Value {
    json!((value * 1e6).round() / 1e6)
}

/// How many slots the batch is cut into.
fn slots(args: &StepBench, threads: u32) -> Result<u32> {
    let StepBench { batch, .. } = *args;
    let slots = match args.slots {
        Some(slots) => slots,
        None if batch.is_multiple_of(threads) => threads,
        None => 1,
    };
    ensure!(
        batch.is_multiple_of(slots),
        "--slots {slots} does not divide --batch {batch}: a slot has whole sequences"
    );
    Ok(slots)
}

/// How they are added.
fn reduction(args: &StepBench) -> Result<Reduced> {
    let usual = match args.kernels {
        Kernels::Fused => Reduced::Exact,
        Kernels::Composite => Reduced::None,
    };
    let reduction = args.reduction.unwrap_or(usual);
    ensure!(
        (args.kernels, args.device) == (Kernels::Composite, Device::Cpu)
            || args.kernels == Kernels::Fused,
        "composite kernels run on the CPU; leave --device out"
    );
    ensure!(
        (args.kernels, reduction) != (Kernels::Composite, Reduced::Exact),
        "no worker computes with composite kernels; leave --reduction out, and measure the fused ones \
         with --reduction none beside them"
    );
    ensure!(
        (args.kernels, args.recompute == Recomputed::None) != (Kernels::Composite, false),
        "composite kernels keep everything; leave --recompute out"
    );
    Ok(reduction)
}

/// The run that such a step would be of: optimizer and loss as in `looptrain train`.
fn spec(args: &StepBench, slots: u32) -> Result<Spec> {
    let recompute = match args.recompute {
        Recomputed::None => "none",
        Recomputed::Loop => "loop",
        Recomputed::Layer => "layer",
    };
    let text = format!(
        r#"
        [run]
        name = "bench-step"
        store = "memory://"
        seed = {SEED}
        [compute]
        recompute = "{recompute}"
        [model]
        hidden_size = {hidden}
        num_hidden_layers = {layers}
        num_attention_heads = {heads}
        intermediate_size = {ffn}
        vocab_size = {vocab}
        [optimizer]
        beta1 = 0.9
        beta2 = 0.95
        epsilon = 1e-8
        weight_decay = 0.1
        clip_norm = 1.0
        [[datasets]]
        name = "none"
        [[stages]]
        name = "step"
        steps = {steps}
        sequence_length = {sequence}
        slots = {slots}
        slot_sequences = {slot_sequences}
        loops = {loops}
        entropy_weight = 0.05
        learning_rate = {{ peak = 3e-4 }}
        "#,
        hidden = args.hidden,
        layers = args.layers,
        heads = args.heads,
        ffn = args.ffn,
        vocab = args.vocab,
        steps = args.steps + WARM_UP,
        sequence = args.sequence,
        slot_sequences = args.batch / slots,
        loops = args.loops,
    );
    Ok(Spec::parse("bench step", &text, &[])?)
}

/// Token ids that look random, the same for all runs of a shape and any number of slots.
fn batches(spec: &Spec) -> Vec<SlotBatch> {
    let stage = &spec.stages[0];
    let (sequences, sequence_length) = (stage.slot_sequences, stage.sequence_length);
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let vocabulary = spec.model.vocab_size as u64;
    let mut token = || ((u64::from(random.next_u32()) * vocabulary) >> 32) as u32;
    let mut slot = |_| SlotBatch {
        tokens: (0..sequences * (sequence_length + 1)).map(|_| token()).collect(),
        sequences,
        sequence_length,
        starts: Vec::new(),
    };
    (0..stage.slots).map(&mut slot).collect()
}

/// Floating-point operations of a step.
fn operations(spec: &Spec) -> f64 {
    let stage = &spec.stages[0];
    stage.step_tokens() as f64 * operations_per_token(&spec.model, stage)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Bench, Cli, Command};

    fn args(given: &[&str]) -> StepBench {
        let line = [&["looptrain", "bench", "step"], given].concat();
        match Cli::try_parse_from(line).unwrap().command {
            Command::Bench(Bench::Step(args)) => args,
            _ => unreachable!(),
        }
    }

    fn refused(given: &[&str]) -> String {
        let args = args(given);
        let slots = slots(&args, 2);
        let checked = slots.and_then(|slots| reduction(&args).and_then(|_| spec(&args, slots)));
        checked.unwrap_err().to_string()
    }

    #[test]
    fn the_default_shape_takes_232_gflop() {
        // By hand: 2,048 tokens, 4 loops of 4 layers with 851,968 parameters in matrices each, a head
        // of 1,048,576, and attention over 128.5 positions in the mean.
        let args = args(&[]);
        let spec = spec(&args, slots(&args, 2).unwrap()).unwrap();
        let token = 6.0 * 4.0 * (4.0 * 851_968.0 + 1_048_576.0) + 12.0 * 16.0 * 256.0 * 128.5;
        assert_eq!(operations(&spec), 2048.0 * token);
        assert_eq!((operations(&spec) / 1e9).round(), 232.0);
    }

    #[test]
    fn a_batch_is_cut_into_as_many_slots_as_threads_where_that_divides_it() {
        let cut = |given: &[&str], threads| slots(&args(given), threads).unwrap();
        assert_eq!([1, 2, 3, 8].map(|threads| cut(&[], threads)), [1, 2, 1, 8]);
        assert_eq!(cut(&["--slots", "4"], 2), 4);
        assert_eq!(cut(&["--batch", "1"], 2), 1);
        assert!(refused(&["--slots", "3"]).contains("--slots 3 does not divide --batch 8"));
    }

    #[test]
    fn the_tokens_do_not_depend_on_the_slots_and_fill_the_vocabulary() {
        let given = ["--vocab", "50", "--sequence", "20"];
        let tokens = |slots: u32| -> Vec<u32> {
            let spec = spec(&args(&given), slots).unwrap();
            batches(&spec).into_iter().flat_map(|batch| batch.tokens).collect()
        };
        assert_eq!(tokens(1).len(), 8 * 21);
        assert_eq!(tokens(4), tokens(1));
        let mut seen = tokens(1);
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 40 && seen.last() < Some(&50), "{seen:?}");
    }

    #[test]
    fn what_cannot_be_measured_is_refused_with_the_remedy() {
        for (given, words) in [
            (&["--heads", "3"][..], "3 heads do not divide"),
            (&["--kernels", "composite", "--reduction", "exact"], "leave --reduction out"),
            (&["--kernels", "composite", "--recompute", "loop"], "leave --recompute out"),
            (&["--kernels", "composite", "--device", "cuda:0"], "leave --device out"),
        ] {
            let error = refused(given);
            assert!(error.contains(words), "{given:?}: {error}");
        }
    }
}
