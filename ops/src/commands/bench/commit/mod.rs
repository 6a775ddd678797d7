//! `looptrain bench commit`: how long a step that all have voted for takes to be committed by all.
//!
//! The coordinator is a real one with a store in memory. Its sessions are real ones, each on a TCP
//! connection of its own; what is at their other end ([`crew`]) keeps the protocol and computes
//! nothing. Both ends share this machine, so the figures include the clients' work.

mod crew;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use looptrain_coordinator::http::Access;
use looptrain_coordinator::{Outcome, RunEvent, Settings, Started};
use looptrain_proto::{Digest, Spec, Step};
use looptrain_storage::Store;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::figures::{Samples, machine, resident_bytes, rounded};
use crate::cli::CommitBench;
use crate::limits::allow_descriptors;
use crate::progress::print_line;
use crew::{Clock, Crew};

/// Steps before those that are measured.
const WARM_UP: u32 = 10;

/// The p99 that is aimed at, for 2,000 workers.
const TARGET_MS: f64 = 50.0;

/// Descriptors that a process has besides the two of each session.
const OTHER_DESCRIPTORS: u64 = 128;

pub(super) async fn run(args: CommitBench) -> Result<Value> {
    let CommitBench { workers, steps } = args;
    let descriptors = 2 * u64::from(workers) + OTHER_DESCRIPTORS;
    allow_descriptors(descriptors).with_context(|| {
        format!("{workers} sessions need {descriptors} open files; raise the limit, `ulimit -n`")
    })?;
    let all = WARM_UP + steps;
    let spec = spec(workers, all)?;
    let store = Store::open(&spec.run.store)?;
    let settings = Settings {
        spec,
        store: store.clone(),
        datasets: vec![("none".into(), Digest::of(b"no tokens"))],
        fresh: false,
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        credentials: None,
        dashboard: None,
        access: Access::default(),
        stop: CancellationToken::new(),
        until: None,
        render_metrics: None,
        moments: None,
    };
    let Started::Running(running) = looptrain_coordinator::start(settings).await? else {
        bail!("a store in memory held a finished run");
    };
    let mut events = running.events.resubscribe();
    let clock = Arc::new(Clock::new(all));
    let before = resident_bytes();

    print_line(&format!("{workers} sessions join"));
    let start = Instant::now();
    let crew = Crew::join(running.address, workers, &store, &clock).await?;
    let joined = start.elapsed();
    until(&mut events, |event| matches!(event, RunEvent::Formed { .. })).await?;
    let forming = start.elapsed() - joined;
    print_line(&format!("{all} steps, of which {WARM_UP} are not measured"));
    let resident = tokio::spawn(async move {
        let last = Step(u64::from(all));
        let is_last =
            |event: &RunEvent| matches!(event, RunEvent::Committed(record) if record.step == last);
        until(&mut events, is_last).await.map(|()| resident_bytes())
    });
    let followed = async { Ok::<Outcome, anyhow::Error>(running.wait().await?) };
    let (outcome, ()) = tokio::try_join!(followed, crew.work())?;
    let resident = resident.await.context("the task that looks at the memory failed")??;
    ensure!(outcome.step.0 == u64::from(all), "the run ended at step {}", outcome.step);

    let measured = clock.steps(WARM_UP);
    let milliseconds = |of: fn(&crew::StepTimes) -> Duration| {
        Samples::new(measured.iter().map(|step| of(step).as_secs_f64() * 1e3).collect())
    };
    let commit = milliseconds(crew::StepTimes::vote_to_commit);
    let votes = milliseconds(crew::StepTimes::first_to_last_vote);
    let whole = milliseconds(crew::StepTimes::commit_to_commit);
    let per_session =
        resident.zip(before).map(|(now, before)| now.saturating_sub(before) / u64::from(workers));
    Ok(json!({
        "bench": "commit",
        "workers": workers,
        "steps": steps,
        "vote_to_commit_ms": {
            "p50": rounded(commit.median()),
            "p99": rounded(commit.quantile(0.99)),
            "max": rounded(commit.max()),
        },
        "target_p99_ms": TARGET_MS,
        "votes_ms_p50": rounded(votes.median()),
        "step_ms_p50": rounded(whole.median()),
        "joins_per_second": rounded(f64::from(workers) / joined.as_secs_f64()),
        "form_ms": rounded(forming.as_secs_f64() * 1e3),
        "resident_bytes_per_session": per_session,
        "machine": machine(),
    }))
}

/// A run whose model and data nobody ever looks at.
fn spec(workers: u32, steps: u32) -> Result<Spec> {
    let text = format!(
        r#"
        [run]
        name = "bench-commit"
        store = "memory://"
        [cluster]
        workers = {workers}
        # Both ends share the machine, and a slow moment of it shall not cost a worker.
        worker_timeout = 30.0
        [model]
        hidden_size = 8
        num_hidden_layers = 1
        num_attention_heads = 2
        intermediate_size = 16
        vocab_size = 512
        [[datasets]]
        name = "none"
        [[stages]]
        name = "only"
        steps = {steps}
        sequence_length = 16
        slots = {workers}
        slot_sequences = 1
        loops = 4
        entropy_weight = 0.05
        learning_rate = {{ peak = 1e-3 }}
        [checkpoint]
        every_steps = {steps}
        [evaluation]
        sequences = 1
        "#
    );
    Ok(Spec::parse("the bench's spec", &text, &[])?)
}

/// Waits for an event.
async fn until(
    events: &mut broadcast::Receiver<RunEvent>,
    wanted: impl Fn(&RunEvent) -> bool,
) -> Result<()> {
    loop {
        match events.recv().await {
            Ok(event) if wanted(&event) => return Ok(()),
            Ok(RunEvent::Failed { reason }) => bail!("the run failed: {reason}"),
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => bail!("the coordinator is gone"),
        }
    }
}
