//! What is known of a run, from its coordinator or from its store: the one thing that all forms of
//! `looptrain status` show.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use looptrain_proto::transport::{Role, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{StatusReply, StatusRequest, WorkerStatus};
use looptrain_storage::{Checkpoints, Store, read_newest_metrics, read_record};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::cli::TlsArgs;
use crate::commands::orders::connect;

/// Losses of a run in the store that are shown.
const LOSSES: usize = 120;

/// Events of a run in the store that are shown.
const EVENTS: usize = 50;

/// How long a coordinator may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// One run.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct View {
    pub(super) run: String,
    pub(super) phase: String,
    pub(super) reason: String,
    pub(super) incarnation: u64,
    /// What follows is not known of every run; the store does not say all that a coordinator does.
    pub(super) generation: Option<u64>,
    pub(super) step: u64,
    pub(super) total_steps: Option<u64>,
    pub(super) tokens: u64,
    pub(super) tokens_per_second: Option<f64>,
    pub(super) loss: Option<f64>,
    pub(super) loss_per_loop: Vec<f64>,
    pub(super) exit_pdf: Vec<f64>,
    pub(super) learning_rate: Option<f64>,
    pub(super) grad_norm: Option<f64>,
    pub(super) mfu: Option<f64>,
    pub(super) checkpoint_step: Option<u64>,
    pub(super) saving_step: Option<u64>,
    /// Those in the store, ascending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) checkpoints: Option<Vec<u64>>,
    pub(super) workers: Vec<Worker>,
    /// Seconds of all workers by what became of them.
    pub(super) goodput: BTreeMap<String, f64>,
    /// Newest first.
    pub(super) events: Vec<Event>,
    /// Of some of the latest steps, in order.
    pub(super) losses: Vec<f64>,
}

/// A worker with a session.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Worker {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) host: String,
    pub(super) rank: Option<u32>,
    pub(super) warm: bool,
    pub(super) slots: u32,
    pub(super) slots_per_second: f64,
    /// Seconds of the sections of its newest step.
    pub(super) data_wait: f64,
    pub(super) compute: f64,
    pub(super) reduce: f64,
    pub(super) optimizer: f64,
    pub(super) straggles_in: String,
    pub(super) seconds_since_heard: f64,
}

/// Something that happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Event {
    pub(super) unix_ms: u64,
    pub(super) kind: String,
    pub(super) text: String,
    /// good, bad or plain
    pub(super) tone: String,
}

impl View {
    /// The productive share of all workers' time.
    pub(super) fn goodput_share(&self) -> Option<f64> {
        let total: f64 = self.goodput.values().sum();
        let productive = self.goodput.get("productive").copied().unwrap_or_default();
        (total > 0.0).then(|| productive / total)
    }

    /// Whether nothing will happen any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase.as_str(), "finished" | "failed")
    }
}

/// Where a view comes from.
pub(super) enum Source {
    Live { url: String, tls: TlsArgs, client: CoordinatorClient<Channel> },
    Stored { store: Store, url: String, run: String },
}

impl Source {
    /// A coordinator that is there.
    pub(super) async fn live(url: &str, tls: &TlsArgs) -> Result<Self> {
        let connecting = connect(url, tls, &[Role::Viewer, Role::Operator]);
        let connected = timeout(PATIENCE, connecting).await;
        let cannot = || format!("cannot reach a coordinator at {url}");
        let client = connected.context("it does not answer").with_context(cannot)??;
        Ok(Self::Live { url: url.to_owned(), tls: tls.clone(), client })
    }

    /// What the store says.
    pub(super) fn stored(url: &str, run: &str) -> Result<Self> {
        let store = Store::open_existing(url)?;
        Ok(Self::Stored { store, url: url.to_owned(), run: run.to_owned() })
    }

    /// Time between two looks.
    pub(super) fn every(&self) -> Duration {
        match self {
            Self::Live { .. } => Duration::from_secs(1),
            Self::Stored { .. } => Duration::from_secs(10),
        }
    }

    /// Looks.
    pub(super) async fn view(&mut self) -> Result<View> {
        match self {
            Self::Live { url, client, .. } => {
                let reply = timeout(PATIENCE, client.status(StatusRequest {})).await;
                let silent = || format!("the coordinator at {url} does not answer");
                let reply = reply.with_context(silent)?;
                let reply = reply.map_err(|status| match status.source() {
                    Some(_) => anyhow::anyhow!("{}: {}", silent(), innermost(&status)),
                    None => anyhow::anyhow!("{}: {}", silent(), status.message()),
                })?;
                Ok(told(reply.into_inner()))
            }
            Self::Stored { store, url, run } => stored(store, url, run).await,
        }
    }
}

pub(super) fn told(reply: StatusReply) -> View {
    let known = reply.statistics.is_some();
    let statistics = reply.statistics.unwrap_or_default();
    let event = |event: looptrain_proto::v1::StatusEvent| Event {
        unix_ms: event.unix_ms,
        kind: event.kind,
        text: event.text,
        tone: event.tone,
    };
    View {
        run: reply.run,
        phase: reply.phase,
        reason: reply.reason,
        incarnation: reply.incarnation,
        generation: Some(reply.generation),
        step: reply.step,
        total_steps: Some(reply.total_steps),
        tokens: reply.tokens,
        tokens_per_second: Some(reply.tokens_per_second),
        loss: known.then_some(statistics.loss),
        loss_per_loop: statistics.loss_per_loop,
        exit_pdf: statistics.exit_pdf,
        learning_rate: reply.learning_rate,
        grad_norm: known.then_some(statistics.grad_norm),
        mfu: reply.mfu,
        checkpoint_step: Some(reply.checkpoint_step).filter(|step| *step > 0),
        saving_step: reply.saving_step,
        checkpoints: None,
        workers: reply.workers.into_iter().map(worker).collect(),
        goodput: reply.goodput.into_iter().map(|it| (it.category, it.seconds)).collect(),
        events: reply.events.into_iter().map(event).collect(),
        losses: reply.losses,
    }
}

fn worker(status: WorkerStatus) -> Worker {
    let sections = status.sections.unwrap_or_default();
    Worker {
        id: status.worker_id,
        name: status.name,
        host: status.host,
        rank: status.rank,
        warm: status.warm,
        slots: status.slots,
        slots_per_second: status.slots_per_second,
        data_wait: sections.data_wait,
        compute: sections.compute,
        reduce: sections.reduce,
        optimizer: sections.optimizer,
        straggles_in: status.straggles_in,
        seconds_since_heard: status.seconds_since_heard,
    }
}

async fn stored(store: &Store, url: &str, run: &str) -> Result<View> {
    let Some(record) = read_record(store, run).await? else {
        bail!("there is no run `{run}` in {url}");
    };
    let lines = read_newest_metrics(store, run, LOSSES).await?;
    let last = lines.last().cloned().unwrap_or(Value::Null);
    let checkpoints = Checkpoints::new(store, run).list().await?;
    let checkpoints: Vec<u64> = checkpoints.into_iter().map(|step| step.0).collect();
    let chronicle = looptrain_coordinator::read_chronicle_json(store, run).await;
    let number = |key: &str| last[key].as_f64();
    let numbers = |key: &str| -> Vec<f64> {
        let all = last[key].as_array().into_iter().flatten();
        all.map(|value| value.as_f64().unwrap_or(f64::NAN)).collect()
    };
    let unknown =
        "the store does not say whether a coordinator is running; ask it with --coordinator";
    let (phase, reason) = match (&record.finished, &record.paused) {
        (Some(_), _) => ("finished", "the record says so".to_owned()),
        (None, Some(why)) => {
            ("unknown", format!("paused, until `looptrain resume`: {why}; {unknown}"))
        }
        (None, None) => ("unknown", unknown.to_owned()),
    };
    let events = Vec::<Event>::deserialize(&chronicle["events"]).unwrap_or_default();
    let goodput = BTreeMap::deserialize(&chronicle["ledger"]["seconds"]).unwrap_or_default();
    Ok(View {
        run: run.to_owned(),
        phase: phase.to_owned(),
        reason,
        incarnation: record.incarnation.0,
        generation: last["generation"].as_u64(),
        step: last["step"].as_u64().unwrap_or_default(),
        tokens: last["tokens"].as_u64().unwrap_or_default(),
        loss: number("loss"),
        loss_per_loop: numbers("loss_per_loop"),
        exit_pdf: numbers("exit_pdf"),
        learning_rate: number("lr"),
        grad_norm: number("grad_norm"),
        mfu: number("mfu"),
        checkpoint_step: checkpoints.last().copied(),
        checkpoints: Some(checkpoints),
        goodput,
        events: events.into_iter().take(EVENTS).collect(),
        losses: lines.iter().filter_map(|line| line["loss"].as_f64()).collect(),
        ..View::default()
    })
}
