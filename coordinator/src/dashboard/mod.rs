//! The status page and its JSON: `/`, `/api/status`, `/api/steps?after=N`, `/metrics`.
//!
//! Read only. The page is one file without a build step or anything from elsewhere; it polls the
//! JSON, which scripts may read as well.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use looptrain_proto::Step;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::board::{Board, Recent};
use crate::core::Snapshot;
use crate::runtime::Input;

/// Renders the process's metrics as Prometheus text.
pub type RenderMetrics = Arc<dyn Fn() -> String + Send + Sync>;

/// Steps per reply of `/api/steps`; readers ask again behind the last one.
const STEPS_PER_REPLY: usize = 2000;

const PAGE: &str = include_str!("page.html");

#[derive(Clone)]
struct Sources {
    inputs: mpsc::Sender<Input>,
    board: Arc<Board>,
    render_metrics: Option<RenderMetrics>,
}

/// The dashboard's routes.
pub(crate) fn app(
    inputs: mpsc::Sender<Input>,
    board: Arc<Board>,
    render_metrics: Option<RenderMetrics>,
) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/api/status", get(status))
        .route("/api/steps", get(steps))
        .route("/metrics", get(metrics))
        .with_state(Sources { inputs, board, render_metrics })
}

/// Serves until `shutdown`.
pub(crate) async fn serve(listener: TcpListener, app: Router, shutdown: CancellationToken) {
    let served =
        axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::warn!(%error, "the dashboard stopped; training goes on without it");
    }
}

async fn page() -> Html<&'static str> {
    Html(PAGE)
}

#[derive(Serialize)]
struct StatusReply {
    #[serde(flatten)]
    snapshot: Snapshot,
    #[serde(flatten)]
    recent: Recent,
}

async fn status(State(sources): State<Sources>) -> Response {
    let (reply, snapshot) = oneshot::channel();
    // When the runtime is gone the reply is dropped, and the answer below says so.
    let _ = sources.inputs.send(Input::Snapshot(reply)).await;
    match snapshot.await {
        Ok(snapshot) => {
            Json(StatusReply { snapshot, recent: sources.board.recent() }).into_response()
        }
        Err(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, "the run is over and its coordinator is going away")
                .into_response()
        }
    }
}

/// Steps behind `after`, from the first one without it; of those long past not every one.
async fn steps(State(sources): State<Sources>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let after = query.split('&').find_map(|pair| pair.strip_prefix("after=")).unwrap_or("0");
    match after.parse() {
        Ok(after) => Json(sources.board.steps(Step(after), STEPS_PER_REPLY)).into_response(),
        Err(_) => (StatusCode::BAD_REQUEST, "`after` is the number of a step").into_response(),
    }
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
