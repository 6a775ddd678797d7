//! `looptrain chaos`: a local cluster of real processes to which a random schedule of faults
//! happens, and the proof that nothing came of them: the weights are those of an undisturbed run.
//!
//! [`schedule`] draws what happens, [`cluster`] has the processes, [`trial`] makes it happen and
//! listens, [`watch`] measures, [`report`] compares and tells. Runs have names of their own in the
//! spec's store, so that datasets are made once.

mod cluster;
mod report;
mod schedule;
mod trial;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use looptrain_storage::{Store, read_metrics, run_prefix};
use tokio_util::sync::CancellationToken;

use self::cluster::Site;
use self::report::{End, difference};
use self::trial::{Stopped, Trial};
use crate::progress::print_line;

pub(crate) use self::report::Report;

/// What is to be tried.
pub(crate) struct Plan {
    pub(crate) spec: PathBuf,
    /// With which the spec makes sense, and which all processes get.
    pub(crate) overrides: Vec<String>,
    /// Name of the run in the spec.
    pub(crate) run: String,
    pub(crate) stages: usize,
    pub(crate) store: Store,
    pub(crate) worker_timeout: Duration,
    pub(crate) seed: u64,
    pub(crate) length: Duration,
    pub(crate) workers: usize,
    /// Compute threads that the workers share.
    pub(crate) threads: u32,
}

/// More steps than any run has time for.
const ENDLESS: u64 = 1 << 32;

impl Plan {
    /// Runs with faults, then without, and compares. What fails is in the report.
    ///
    /// # Errors
    /// When `stop` is cancelled.
    pub(crate) async fn carry_out(&self, stop: &CancellationToken) -> Result<Report> {
        let mut report = Report {
            seed: self.seed,
            workers: self.workers,
            seconds: self.length.as_secs_f64(),
            worker_timeout: self.worker_timeout.as_secs_f64(),
            ..Report::default()
        };
        let (disturbed, calm) = (self.run_name("chaos"), self.run_name("calm"));
        if let Err(error) = self.compare(&disturbed, &calm, stop, &mut report).await {
            if stop.is_cancelled() {
                anyhow::bail!("interrupted; seed {} proves nothing so far", self.seed);
            }
            report.failure = Some(format!("seed {}: {error:#}", self.seed));
        }
        if report.failure.is_none() {
            for run in [&disturbed, &calm] {
                // Among it what processes had half-written when they were killed.
                self.store.sweep(&run_prefix(run), Duration::ZERO).await?;
                self.store.delete_prefix(&run_prefix(run)).await?;
            }
        } else {
            print_line(&format!("runs {disturbed} and {calm} are kept in {}", self.store.url()));
        }
        Ok(report)
    }

    fn run_name(&self, kind: &str) -> String {
        format!("{}-{kind}-{}", self.run, self.seed)
    }

    async fn compare(
        &self,
        disturbed: &str,
        calm: &str,
        stop: &CancellationToken,
        report: &mut Report,
    ) -> Result<()> {
        let site = self.site(disturbed, self.workers, self.threads / self.workers as u32);
        let mut trial = Trial::start(site, self.workers, self.worker_timeout, &["--fresh"])?;
        let plan = schedule::draw(self.seed, self.length, self.workers);
        let ended = unless_stopped(trial.run(plan, self.length), stop).await;
        let step = trial.watch.step();
        let events = std::mem::take(&mut trial.watch.events);
        let last = events.last().map(|event| {
            let (at, number) = (event.at.as_secs_f64(), events.len());
            format!("after {} {} (event {number}, at {at:.1} s)", event.kind, event.detail)
        });
        let last = last.unwrap_or_else(|| "before any event".into());
        report.steps = step.0;
        report.events = events;
        trial.end().await;
        let ended = ended.with_context(|| last.clone())?;
        report.steps = ended.step.0;
        report.weights = Some(ended.weights.clone());

        print_line(&format!("the same without faults, to step {}", ended.step));
        let site = self.site(calm, 1, self.threads);
        let until = ended.step.0.to_string();
        let arguments = ["--fresh", "--until", &until];
        let mut trial = Trial::start(site, 1, self.worker_timeout, &arguments)?;
        let undisturbed = unless_stopped(trial.run_to_its_end(), stop).await;
        trial.end().await;
        let undisturbed = undisturbed.context("in the run without faults")?;
        report.undisturbed = Some(undisturbed.weights.clone());

        let ends = (self.end(disturbed, ended).await?, self.end(calm, undisturbed).await?);
        match difference(&ends.0, &ends.1) {
            Some(difference) => Err(anyhow::anyhow!("{difference}; the run ended {last}")),
            None => Ok(()),
        }
    }

    fn site(&self, run: &str, workers: usize, threads: u32) -> Site {
        let last = self.stages - 1;
        let mut overrides = self.overrides.clone();
        overrides.push(format!("run.name={run}"));
        overrides.push(format!("stages.{last}.steps={ENDLESS}"));
        overrides.push(format!("cluster.workers={workers}"));
        Site { spec: self.spec.clone(), overrides, threads: threads.max(1) }
    }

    async fn end(&self, run: &str, stopped: Stopped) -> Result<End> {
        let Stopped { step, weights } = stopped;
        let log = read_metrics(&self.store, run).await?;
        let line = |line: &serde_json::Value| {
            Some((line["step"].as_u64()?, line["digest"].as_str()?.to_owned()))
        };
        let log = log.iter().map(line).collect::<Option<Vec<_>>>();
        let log =
            log.with_context(|| format!("a line of the log of {run} has no step or digest"))?;
        Ok(End { step, weights, log })
    }
}

async fn unless_stopped<T>(
    run: impl Future<Output = Result<T>>,
    stop: &CancellationToken,
) -> Result<T> {
    tokio::select! {
        result = run => result,
        () = stop.cancelled() => anyhow::bail!("interrupted"),
    }
}
