//! The status page and its JSON: `/`, `/api/status`, `/api/steps?after=N`, `/api/live`, `/metrics`.
//!
//! Read only. The page (`page.html`, its style and its modules) has no build step and needs nothing
//! from elsewhere; what changes reaches it as server-sent events, whose JSON scripts may ask for as well.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use looptrain_proto::Step;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use crate::board::{Board, Recent};
use crate::core::Snapshot;
use crate::http::{self, Access};
use crate::runtime::Input;

/// Renders the process's metrics as Prometheus text.
pub type RenderMetrics = Arc<dyn Fn() -> String + Send + Sync>;

/// Steps per reply of `/api/steps`; readers ask again behind the last one.
const STEPS_PER_REPLY: usize = 2000;

/// A live reader is told at most this often.
const LIVE_AT_MOST: Duration = Duration::from_secs(1);

/// A live reader is told at least this often, so that it knows that the coordinator is there.
const LIVE_AT_LEAST: Duration = Duration::from_secs(5);

/// Live readers at a time.
const LIVE_READERS: usize = 64;

const PAGE: &str = include_str!("page.html");

/// What the page is made of besides.
const PARTS: [(&str, &str, &str); 9] = [
    ("/page.css", "text/css", include_str!("page.css")),
    ("/page.js", SCRIPT, include_str!("page.js")),
    ("/live.js", SCRIPT, include_str!("live.js")),
    ("/state.js", SCRIPT, include_str!("state.js")),
    ("/parts.js", SCRIPT, include_str!("parts.js")),
    ("/charts.js", SCRIPT, include_str!("charts.js")),
    ("/curves.js", SCRIPT, include_str!("curves.js")),
    ("/timeline.js", SCRIPT, include_str!("timeline.js")),
    ("/tables.js", SCRIPT, include_str!("tables.js")),
];

const SCRIPT: &str = "text/javascript";

#[derive(Clone)]
struct Sources {
    inputs: mpsc::Sender<Input>,
    board: Arc<Board>,
    render_metrics: Option<RenderMetrics>,
    /// Places of live readers that are free.
    places: Arc<Semaphore>,
}

/// The dashboard's routes.
pub(crate) fn app(
    inputs: mpsc::Sender<Input>,
    board: Arc<Board>,
    render_metrics: Option<RenderMetrics>,
) -> Router {
    let part = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind)], text) })
    };
    PARTS
        .into_iter()
        .fold(Router::new(), |app, (path, kind, text)| app.route(path, part(kind, text)))
        .route("/", get(page))
        .route("/api/status", get(status))
        .route("/api/steps", get(steps))
        .route("/api/live", get(live))
        .route("/metrics", get(metrics))
        .with_state(Sources {
            inputs,
            board,
            render_metrics,
            places: Arc::new(Semaphore::new(LIVE_READERS)),
        })
}

/// Serves until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    access: Access,
    shutdown: CancellationToken,
) {
    if let Err(error) = http::serve(listener, app, access, shutdown).await {
        tracing::warn!(%error, "the dashboard stopped; training goes on without it");
    }
}

async fn page() -> Html<&'static str> {
    Html(PAGE)
}

#[derive(Serialize)]
struct StatusReply<'a> {
    #[serde(flatten)]
    snapshot: &'a Snapshot,
    #[serde(flatten)]
    recent: Recent,
}

impl Sources {
    /// How things are; `None` when the run is over.
    async fn snapshot(&self) -> Option<Snapshot> {
        let (reply, snapshot) = oneshot::channel();
        // When the runtime is gone the reply is dropped.
        let _ = self.inputs.send(Input::Snapshot(reply)).await;
        snapshot.await.ok()
    }
}

async fn status(State(sources): State<Sources>) -> Response {
    match sources.snapshot().await {
        Some(snapshot) => {
            let recent = sources.board.recent();
            Json(StatusReply { snapshot: &snapshot, recent }).into_response()
        }
        None => {
            (StatusCode::SERVICE_UNAVAILABLE, "the run is over and its coordinator is going away")
                .into_response()
        }
    }
}

/// What a query says after `after=` is no step.
struct NoStep;

impl IntoResponse for NoStep {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, "`after` is the number of a step").into_response()
    }
}

/// The step that a reader has; `None` when it does not say.
fn after(query: Option<String>) -> Result<Option<Step>, NoStep> {
    let query = query.unwrap_or_default();
    let Some(after) = query.split('&').find_map(|pair| pair.strip_prefix("after=")) else {
        return Ok(None);
    };
    after.parse().map(|step| Some(Step(step))).map_err(|_| NoStep)
}

/// Steps behind `after`, from the first one without it; of those long past not every one.
async fn steps(State(sources): State<Sources>, RawQuery(query): RawQuery) -> Response {
    match after(query) {
        Ok(after) => {
            Json(sources.board.steps(after.unwrap_or_default(), STEPS_PER_REPLY)).into_response()
        }
        Err(wrong) => wrong.into_response(),
    }
}

/// What a live reader has been told.
struct Live {
    sources: Sources,
    changes: watch::Receiver<u64>,
    /// The newest step that it has.
    newest: Step,
    rewinds: u64,
    told: Option<Instant>,
    queued: VecDeque<Event>,
    /// One of the places for readers.
    _place: OwnedSemaphorePermit,
}

impl Live {
    /// The next event; `None` when the run is over.
    async fn next(&mut self) -> Option<Event> {
        while self.queued.is_empty() {
            if let Some(told) = self.told {
                sleep_until(told + LIVE_AT_MOST).await;
                // Whether it has changed or not.
                let _ = timeout(LIVE_AT_LEAST - LIVE_AT_MOST, self.changes.changed()).await;
            }
            self.changes.mark_unchanged();
            // As the board saw it last: many readers are no work for who commits steps.
            let snapshot = match self.sources.board.glance() {
                Some(snapshot) if !self.sources.inputs.is_closed() => snapshot,
                _ => Arc::new(self.sources.snapshot().await?),
            };
            let recent = self.sources.board.recent();
            let status = StatusReply { snapshot: &snapshot, recent };
            self.told = Some(Instant::now());
            self.queued.extend(Event::default().event("status").json_data(status).ok());
            let rewinds = self.sources.board.rewinds();
            if std::mem::replace(&mut self.rewinds, rewinds) != rewinds {
                // The reader asks for all steps again.
                self.newest = self.sources.board.newest_step();
            }
            let steps = self.sources.board.steps(self.newest, STEPS_PER_REPLY);
            if let Some(last) = steps.last() {
                self.newest = last.step;
                self.queued.extend(Event::default().event("steps").json_data(steps).ok());
            }
        }
        self.queued.pop_front()
    }
}

/// Server-sent events: `status` as at `/api/status`, and `steps` for those that are new since `after`,
/// or since now.
async fn live(State(sources): State<Sources>, RawQuery(query): RawQuery) -> Response {
    let newest = match after(query) {
        Ok(after) => after.unwrap_or_else(|| sources.board.newest_step()),
        Err(wrong) => return wrong.into_response(),
    };
    let (changes, rewinds) = (sources.board.follow(), sources.board.rewinds());
    let Ok(place) = Arc::clone(&sources.places).try_acquire_owned() else {
        let reason = "too many read this already; ask /api/status now and then";
        return (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
    };
    let (told, queued) = (None, VecDeque::new());
    let live = Live { sources, changes, newest, rewinds, told, queued, _place: place };
    Sse::new(stream(live)).keep_alive(KeepAlive::default()).into_response()
}

fn stream(live: Live) -> impl Stream<Item = Result<Event, Infallible>> {
    futures::stream::unfold(live, |mut live| async move {
        let event = live.next().await?;
        Some((Ok(event), live))
    })
}

async fn metrics(State(sources): State<Sources>) -> Response {
    match sources.render_metrics {
        Some(render) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (kind, render()).into_response()
        }
        None => {
            let remedy = "this process has no metrics exporter; start it through `looptrain`";
            (StatusCode::NOT_FOUND, remedy).into_response()
        }
    }
}
