//! `looptrain train`: a whole local cluster in one command.

use std::time::Duration;

use anyhow::{Result, bail};
use looptrain_coordinator::{Outcome, RunEvent, Running, Started};
use looptrain_proto::Spec;
use looptrain_proto::transport::Role;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::all_threads;
use super::coordinator::{PreparedRun, follow};
use super::generate;
use crate::cli::{FleetArgs, Train};
use crate::launcher::Fleet;
use crate::limits::allow_all_descriptors;
use crate::progress::print_line;
use crate::security::{Doors, READS, Usage, observe_expiry};
use crate::telemetry::Telemetry;
use crate::{plan, signals};

/// What the workers get to end after the run, and the coordinator to say that it is over after the
/// workers.
const GRACE: Duration = Duration::from_secs(5);

pub(crate) async fn run(mut args: Train, telemetry: &Telemetry) -> Result<()> {
    if args.dry_run {
        return print_plan(&args);
    }
    let stop = signals::stop_on_signals(
        "stopping at the next step, with a checkpoint; once more to end at once",
    )?;
    let doors = args.doors()?;
    allow_all_descriptors();
    // As an override, so that it is checked like any other value.
    args.spec
        .overrides
        .extend(args.fleet.workers.map(|workers| format!("cluster.workers={workers}")));
    let mut run = tokio::select! {
        run = PreparedRun::new(&args.spec) => run?,
        () = stop.cancelled() => bail!("stopped before training began"),
    };
    let outcome = on_this_machine(&mut run, &args.fleet, doors, stop, telemetry).await?;
    run.print_outcome(&outcome).await?;
    if !outcome.stopped && run.spec.sample.tokens > 0 {
        generate::print_sample(&run, outcome.step).await?;
    }
    run.print_end(&outcome);
    Ok(())
}

impl Train {
    /// Workers are on this machine; the page may be for others.
    fn doors(&self) -> Result<Doors> {
        let page = self.spec.dashboard;
        page.map_or(Ok(()), |address| self.listening.check("--dashboard", address, READS))?;
        self.listening.check_tokens(page.is_some(), "--dashboard")?;
        if page.is_none() && self.listening.tls.tls.is_some() {
            let reason = "--tls of train is for its page, which takes --dashboard; its workers are on \
                          this machine";
            return Err(Usage(reason.to_owned()).into());
        }
        let credentials = self.listening.credentials(Role::Coordinator)?;
        credentials.iter().for_each(observe_expiry);
        Ok(Doors { dashboard: page, access: self.listening.access(credentials)?, ..Doors::local() })
    }
}

/// Runs the coordinator and its workers to the run's end.
pub(super) async fn on_this_machine(
    run: &mut PreparedRun,
    args: &FleetArgs,
    doors: Doors,
    stop: CancellationToken,
    telemetry: &Telemetry,
) -> Result<Outcome> {
    let started = run.start(doors, stop, None, telemetry).await?;
    let running = match started {
        Started::Finished(outcome) => return Ok(outcome),
        Started::Running(running) => running,
    };
    let address = running.address;
    print_line(&format!("orders (save, pause, drain, stop) go to --coordinator http://{address}"));
    let threads = args.threads.unwrap_or_else(all_threads);
    let fleet = Fleet::new(running.address, &run.spec, threads, args.memory);
    with_workers(running, Fleet { device: args.device, ..fleet }, run).await
}

fn print_plan(args: &Train) -> Result<()> {
    let spec = Spec::load(&args.spec.spec, &args.spec.overrides)?;
    let plan = plan::plan(&spec, &args.plan, args.fleet.threads.unwrap_or_else(all_threads))?;
    if args.json {
        outln!("{plan}");
    } else {
        plan::print(&plan);
    }
    Ok(())
}

/// Follows the run with its workers beside it; when the last worker is gone before the run has
/// ended, the run fails, for nobody will come to go on with it.
pub(super) async fn with_workers(
    running: Running,
    fleet: Fleet,
    run: &mut PreparedRun,
) -> Result<Outcome> {
    let events = running.events.resubscribe();
    let kill = CancellationToken::new();
    let mut workers: JoinHandle<Result<Vec<String>>> = tokio::spawn(fleet.run(kill.clone()));
    let followed = follow(running, run, |_| ());
    tokio::pin!(followed);
    let outcome = tokio::select! {
        biased;
        outcome = &mut followed => outcome,
        ends = &mut workers => return without_workers(followed, events, &ends??, GRACE).await,
    };
    // Workers were told to finish.
    if timeout(GRACE, &mut workers).await.is_err() {
        kill.cancel();
        // How those end that had to be killed is of no interest.
        let _ = workers.await;
    }
    outcome
}

/// Waits for the end of a run whose workers have all ended: for as long as the store takes when the
/// run is over, which its events say about when the workers hear it; otherwise not beyond `grace`.
async fn without_workers(
    followed: impl Future<Output = Result<Outcome>>,
    mut events: broadcast::Receiver<RunEvent>,
    ends: &[String],
    grace: Duration,
) -> Result<Outcome> {
    let over = async {
        loop {
            match events.recv().await {
                Ok(RunEvent::Finished { .. } | RunEvent::Failed { .. })
                | Err(RecvError::Closed) => break,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
            }
        }
    };
    tokio::pin!(followed);
    tokio::select! {
        biased;
        outcome = &mut followed => return outcome,
        over = timeout(grace, over) => if over.is_err() {
            bail!("all workers are gone: {}", ends.join(", "));
        },
    }
    followed.await
}

#[cfg(test)]
mod tests {
    use looptrain_proto::Step;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    /// A run that ends well, but long after its workers.
    async fn slow() -> Result<Outcome> {
        tokio::time::sleep(SHORT * 10).await;
        let (step, tokens) = (Step(7), 70);
        let (loss, weights_digest, evaluation) = (None, None, None);
        Ok(Outcome { step, tokens, loss, weights_digest, stopped: false, evaluation })
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_is_over_gets_all_the_time_it_needs_for_its_last_words() {
        let (publish, events) = broadcast::channel(1);
        // The listener is behind, and the last event is the one that counts.
        for reason in ["almost", "done"] {
            publish.send(RunEvent::Finished { reason: reason.into() }).unwrap();
        }
        let outcome = without_workers(slow(), events, &[], SHORT).await;
        assert_eq!(outcome.unwrap().step, Step(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_is_not_over_fails_without_workers_and_says_how_they_ended() {
        let (publish, events) = broadcast::channel(8);
        publish.send(RunEvent::Stopping { reason: "told to".into() }).unwrap();
        let ends = ["w0 ended".to_owned(), "w1 crashed".to_owned()];
        let error = without_workers(slow(), events, &ends, SHORT).await.unwrap_err();
        assert_eq!(error.to_string(), "all workers are gone: w0 ended, w1 crashed");
    }
}
