//! The gRPC service: sessions with workers, and what operators may ask.
//!
//! A session is a reader task and a bounded queue of outgoing messages. The reader turns messages
//! into events for the runtime, waiting when the runtime is behind; the runtime never waits for a
//! worker: one whose queue is full does not read, and is lost. Dead connections are found by
//! HTTP/2 pings, dead processes by their connection, frozen ones by missing heartbeats (in the
//! core).

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use looptrain_proto::WorkerId;
use looptrain_proto::transport::{Caller, Complaints, Port, Refusal, Role, innermost};
use looptrain_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use looptrain_proto::v1::{self, coordinator_message, worker_message};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use crate::board::Board;
use crate::core::{Event, Loss, Snapshot, WorkerView};
use crate::ledger::Category;
use crate::reports;
use crate::runtime::Input;

/// Directives that may wait for a worker to read them. A step sends it two or three.
const OUTBOX: usize = 64;

/// How long a new connection may take to introduce itself.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

/// A worker that comes back brings its latest votes, a thousand of them with some numbers for each loop;
/// the rest is much smaller.
const LARGEST_MESSAGE: usize = 16 << 20;

/// Streams of a connection at a time: a session, and what is asked beside it.
const STREAMS: u32 = 16;

/// How long whoever pauses a run, or has it go on, waits until that is in the store.
const KEPT_PATIENCE: Duration = Duration::from_secs(5);

/// How long a worker may take to hang up after its last message.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);

/// One message to a worker, as tonic streams it.
pub(crate) type Outgoing = Result<v1::CoordinatorMessage, Status>;

/// The runtime's end of a session.
#[derive(Debug)]
pub(crate) struct Session {
    outbox: mpsc::Sender<Outgoing>,
    closed: CancellationToken,
}

impl Session {
    /// Queues a message, of a span if there is one; false when the worker does not read, or is gone.
    pub(crate) fn send(&self, kind: coordinator_message::Kind, traceparent: String) -> bool {
        let message = v1::CoordinatorMessage { traceparent, kind: Some(kind) };
        self.outbox.try_send(Ok(message)).is_ok()
    }
}

impl Drop for Session {
    /// The stream ends when its queue is empty; the reader stops listening.
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// Implements the service; cloned by tonic for every connection through an `Arc`.
pub(crate) struct Service {
    inputs: mpsc::Sender<Input>,
    ids: AtomicU64,
    readers: Readers,
    board: Arc<Board>,
    /// Callers have certificates, and do what their role may do.
    secured: bool,
    complaints: Mutex<Complaints>,
}

/// Knows when all sessions are over: each reader task holds a receiver.
pub(crate) type Readers = Arc<watch::Sender<()>>;

impl Service {
    pub(crate) fn new(
        inputs: mpsc::Sender<Input>,
        readers: Readers,
        board: Arc<Board>,
        secured: bool,
    ) -> Self {
        let complaints = Mutex::new(Complaints::new(Port::Coordinator));
        Self { inputs, ids: AtomicU64::new(1), readers, board, secured, complaints }
    }

    /// Whether the caller may do this.
    fn allow<T>(&self, request: &Request<T>, what: &str, roles: &[Role]) -> Result<(), Status> {
        if !self.secured {
            return Ok(());
        }
        let caller = request.extensions().get::<Caller>();
        let identity = caller.and_then(|caller| caller.identity.as_ref());
        if identity.is_some_and(|who| roles.contains(&who.role)) {
            return Ok(());
        }
        let who = identity.map_or_else(|| "nobody".to_owned(), ToString::to_string);
        let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        let reason = format!("{who} may not {what}: that takes the role {}", roles.join(" or "));
        if let Some(from) = caller.and_then(|caller| caller.address) {
            let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
            complaints.note(from, &Refusal::Role(reason.clone()));
        }
        Err(Status::permission_denied(reason))
    }

    async fn snapshot(&self) -> Result<Snapshot, Status> {
        let (reply, snapshot) = oneshot::channel();
        self.inputs.send(Input::Snapshot(reply)).await.map_err(|_| over())?;
        snapshot.await.map_err(|_| over())
    }

    /// Passes an operator's order on; the newest committed step.
    async fn order(&self, order: Event) -> Result<u64, Status> {
        self.inputs.send(Input::Event(order)).await.map_err(|_| over())?;
        Ok(self.snapshot().await?.step.0)
    }

    /// Waits until what was ordered before is in the store; why it is not yet, or nothing.
    async fn kept(&self) -> Result<String, Status> {
        let (reply, kept) = oneshot::channel();
        self.inputs.send(Input::Kept(reply)).await.map_err(|_| over())?;
        match timeout(KEPT_PATIENCE, kept).await {
            Ok(kept) => Ok(kept.map_err(|_| over())?.err().unwrap_or_default()),
            Err(_) => Ok(format!("the store has not answered for {KEPT_PATIENCE:?}")),
        }
    }
}

/// Serves until `shutdown`; then no new calls are taken, and those in flight end.
pub(crate) async fn serve<C>(
    incoming: impl Stream<Item = io::Result<C>>,
    service: Service,
    worker_timeout: Duration,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let service = CoordinatorServer::new(service).max_decoding_message_size(LARGEST_MESSAGE);
    // Whoever connects at the moment of the shutdown is not taken in to be sent away.
    let incoming = incoming.take_until(shutdown.clone().cancelled_owned());
    Server::builder()
        .http2_keepalive_interval(Some(worker_timeout / 2))
        .http2_keepalive_timeout(Some(worker_timeout))
        .max_concurrent_streams(STREAMS)
        .serve_with_incoming_shutdown(service, incoming, shutdown.cancelled_owned())
        .await
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Outgoing> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.allow(&request, "join the run", &[Role::Worker])?;
        let worker = WorkerId(self.ids.fetch_add(1, Ordering::Relaxed));
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let inputs = self.inputs.clone();
        let reading = self.readers.subscribe();
        tokio::spawn(async move {
            read_session(worker, request.into_inner(), outbox, inputs).await;
            drop(reading);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusReply>, Status> {
        self.allow(&request, "see the status", &[Role::Viewer, Role::Operator])?;
        Ok(Response::new(status_reply(self.snapshot().await?, &self.board)))
    }

    async fn stop(
        &self,
        request: Request<v1::StopRequest>,
    ) -> Result<Response<v1::StopReply>, Status> {
        self.allow(&request, "stop the run", &[Role::Operator])?;
        let reason = said(request.into_inner().reason);
        let step = self.order(Event::StopRequested { reason }).await?;
        Ok(Response::new(v1::StopReply { step }))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainReply>, Status> {
        self.allow(&request, "drain a worker", &[Role::Operator])?;
        let v1::DrainRequest { worker: name, reason } = request.into_inner();
        let (reply, answer) = oneshot::channel();
        let drain = Input::Drain { name, reason: said(reason), reply };
        self.inputs.send(drain).await.map_err(|_| over())?;
        let answer = answer.await.map_err(|_| over())?;
        answer.map_err(Status::failed_precondition)?;
        Ok(Response::new(v1::DrainReply {}))
    }

    async fn pause(
        &self,
        request: Request<v1::PauseRequest>,
    ) -> Result<Response<v1::PauseReply>, Status> {
        self.allow(&request, "pause the run", &[Role::Operator])?;
        let reason = said(request.into_inner().reason);
        let step = self.order(Event::PauseRequested { reason }).await?;
        Ok(Response::new(v1::PauseReply { step, not_kept: self.kept().await? }))
    }

    async fn save(
        &self,
        request: Request<v1::SaveRequest>,
    ) -> Result<Response<v1::SaveReply>, Status> {
        self.allow(&request, "have the run saved", &[Role::Operator])?;
        let step = self.order(Event::SaveRequested).await?;
        Ok(Response::new(v1::SaveReply { step }))
    }

    async fn resume(
        &self,
        request: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeReply>, Status> {
        self.allow(&request, "resume the run", &[Role::Operator])?;
        let was_paused = self.snapshot().await?.paused;
        let step = self.order(Event::ResumeRequested).await?;
        let not_kept = self.kept().await?;
        Ok(Response::new(v1::ResumeReply { step, not_kept, was_paused }))
    }
}

/// The reason an operator gave.
fn said(reason: String) -> String {
    if reason.is_empty() { "an operator asked for it".to_owned() } else { reason }
}

fn over() -> Status {
    Status::unavailable("the run is over and its coordinator is going away")
}

/// The life of a session, from its first message to its end.
async fn read_session(
    worker: WorkerId,
    mut incoming: Streaming<v1::WorkerMessage>,
    outbox: mpsc::Sender<Outgoing>,
    inputs: mpsc::Sender<Input>,
) {
    let first = match timeout(JOIN_PATIENCE, incoming.message()).await {
        Ok(Ok(Some(message))) => message.kind,
        Ok(Ok(None) | Err(_)) => return,
        Err(_) => None,
    };
    let Some(worker_message::Kind::Join(join)) = first else {
        let reason =
            format!("a session starts with a Join, within {} seconds", JOIN_PATIENCE.as_secs());
        let kind = Some(coordinator_message::Kind::Refused(v1::Refused { reason, for_now: false }));
        // The worker may be gone; then there is nobody to tell.
        let refused = v1::CoordinatorMessage { traceparent: String::new(), kind };
        let _ = outbox.send(Ok(refused)).await;
        return drain(incoming).await;
    };
    let closed = CancellationToken::new();
    let session = Session { outbox, closed: closed.clone() };
    if inputs.send(Input::Open { worker, join, session }).await.is_err() {
        return;
    }
    let reason = loop {
        let message = tokio::select! {
            biased;
            () = closed.cancelled() => return drain(incoming).await,
            message = incoming.message() => message,
        };
        let event = match message {
            Ok(Some(message)) => match reports::report(message) {
                Ok(report) => Event::Report { worker, report },
                Err(malformed) => break format!("it sent {malformed}"),
            },
            Ok(None) => break "it closed its session".to_owned(),
            Err(status) => break format!("its connection broke: {}", innermost(&status)),
        };
        if inputs.send(Input::Event(event)).await.is_err() {
            return;
        }
    };
    // Fails only when the run is over, and then the loss does not matter.
    let _ = inputs.send(Input::Event(Event::Lost(vec![Loss::broken(worker, reason)]))).await;
}

/// Lets the worker read its last message and hang up by itself: hanging up first could cut that
/// message off.
async fn drain(mut incoming: Streaming<v1::WorkerMessage>) {
    let hung_up = async { while let Ok(Some(_)) = incoming.message().await {} };
    let _ = timeout(FAREWELL_PATIENCE, hung_up).await;
}

/// Events that an operator is told.
const STATUS_EVENTS: usize = 50;

fn status_reply(snapshot: Snapshot, board: &Board) -> v1::StatusReply {
    let learning_rate = snapshot.last.as_ref().map(|last| last.lr);
    let mfu = snapshot.last.as_ref().and_then(|last| last.mfu);
    let event = |entry: crate::board::Entry| v1::StatusEvent {
        unix_ms: entry.unix_ms,
        kind: entry.kind,
        text: entry.text,
        tone: entry.tone.name().to_owned(),
    };
    let goodput = board.of_ledger(|ledger| {
        let seconds = |category: Category| v1::CategorySeconds {
            category: category.name().to_owned(),
            seconds: ledger.seconds(category),
        };
        Category::ALL.map(seconds).to_vec()
    });
    let statistics = snapshot.last.map(|last| v1::StepStatistics {
        loss: last.loss,
        loss_per_loop: last.loss_per_loop,
        exit_pdf: last.exit_pdf,
        entropy: last.entropy,
        grad_norm: last.grad_norm,
        tokens: last.step_tokens,
        bad_slots: last.bad_slots,
        hidden_rms_per_loop: last.hidden_rms_per_loop,
        gradient_norm_per_loop: last.gradient_norm_per_loop,
        agreement_per_loop: last.agreement_per_loop,
        spike: String::new(),
        trend: last.trend,
    });
    let worker = |view: WorkerView| v1::WorkerStatus {
        worker_id: view.id.0,
        name: view.name,
        host: view.host,
        rank: view.rank.map(|rank| rank.0),
        slots: view.slots,
        sections: Some(view.sections.into()),
        seconds_since_heard: view.seconds_since_heard,
        slots_per_second: view.slots_per_second.unwrap_or_default(),
        straggles_in: view.straggles_in.map(|section| section.to_string()).unwrap_or_default(),
        warm: view.warm,
    };
    v1::StatusReply {
        run: snapshot.run,
        incarnation: snapshot.incarnation.0,
        generation: snapshot.generation.0,
        step: snapshot.step.0,
        total_steps: snapshot.total_steps.0,
        phase: snapshot.phase.to_owned(),
        reason: snapshot.reason,
        workers: snapshot.workers.into_iter().map(worker).collect(),
        statistics,
        checkpoint_step: snapshot.checkpoint_step.map_or(0, |step| step.0),
        tokens_per_second: snapshot.tokens_per_second,
        tokens: snapshot.tokens,
        learning_rate,
        mfu,
        saving_step: snapshot.saving_step.map(|step| step.0),
        goodput: goodput.unwrap_or_default(),
        events: board.events(STATUS_EVENTS).into_iter().map(event).collect(),
        losses: board.losses(),
        protocol_version: looptrain_proto::PROTOCOL_VERSION,
    }
}
