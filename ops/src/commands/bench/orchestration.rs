//! `looptrain bench orchestration`: what the control plane costs.
//!
//! The same steps of one spec are taken twice, on the same threads: bare, that is by the compute
//! thread of a worker in this process with nothing around it and its tokens in memory, and as the
//! local run that `looptrain train` makes, with coordinator, worker processes, sessions, votes, step
//! log and telemetry. A machine has moods, so both take turns.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use looptrain_coordinator::{RunEvent, Started};
use looptrain_proto::{Spec, Step};
use looptrain_worker::bench::bare_steps;
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
        let steps = bare_steps(run.spec.clone(), threads as usize, u64::from(all)).await?;
        let seconds = steps.iter().skip(WARM_UP as usize);
        bare.push(seconds.map(std::time::Duration::as_secs_f64).collect::<Vec<_>>());
        local.push(local_steps(&mut run, threads, all, telemetry).await?);
    }
    let medians = |rounds: &[Vec<f64>]| -> Vec<f64> {
        rounds.iter().map(|steps| rounded(Samples::new(steps.clone()).median() * 1e3)).collect()
    };
    let (bare_medians, local_medians) = (medians(&bare), medians(&local));
    let (bare, local) = (Samples::new(bare.concat()), Samples::new(local.concat()));
    let ratio = local.median() / bare.median();
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
        "rounds": { "bare_ms": bare_medians, "local_ms": local_medians },
        "bare_ms": { "p25": rounded(bare.quantile(0.25) * 1e3), "p50": rounded(bare.median() * 1e3) },
        "local_ms": { "p25": rounded(local.quantile(0.25) * 1e3), "p50": rounded(local.median() * 1e3) },
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
    Ok(SpecArgs { spec: args.spec.clone(), overrides, fresh: true, dashboard: None })
}

/// Seconds from commit to commit of a local run, without those of the warm-up.
async fn local_steps(
    run: &mut PreparedRun,
    threads: u32,
    steps: u32,
    telemetry: &Telemetry,
) -> Result<Vec<f64>> {
    let stop = CancellationToken::new();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let Started::Running(running) = run.start(listen, None, stop.clone(), telemetry).await? else {
        bail!("a run that was to begin anew is finished already");
    };
    let last = Step(u64::from(steps));
    let commits = tokio::spawn(commits(running.events.resubscribe(), last, stop));
    let fleet = Fleet::new(running.address, run.spec.cluster.workers, threads);
    with_workers(running, fleet, run).await?;
    let commits = commits.await.context("the task that watches the commits failed")??;
    let intervals = commits.windows(2).skip(WARM_UP as usize - 1);
    Ok(intervals.map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect())
}

/// When each step was committed; stops the run, which may have other stages, at step `last`.
async fn commits(
    mut events: broadcast::Receiver<RunEvent>,
    last: Step,
    stop: CancellationToken,
) -> Result<Vec<Instant>> {
    let mut commits = Vec::new();
    loop {
        match events.recv().await {
            Ok(RunEvent::Committed(record)) => {
                commits.push(Instant::now());
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
