//! From settings to a running coordinator: what the store says about the run, then the tasks.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, LocalBoxFuture};
use looptrain_proto::transport::Credentials;
use looptrain_proto::{Digest, Spec, Step};
use looptrain_storage::{Checkpoints, MetricsLog, Retention, Store, run_prefix};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::board::{Board, Tone, unix_ms};
use crate::branch::{self, find_branch};
use crate::claim::{Claim, Found, Past};
use crate::core::{Books, Core, Mark, Resume};
use crate::dashboard::{self, RenderMetrics};
use crate::error::CoordinatorError;
use crate::history::read_history;
use crate::http::{self, Access};
use crate::journal::{Journal, read_chronicle};
use crate::keeper::{Keeper, Owed, read_memory};
use crate::ledger::Ledger;
use crate::listen::{Listen, Tcp};
use crate::lookout::Lookout;
use crate::metrics::Instruments;
use crate::moment::{OnMoment, Watch};
use crate::pruner::Pruner;
use crate::records::{Outcome, RunEvent};
use crate::runtime::Runtime;
use crate::server::{self, Readers, Service};
use crate::trace::Traces;

/// Events that a slow listener may be behind before it loses some.
const EVENT_BACKLOG: usize = 4096;

/// Inputs that may wait for the runtime; sessions wait when it is full.
const INPUT_BACKLOG: usize = 4096;

/// No writer of a run is at one file for so long; what is older was left by one that is dead.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// How long workers get to read their last message and hang up.
const CLOSING_PATIENCE: Duration = Duration::from_secs(3);

/// What a coordinator needs.
pub struct Settings {
    /// The run.
    pub spec: Spec,
    /// Where its durable state is; usually `Store::open(&spec.run.store)`.
    pub store: Store,
    /// Name and digest of each dataset of the spec: what the run is pinned to.
    pub datasets: Vec<(String, Digest)>,
    /// Forget what the store holds of the run, and begin anew; the record's chain stays, so that an
    /// older coordinator of the run learns that it has been replaced.
    pub fresh: bool,
    /// Address for workers; port 0 takes any free one.
    pub listen: SocketAddr,
    /// What this coordinator shows workers and operators, and asks of them; without it nothing is
    /// encrypted, and anybody is believed.
    pub credentials: Option<Arc<Credentials>>,
    /// Address of the status page, when there is to be one.
    pub dashboard: Option<SocketAddr>,
    /// Who may read the page.
    pub access: Access,
    /// Cancelled to stop the run at the next step boundary, with a checkpoint.
    pub stop: CancellationToken,
    /// Stop the run at the boundary after this step, with a checkpoint; it can go on later.
    pub until: Option<Step>,
    /// Renders the process's metrics as Prometheus text, for `/metrics`.
    pub render_metrics: Option<RenderMetrics>,
    /// Called at exact moments of a step; for tests that hurt this process there.
    pub moments: Option<OnMoment>,
}

/// What [`start`] found.
pub enum Started {
    /// The run is under way.
    Running(Running),
    /// The record says that the run is over: nothing listens, no worker is needed.
    Finished(Outcome),
}

/// A running coordinator. Dropping it does not stop it; cancelling [`Settings::stop`] does.
pub struct Running {
    /// Where workers connect.
    pub address: SocketAddr,
    /// Where the status page is.
    pub dashboard: Option<SocketAddr>,
    /// The checkpoint the run goes on from.
    pub resumed_from: Option<Step>,
    /// It has been copied from another run, off which this one begins to branch.
    pub branched: bool,
    /// Why the run holds until an operator has it go on: it was paused when an earlier coordinator ended.
    pub paused: Option<String>,
    /// Newer checkpoints that did not verify, and why.
    pub skipped_checkpoints: Vec<(Step, String)>,
    /// Everything that happens, from the first event on.
    pub events: broadcast::Receiver<RunEvent>,
    /// How the run ends.
    pub outcome: JoinHandle<Result<Outcome, CoordinatorError>>,
}

impl Running {
    /// Waits for the end of the run.
    ///
    /// # Errors
    /// [`CoordinatorError::Failed`] with the run's reason, [`CoordinatorError::Fenced`] when
    /// another coordinator took over, or what the store or the server said.
    pub async fn wait(self) -> Result<Outcome, CoordinatorError> {
        drop(self.events);
        self.outcome.await.unwrap_or_else(|error| {
            Err(CoordinatorError::Failed {
                reason: format!("the coordinator's task died: {error}"),
            })
        })
    }
}

/// Starts the coordinator of a run, or finds that the run is over.
///
/// Instruments are made from the OpenTelemetry global meter: install a provider before this.
///
/// # Errors
/// When the store does not work, holds another run or one on other data under this name, or holds
/// no good checkpoint where there should be one; when an address is taken. Nothing of the run is
/// written or removed before all of that is known to be well.
pub fn start(settings: Settings) -> LocalBoxFuture<'static, Result<Started, CoordinatorError>> {
    start_on(Tcp { credentials: settings.credentials.clone() }, settings)
}

/// Serves whoever comes in.
type Serve = Box<
    dyn FnOnce(
            Service,
            Duration,
            CancellationToken,
        ) -> BoxFuture<'static, Result<(), tonic::transport::Error>>
        + Send,
>;

/// Takes an address, and gives it with who serves there.
type Bind =
    Box<dyn FnOnce(SocketAddr) -> BoxFuture<'static, io::Result<(SocketAddr, Serve)>> + Send>;

/// As [`start`], with workers that come in over another network; the dashboard stays on this one.
///
/// # Errors
/// As [`start`].
pub fn start_on(
    network: impl Listen + Sync + 'static,
    settings: Settings,
) -> LocalBoxFuture<'static, Result<Started, CoordinatorError>> {
    let bind: Bind = Box::new(move |address| {
        let bound = async move {
            let (address, incoming) = network.bind(address).await?;
            let serve: Serve = Box::new(move |service, worker_timeout, shutdown| {
                server::serve(incoming, service, worker_timeout, shutdown).boxed()
            });
            Ok((address, serve))
        };
        bound.boxed()
    });
    // A future behind a pointer is compiled here, and not in each crate that awaits it.
    start_bound(bind, settings).boxed_local()
}

async fn start_bound(bind: Bind, settings: Settings) -> Result<Started, CoordinatorError> {
    let Settings {
        spec,
        store,
        datasets,
        fresh,
        listen,
        credentials,
        dashboard,
        access,
        stop,
        until,
        render_metrics,
        moments,
    } = settings;
    let spec = Arc::new(spec);
    let run = spec.run.name.clone();
    let trajectory = spec.trajectory_digest();
    let claim = Claim { spec: &spec, store: &store, trajectory, datasets: &datasets };

    store.check_writable().await?;
    let (mut manifest, mut skipped_checkpoints) = match fresh {
        true => Past::default(),
        false => match claim.look_back().await? {
            Found::Finished(outcome) => return Ok(Started::Finished(outcome)),
            Found::Past(past) => past,
        },
    };
    if manifest.is_none() {
        find_branch(&store, &spec).await?;
    }
    let (address, serve) = bind(listen).await.map_err(|error| CoordinatorError::Listen {
        what: "workers",
        address: listen,
        error,
    })?;
    let page = match dashboard {
        Some(address) => {
            let what = "the dashboard";
            let bound = http::bind(address).await;
            Some(bound.map_err(|error| CoordinatorError::Listen { what, address, error })?)
        }
        None => None,
    };
    let mut register = match fresh {
        true => claim.take_anew().await?,
        false => claim.take().await?,
    };
    if claim.is_outdated(manifest.as_ref(), register.current()) {
        // The coordinator before did more while its checkpoint was read; now it cannot.
        (manifest, skipped_checkpoints) = match claim.look_back().await? {
            Found::Finished(outcome) => return Ok(Started::Finished(outcome)),
            Found::Past(past) => past,
        };
    }
    let begun = match &manifest {
        None => branch::begin(&store, &spec, &register).await?,
        Some(_) => None,
    };
    let branched = match begun {
        Some(begun) => {
            let noted = register.update(|record| record.last_checkpoint = Some(begun.step)).await;
            noted.map_err(CoordinatorError::of_store)?;
            manifest = Some(begun);
            true
        }
        None => false,
    };
    match store.sweep(&run_prefix(&run), LEFT_BEHIND).await {
        Ok(swept) => tracing::debug!(swept, "removed half-written files of dead writers"),
        Err(error) => tracing::warn!(%error, "half-written files of dead writers stay"),
    }
    let checkpoints = Checkpoints::new(&store, &run);
    if let Some(manifest) = &manifest {
        checkpoints.trust(manifest.step);
    }
    for (step, _) in &skipped_checkpoints {
        checkpoints.distrust(*step);
    }

    let resumed_from = manifest.as_ref().map(|manifest| manifest.step);
    let at = resumed_from.unwrap_or_default();
    // Workers may hold later steps than the checkpoint: whether the log is cut back to it shows
    // when they are here.
    let history = read_history(&store, &run, at).await?;
    let now = unix_ms();
    let chronicle = read_chronicle(&store, &run, now).await?;
    let since = |then: u64| Duration::from_millis(now.saturating_sub(then));
    let mut books = match chronicle.ledger.clone() {
        Some(ledger) => {
            Books { zero: since(ledger.since_unix_ms), away: since(chronicle.kept_unix_ms), ledger }
        }
        None => Books { ledger: Ledger::new(now), ..Books::default() },
    };
    let log = MetricsLog::open(&store, &run, Step(u64::MAX)).await?;
    let logged = history.steps.last().map(|record| record.step).unwrap_or_default();
    // The log may be a little ahead of the ledger.
    books.ledger.highest = books.ledger.highest.max(logged);
    let bequest = match resumed_from.filter(|saved| *saved > logged) {
        Some(saved) => read_memory(&checkpoints, saved).await,
        None => None,
    };
    let paused = register.current().paused.clone();
    let mark = manifest.map(|manifest| Mark {
        step: manifest.step,
        weights_digest: manifest.weights_digest,
        record: history.steps.iter().rfind(|record| record.step == manifest.step).cloned(),
        trend: manifest.trend,
    });
    let resume = Resume {
        incarnation: register.incarnation(),
        checkpoint: mark,
        numerics: register.current().numerics.clone(),
        paused: paused.clone(),
        generation: history.steps.last().map(|record| record.generation).unwrap_or_default(),
        lineage: claim.lineage(register.current()).to_vec(),
        // Nobody comes back to an address that is another one at each start.
        workers_may_return: listen.port() != 0,
        evaluations: history.evaluations.clone(),
        tail: history.steps.iter().filter(|record| record.step > at).cloned().collect(),
        logged,
        bequest,
        books,
    };

    let (input_sender, inputs) = mpsc::channel(INPUT_BACKLOG);
    let (event_sender, events) = broadcast::channel(EVENT_BACKLOG);
    let (notes, note_receiver) = mpsc::unbounded_channel();
    let (entries, entry_receiver) = mpsc::unbounded_channel();
    let board = Arc::new(Board::new(history, chronicle));
    let there = checkpoints.list().await?;
    let damaged = skipped_checkpoints.iter().map(|(step, _)| *step);
    board.checkpoints_are(&there, resumed_from, damaged);
    let text = match resumed_from {
        Some(step) if branched => format!(
            "coordinator {} begins the run at step {step} of run `{}`",
            register.incarnation(),
            spec.branch.as_ref().map(|it| it.run.as_str()).unwrap_or_default()
        ),
        Some(step) => format!(
            "coordinator {} goes on from the checkpoint of step {step}",
            register.incarnation()
        ),
        None => format!("coordinator {} begins the run", register.incarnation()),
    };
    board.note("coordinator_started", text, Tone::Plain);
    if let Some(reason) = &paused {
        board.note("paused", format!("the run is still paused: {reason}"), Tone::Plain);
    }
    let worker_timeout = Duration::from_secs_f64(spec.cluster.worker_timeout);

    let witness = register.witness();
    let (newest, newer) = watch::channel(resumed_from);
    let leave = CancellationToken::new();
    let pruner = Pruner {
        checkpoints: checkpoints.clone(),
        retention: Retention {
            keep: spec.checkpoint.keep,
            keep_every_steps: spec.checkpoint.keep_every_steps,
            grace: Duration::from_secs(spec.checkpoint.orphan_seconds),
        },
        witness: register.witness(),
        newest: newer,
        leave: leave.clone(),
        board: Arc::clone(&board),
    };
    let keeper = Keeper {
        owed: Owed::default(),
        run: run.clone(),
        trajectory,
        register,
        checkpoints,
        inputs: input_sender.clone(),
        newest,
        pruner: tokio::spawn(pruner.run()),
        leave,
    };
    tokio::spawn(keeper.run(note_receiver));
    let lookout = Lookout { store: store.clone(), inputs: input_sender.clone() };
    tokio::spawn(Journal::new(store, run, log, witness, Arc::clone(&board)).run(entry_receiver));

    let readers = Readers::default();
    let shutdown = CancellationToken::new();
    let service = Service::new(
        input_sender.clone(),
        Arc::clone(&readers),
        Arc::clone(&board),
        credentials.is_some(),
    );
    let server = tokio::spawn(serve(service, worker_timeout, shutdown.clone()));
    let dashboard = page.as_ref().map(|(address, _)| *address);
    let page = page.map(|(_, listener)| {
        let app = dashboard::app(input_sender, Arc::clone(&board), render_metrics);
        tokio::spawn(dashboard::serve(listener, app, access, shutdown.clone()))
    });
    let runtime = Runtime {
        core: Core::new(Spec::clone(&spec), resume).stopping_at(until),
        tick: worker_timeout / 8,
        lookout,
        inputs,
        stop,
        notes,
        entries,
        events: event_sender,
        instruments: Instruments::new(&board, &spec),
        board,
        sessions: BTreeMap::new(),
        started: Instant::now(),
        glanced: None,
        traces: Traces::new(spec.telemetry.trace_every_steps),
        watch: moments.map(Watch::new),
    };
    let outcome = tokio::spawn(supervise(runtime, address, server, page, readers, shutdown));
    Ok(Started::Running(Running {
        address,
        dashboard,
        resumed_from,
        branched,
        paused,
        skipped_checkpoints,
        events,
        outcome,
    }))
}

/// Runs the runtime to its end and takes the servers down after it; a server that dies takes the
/// run down.
async fn supervise(
    runtime: Runtime,
    address: SocketAddr,
    mut server: JoinHandle<Result<(), tonic::transport::Error>>,
    page: Option<JoinHandle<()>>,
    readers: Readers,
    shutdown: CancellationToken,
) -> Result<Outcome, CoordinatorError> {
    let result = tokio::select! {
        biased;
        result = runtime.run() => result,
        stopped = &mut server => {
            let detail = match stopped {
                Ok(Ok(())) => "it came to an end by itself".into(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            shutdown.cancel();
            return Err(CoordinatorError::Server { address, detail });
        }
    };
    // Workers that do not hang up in time are cut off.
    let _ = timeout(CLOSING_PATIENCE, readers.closed()).await;
    shutdown.cancel();
    if timeout(CLOSING_PATIENCE, &mut server).await.is_err() {
        server.abort();
    }
    if let Some(page) = page {
        page.abort();
    }
    result
}
