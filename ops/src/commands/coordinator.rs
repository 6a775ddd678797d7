//! `looptrain coordinator`, and the part of it that `looptrain train` shares.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use looptrain_coordinator::{OnMoment, Outcome, RunEvent, Settings, Started, read_chronicle_json};
use looptrain_proto::transport::Role;
use looptrain_proto::{Digest, Spec, Step};
use looptrain_storage::{Checkpoints, Dataset, Store};
use tokio_util::sync::CancellationToken;

use super::import::{check_branch, check_initial};
use crate::cli::{Coordinator, SpecArgs};
use crate::fault::Faults;
use crate::limits::allow_all_descriptors;
use crate::progress::{RunProgress, evaluation_line, print_line};
use crate::security::{Doors, READS, TAKES_PART, observe_expiry};
use crate::telemetry::Telemetry;
use crate::tensorboard::EventFile;
use crate::{datasets, signals};

pub(crate) async fn run(args: Coordinator, telemetry: &Telemetry) -> Result<()> {
    let doors = args.doors()?;
    allow_all_descriptors();
    let stop = signals::stop_on_signals("stopping at the next step, with a checkpoint")?;
    let mut run = tokio::select! {
        run = PreparedRun::new(&args.spec) => run?,
        () = stop.cancelled() => bail!("stopped before training began"),
    };
    if args.bound {
        signals::end_with_parent();
    }
    let moments = (!args.faults.is_empty()).then(|| watched_by(Faults::new(args.faults)));
    let started = run.start(doors, stop, moments, telemetry).await?;
    let outcome = match started {
        Started::Finished(outcome) => outcome,
        Started::Running(running) => {
            let scheme = if args.listening.tls.tls.is_some() { "https" } else { "http" };
            print_line(&format!("listening for workers on {scheme}://{}", running.address));
            let also: fn(&RunEvent) = if args.events { print_event } else { |_| () };
            follow(running, &mut run, also).await?
        }
    };
    run.print_outcome(&outcome).await?;
    run.print_end(&outcome);
    Ok(())
}

impl Coordinator {
    /// Where this coordinator listens, if it may.
    fn doors(&self) -> Result<Doors> {
        self.listening.check("--listen", self.listen, TAKES_PART)?;
        let page = self.spec.dashboard;
        page.map_or(Ok(()), |address| self.listening.check("--dashboard", address, READS))?;
        self.listening.check_tokens(page.is_some(), "--dashboard")?;
        let credentials = self.listening.credentials(Role::Coordinator)?;
        credentials.iter().for_each(observe_expiry);
        let access = self.listening.access(credentials.clone())?;
        Ok(Doors { listen: self.listen, credentials, dashboard: page, access })
    }
}

/// A run whose spec is read and whose datasets are there.
pub(crate) struct PreparedRun {
    pub(crate) spec: Spec,
    pub(crate) store: Store,
    pub(crate) datasets: Vec<Dataset>,
    /// Begin anew, whatever the store holds of the run.
    fresh: bool,
    /// Stop after this step.
    until: Option<Step>,
    /// For TensorBoard.
    events: Option<EventFile>,
    /// Whether the status page is served with TLS.
    page_secured: bool,
    /// Whether workers and operators have to show certificates.
    workers_secured: bool,
}

impl PreparedRun {
    /// Reads the spec, opens the store and makes what datasets are missing.
    pub(crate) async fn new(args: &SpecArgs) -> Result<Self> {
        let mut overrides = args.overrides.clone();
        overrides.extend(args.audit.then(|| "run.audit=true".to_owned()));
        let spec = Spec::load(&args.spec, &overrides)?;
        let run = Self::of(spec, args.fresh, args.until.map(Step)).await?;
        let folder = args.tensorboard.as_ref();
        let events = folder.map(|folder| EventFile::create(folder, &run.spec.run.name));
        Ok(Self { events: events.transpose()?, ..run })
    }

    /// Opens the store of a spec and makes what datasets are missing.
    pub(super) async fn of(mut spec: Spec, fresh: bool, until: Option<Step>) -> Result<Self> {
        let store = Store::open(&spec.run.store)?;
        store.check_writable().await?;
        // A run that has a checkpoint has no use for what it began from.
        if fresh || Checkpoints::new(&store, &spec.run.name).list().await?.is_empty() {
            check_initial(&store, &spec).await?;
            check_branch(&store, &spec).await?;
        }
        let datasets = datasets::ensure(&store, &spec).await?;
        datasets::clamp_evaluation(&mut spec, &datasets);
        let (page_secured, workers_secured) = (false, false);
        Ok(Self {
            spec,
            store,
            datasets,
            fresh,
            until,
            events: None,
            page_secured,
            workers_secured,
        })
    }

    pub(crate) async fn start(
        &mut self,
        doors: Doors,
        stop: CancellationToken,
        moments: Option<OnMoment>,
        telemetry: &Telemetry,
    ) -> Result<Started> {
        self.page_secured = doors.access.credentials.is_some();
        self.workers_secured = doors.credentials.is_some();
        let before = read_chronicle_json(&self.store, &self.spec.run.name).await;
        let started = looptrain_coordinator::start(Settings {
            spec: self.spec.clone(),
            store: self.store.clone(),
            datasets: self.datasets.iter().map(pin).collect(),
            fresh: self.fresh,
            listen: doors.listen,
            credentials: doors.credentials,
            dashboard: doors.dashboard,
            access: doors.access,
            stop,
            until: self.until,
            render_metrics: Some(telemetry.renderer()),
            moments,
        })
        .await?;
        if let (Started::Running(_), Some(seconds)) = (&started, last_word(&before)) {
            print_line(&format!(
                "an earlier coordinator of this run wrote {seconds} s ago and did not say that it ends: if it is \
                 still there, this one has taken the run from it"
            ));
        }
        Ok(started)
    }

    /// The first dataset that the stage of a step draws from.
    pub(crate) fn dataset_of(&self, step: Step) -> &Dataset {
        let mixture = self.spec.mixture(self.spec.stage_of(step));
        &self.datasets[mixture.first().map_or(0, |part| part.0)]
    }

    /// The last evaluation, on stdout, beside what a model of single tokens reaches; nothing when
    /// the last step was not evaluated.
    pub(crate) async fn print_outcome(&self, outcome: &Outcome) -> Result<()> {
        if let Some(evaluation) = &outcome.evaluation {
            outln!("{}", evaluation_line(evaluation));
            let unigram = self.dataset_of(outcome.step).unigram_loss().await?;
            let last = evaluation.loss_per_loop.last().copied().unwrap_or(f64::NAN);
            outln!("unigram model: loss {unigram:.3}; last loop {last:.3}");
        }
        Ok(())
    }

    /// The last line on stdout, which scripts read: `done run=... step=... tokens=... loss=...
    /// weights=...` or, when the run was stopped before its last step, `stopped run=...`.
    pub(crate) fn print_end(&self, outcome: &Outcome) {
        let end = if outcome.stopped { "stopped" } else { "done" };
        let loss = outcome.loss.map_or("none".into(), |loss| format!("{loss:.6}"));
        let weights = outcome.weights_digest.map_or("none".into(), |digest| digest.to_string());
        let (name, step, tokens) = (&self.spec.run.name, outcome.step, outcome.tokens);
        outln!("{end} run={name} step={step} tokens={tokens} loss={loss} weights={weights}");
    }
}

/// Whoever wrote so lately may be alive.
const LATELY: Duration = Duration::from_secs(15);

/// How long ago the coordinator wrote that kept this chronicle, if that was lately and not its last word.
fn last_word(chronicle: &serde_json::Value) -> Option<u64> {
    let ended = matches!(chronicle["events"][0]["kind"].as_str(), Some("finished" | "failed"));
    let kept = UNIX_EPOCH + Duration::from_millis(chronicle["kept_unix_ms"].as_u64()?);
    let age = SystemTime::now().duration_since(kept).unwrap_or_default();
    (!ended && age <= LATELY).then_some(age.as_secs())
}

fn watched_by(faults: Faults) -> OnMoment {
    Arc::new(move |moment| faults.at(moment.name(), moment.step()))
}

/// Prints an event as one line of JSON.
fn print_event(event: &RunEvent) {
    match serde_json::to_string(event) {
        // A run does not end for a reader that has gone, or a disk that is full.
        Ok(line) => drop(writeln!(std::io::stdout().lock(), "{line}")),
        Err(error) => tracing::warn!("an event cannot be printed: {error}"),
    }
}

/// What a run is pinned to.
fn pin(dataset: &Dataset) -> (String, Digest) {
    (dataset.manifest().name.clone(), dataset.digest())
}

/// Shows a run's events until it ends; what else is to happen to each is `also`.
pub(crate) async fn follow(
    mut running: looptrain_coordinator::Running,
    run: &mut PreparedRun,
    also: impl Fn(&RunEvent),
) -> Result<Outcome> {
    if let Some(address) = running.dashboard {
        let scheme = if run.page_secured { "https" } else { "http" };
        print_line(&format!("status page on {scheme}://{address}"));
    }
    for (step, reason) in &running.skipped_checkpoints {
        print_line(&format!("checkpoint of step {step} passed over: {reason}"));
    }
    let from = running.resumed_from.unwrap_or(Step(0));
    if from > Step(0) {
        let origin = run.spec.branch.as_ref().filter(|_| running.branched);
        print_line(&match origin {
            Some(branch) => format!("branching off at step {from} of run `{}`", branch.run),
            None => format!("going on from the checkpoint of step {from}"),
        });
    }
    if let Some(reason) = &running.paused {
        let scheme = if run.workers_secured { "https" } else { "http" };
        let tls = if run.workers_secured { " --tls DIR" } else { "" };
        let address = running.address;
        let url = match address.ip().is_unspecified() {
            true => format!("{scheme}://HOST:{}", address.port()),
            false => format!("{scheme}://{address}"),
        };
        let then = format!("`looptrain resume --coordinator {url}{tls}` has it go on");
        print_line(&format!("the run is still paused: {reason}; {then}"));
    }
    let mut progress = RunProgress::new(run.spec.total_steps(), from);
    let mut show = |event: &RunEvent| {
        also(event);
        if let Some(events) = &mut run.events {
            events.record(event);
        }
        progress.show(event);
    };
    loop {
        tokio::select! {
            biased;
            event = running.events.recv() => match event {
                Ok(event) => show(&event),
                Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "events came faster than they could be shown");
                }
                Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
            },
            outcome = &mut running.outcome => {
                while let Ok(event) = running.events.try_recv() {
                    show(&event);
                }
                return Ok(outcome??);
            }
        }
    }
    Ok(running.outcome.await??)
}
