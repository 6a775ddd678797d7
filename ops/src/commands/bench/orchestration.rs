//! `looptrain bench orchestration`: what the control plane costs.
//!
//! The same steps of one spec are taken twice, on the same threads: bare, that is by the compute
//! thread of a worker in this process with nothing around it and its tokens in memory, and as the
//! local run that `looptrain train` makes, with coordinator, worker processes, sessions, votes, step
//! log and telemetry. A machine has moods, so both take turns.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use looptrain_coordinator::{RunEvent, SectionSeconds, Started};
use looptrain_proto::{Spec, Step};
use looptrain_worker::bench::{BareStep, bare_steps};
use serde_json::{Value, json};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;

use super::figures::{Samples, machine, rounded};
use crate::cli::{OrchestrationBench, SpecArgs};
use crate::commands::all_threads;
use crate::commands::coordinator::PreparedRun;
use crate::commands::train::with_workers;
use crate::launcher::Fleet;
use crate::progress::print_line;
use crate::security::Doors;
use crate::telemetry::Telemetry;

/// Steps before those that are measured: caches are cold, and threads are being started.
const WARM_UP: u32 = 5;

/// Turns of each.
const ROUNDS: u32 = 2;

/// What the local run may take more, where a step takes about 200 ms.
const TARGET_PERCENT: f64 = 2.0;

pub(super) async fn run(args: OrchestrationBench, telemetry: &Telemetry) -> Result<Value> {
    let threads = args.threads.unwrap_or_else(all_threads);
    let all = WARM_UP + args.steps;
    let mut run = PreparedRun::new(&spec_args(&args, all)?).await?;
    let (mut bare, mut local) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        print_line(&format!("round {round} of {ROUNDS}: {all} steps bare, then in a local run"));
        let mut steps = bare_steps(run.spec.clone(), threads as usize, u64::from(all)).await?;
        bare.push(steps.split_off(WARM_UP as usize));
        local.push(local_steps(&mut run, threads, all, telemetry).await?);
    }
    let bare_rounds: Vec<f64> =
        bare.iter().map(|steps| milliseconds(steps, |step| step.whole().as_secs_f64())).collect();
    let local_rounds: Vec<f64> =
        local.iter().map(|steps| milliseconds(steps, |step| step.seconds)).collect();
    let (bare, local) = (bare.concat(), local.concat());
    let bare_ms =
        |of: fn(&BareStep) -> Duration| milliseconds(&bare, |step| of(step).as_secs_f64());
    let local_ms = |of: fn(&LocalStep) -> f64| milliseconds(&local, of);
    let (bare_whole, local_whole) = (bare_ms(BareStep::whole), local_ms(|step| step.seconds));
    let ratio = local_whole / bare_whole;
    // Computing takes now more, now less; this is what is left of each step when it is taken away.
    let beside = local_ms(LocalStep::beside_the_sections) - bare_ms(|step| step.prepare);
    let stage = &run.spec.stages[0];
    Ok(json!({
        "bench": "orchestration",
        "step": {
            "parameters": run.spec.model.parameters(),
            "loops": stage.loops,
            "slots": stage.slots,
            "tokens": stage.step_tokens(),
        },
        "steps": args.steps,
        "workers": args.workers,
        "threads": threads,
        "rounds": { "bare_ms": bare_rounds, "local_ms": local_rounds },
        "bare_ms": {
            "p50": bare_whole,
            "compute": bare_ms(|step| step.compute),
            "prepare": bare_ms(|step| step.prepare),
            "optimizer": bare_ms(|step| step.update),
        },
        "local_ms": {
            "p50": local_whole,
            "data_wait": local_ms(|step| step.sections.data_wait),
            "compute": local_ms(|step| step.sections.compute),
            "reduce": local_ms(|step| step.sections.reduce),
            "optimizer": local_ms(|step| step.sections.optimizer),
        },
        "control_plane_ms": rounded(beside),
        "control_plane_percent": rounded(beside / bare_whole * 100.0),
        "ratio": rounded(ratio),
        "overhead_percent": rounded((ratio - 1.0) * 100.0),
        "target_percent": TARGET_PERCENT,
        "machine": machine(),
    }))
}

/// The spec's first stage, as long as is needed, under another name; nothing but steps happens in
/// it.
fn spec_args(args: &OrchestrationBench, steps: u32) -> Result<SpecArgs> {
    let spec = Spec::load(&args.spec, &args.overrides)?;
    let mut overrides = args.overrides.clone();
    overrides.extend([
        format!("run.name={}-bench", spec.run.name),
        format!("cluster.workers={}", args.workers),
        format!("stages.0.steps={steps}"),
        "stages.0.learning_rate.warmup_steps=0".into(),
        "stages.0.learning_rate.decay_steps=0".into(),
        format!("checkpoint.every_steps={steps}"),
        "evaluation.every_steps=0".into(),
        "evaluation.sequences=1".into(),
    ]);
    let spec = args.spec.clone();
    Ok(SpecArgs {
        spec,
        overrides,
        fresh: true,
        until: None,
        dashboard: None,
        tensorboard: None,
        audit: false,
    })
}

/// A step of the local run.
#[derive(Clone, Copy)]
struct LocalStep {
    /// From commit to commit.
    seconds: f64,
    /// As the slowest worker reports them.
    sections: SectionSeconds,
}

impl LocalStep {
    /// Votes, commits, the way to the worker and back, and preparing, which is no section.
    fn beside_the_sections(&self) -> f64 {
        let SectionSeconds { data_wait, compute, reduce, optimizer, .. } = self.sections;
        self.seconds - data_wait - compute - reduce - optimizer
    }
}

/// The median of something that is counted in seconds.
fn milliseconds<S>(steps: &[S], seconds: impl Fn(&S) -> f64) -> f64 {
    rounded(Samples::new(steps.iter().map(seconds).collect()).median() * 1e3)
}

/// The steps of a local run, without those of the warm-up.
async fn local_steps(
    run: &mut PreparedRun,
    threads: u32,
    steps: u32,
    telemetry: &Telemetry,
) -> Result<Vec<LocalStep>> {
    let stop = CancellationToken::new();
    let Started::Running(running) =
        run.start(Doors::local(), stop.clone(), None, telemetry).await?
    else {
        bail!("a run that was to begin anew is finished already");
    };
    let last = Step(u64::from(steps));
    let commits = tokio::spawn(commits(running.events.resubscribe(), last, stop));
    let fleet = Fleet::new(running.address, &run.spec, threads, None);
    with_workers(running, fleet, run).await?;
    let commits = commits.await.context("the task that watches the commits failed")??;
    let intervals = commits.windows(2).skip(WARM_UP as usize - 1);
    let step = |pair: &[(Instant, SectionSeconds)]| LocalStep {
        seconds: (pair[1].0 - pair[0].0).as_secs_f64(),
        sections: pair[1].1,
    };
    Ok(intervals.map(step).collect())
}

/// When each step was committed, and its sections; stops the run, which may have other stages, at step `last`.
async fn commits(
    mut events: broadcast::Receiver<RunEvent>,
    last: Step,
    stop: CancellationToken,
) -> Result<Vec<(Instant, SectionSeconds)>> {
    let mut commits = Vec::new();
    loop {
        match events.recv().await {
            Ok(RunEvent::Committed(record)) => {
                commits.push((Instant::now(), record.sections));
                if record.step == last {
                    stop.cancel();
                    return Ok(commits);
                }
            }
            Ok(RunEvent::WorkerLost { name, reason, .. }) => bail!("{name} was lost: {reason}"),
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => bail!("events were missed"),
            Err(RecvError::Closed) => bail!("the run ended before step {last}"),
        }
    }
}
