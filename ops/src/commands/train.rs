//! `looptrain train`: a whole local cluster in one command.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Result, bail};
use looptrain_coordinator::{Outcome, Running, Started};
use tokio::task::JoinHandle;

use super::all_threads;
use super::coordinator::{PreparedRun, follow};
use super::generate;
use crate::cli::Train;
use crate::launcher::Fleet;
use crate::signals;
use crate::telemetry::Telemetry;

pub(crate) async fn run(args: Train, telemetry: &Telemetry) -> Result<()> {
    let stop = signals::stop_on_signals(
        "stopping at the next step, with a checkpoint; once more to end at once",
    )?;
    let prepared = PreparedRun::new(&args.spec, |spec| {
        spec.cluster.workers = args.workers.unwrap_or(spec.cluster.workers);
    });
    let mut run = tokio::select! {
        run = prepared => run?,
        () = stop.cancelled() => bail!("stopped before training began"),
    };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let started = run.start(listen, args.spec.dashboard, stop, telemetry).await?;
    let outcome = match started {
        Started::Finished(outcome) => outcome,
        Started::Running(running) => {
            let threads = args.threads.unwrap_or_else(all_threads);
            let fleet = Fleet::new(running.address, run.spec.cluster.workers, threads);
            with_workers(running, fleet, &run).await?
        }
    };
    run.print_outcome(&outcome).await?;
    if !outcome.stopped && run.spec.sample.tokens > 0 {
        generate::print_sample(&run, outcome.step).await?;
    }
    run.print_end(&outcome);
    Ok(())
}

/// Follows the run with its workers beside it; when the last worker is gone before the run has
/// ended, the run fails, for nobody will come to go on with it.
async fn with_workers(running: Running, fleet: Fleet, run: &PreparedRun) -> Result<Outcome> {
    let mut workers: JoinHandle<Result<Vec<String>>> = tokio::spawn(fleet.run());
    let followed = follow(running, &run.spec);
    tokio::pin!(followed);
    let outcome = tokio::select! {
        biased;
        outcome = &mut followed => outcome?,
        ends = &mut workers => {
            let ends = ends??;
            // The workers end a moment before the coordinator's own last words.
            let grace = std::time::Duration::from_secs(5);
            match tokio::time::timeout(grace, &mut followed).await {
                Ok(outcome) => return outcome,
                Err(_) => bail!("all workers are gone: {}", ends.join(", ")),
            }
        }
    };
    // Workers were told to finish; give them a moment before they are killed with this task.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), &mut workers).await;
    workers.abort();
    Ok(outcome)
}
