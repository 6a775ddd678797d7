//! What is known of a run, from its coordinator or from its store: the one thing that all forms of
//! `looptrain status` show.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use looptrain_proto::Spec;
use looptrain_proto::transport::{Role, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{StatusReply, StatusRequest, WorkerStatus};
use looptrain_storage::{Checkpoints, RunRecord, Store, read_newest_metrics, read_record};
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

/// Runs that are looked at at a time.
const READERS: usize = 8;

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
        matches!(self.phase.as_str(), "finished" | "failed" | "stopped")
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

/// A coordinator that is at work writes into the store at least this often.
const SILENCE: Duration = Duration::from_secs(150);

/// What the store says of a run's coordinator: how it ended, or when it last wrote.
fn phase_of(
    record: &RunRecord,
    newest: Option<&Event>,
    silent: Option<Duration>,
) -> (&'static str, String) {
    if record.finished.is_some() {
        return ("finished", "the record says so".to_owned());
    }
    let mut said = match newest.map(|event| (event.kind.as_str(), &event.text)) {
        Some(("failed", text)) => return ("failed", text.clone()),
        Some(("finished", text)) => return ("stopped", text.clone()),
        _ => String::new(),
    };
    if let Some(why) = &record.paused {
        said = format!("paused, until `looptrain resume`: {why}; ");
    }
    match silent {
        Some(silent) if silent <= SILENCE => {
            let seconds = silent.as_secs();
            (
                "running",
                format!("{said}its coordinator wrote {seconds} s ago; --coordinator asks it"),
            )
        }
        Some(silent) => {
            let minutes = silent.as_secs() / 60;
            (
                "silent",
                format!(
                    "{said}no coordinator has written for {minutes} min, nor said that it ends"
                ),
            )
        }
        None => ("silent", format!("{said}no coordinator has written more than its claim")),
    }
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// All runs of a store, by name.
pub(super) async fn all(url: &str) -> Result<Vec<View>> {
    let store = Store::open_existing(url)?;
    let runs = store.folders("runs").await?;
    let reads = runs.iter().map(|run| async {
        let read = match read_record(&store, run).await {
            // A folder that somebody has made is no run.
            Ok(None) => return None,
            Ok(Some(_)) => stored(&store, url, run).await,
            Err(error) => Err(error.into()),
        };
        // The others are shown all the same.
        Some(read.unwrap_or_else(|error| View {
            run: run.clone(),
            phase: "unreadable".into(),
            reason: format!("{error:#}"),
            ..View::default()
        }))
    });
    let views: Vec<Option<View>> = futures::stream::iter(reads).buffered(READERS).collect().await;
    Ok(views.into_iter().flatten().collect())
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
    let events = Vec::<Event>::deserialize(&chronicle["events"]).unwrap_or_default();
    let kept = chronicle["kept_unix_ms"].as_u64();
    let silent = kept.map(|kept| Duration::from_millis(now_unix_ms().saturating_sub(kept)));
    let (phase, reason) = phase_of(&record, events.first(), silent);
    let total = Spec::parse("the run record", &record.spec, &[]).ok().map(|it| it.total_steps().0);
    let goodput = BTreeMap::deserialize(&chronicle["ledger"]["seconds"]).unwrap_or_default();
    Ok(View {
        run: run.to_owned(),
        phase: phase.to_owned(),
        reason,
        incarnation: record.incarnation.0,
        generation: last["generation"].as_u64(),
        step: last["step"].as_u64().unwrap_or_default(),
        total_steps: total,
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

#[cfg(test)]
mod tests {
    use looptrain_proto::{Digest, Step};
    use looptrain_storage::Finished;

    use super::*;

    #[test]
    fn the_store_tells_how_a_run_ended_or_when_its_coordinator_last_wrote() {
        let event = |kind: &str| Event {
            unix_ms: 1,
            kind: kind.into(),
            text: format!("{kind}: why"),
            tone: "plain".into(),
        };
        let mut record = RunRecord::new(Digest::of(b"spec"), String::new(), &[]);
        let soon = Some(Duration::from_secs(4));
        let phase = |record: &RunRecord, kind: &str, silent| {
            let (phase, reason) = phase_of(record, Some(&event(kind)), silent);
            (phase, reason.contains("why"))
        };
        assert_eq!(phase(&record, "failed", soon), ("failed", true));
        assert_eq!(phase(&record, "finished", soon), ("stopped", true));
        assert_eq!(phase(&record, "formed", soon), ("running", false));
        assert_eq!(phase(&record, "formed", Some(Duration::from_secs(600))), ("silent", false));
        assert_eq!(phase(&record, "formed", None), ("silent", false));
        record.paused = Some("why".into());
        assert_eq!(phase(&record, "formed", soon), ("running", true));
        let (step, weights_digest) = (Step(9), Digest::of(b"weights"));
        record.finished = Some(Finished { step, weights_digest, loss: 1.0 });
        assert_eq!(phase(&record, "failed", soon).0, "finished");
    }
}
