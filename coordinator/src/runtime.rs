//! Around the core: one task that owns it, feeds it events one at a time, and executes its
//! actions in order. It never waits for a worker or the store; their answers come back as events.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::{WorkerId, v1};
use looptrain_storage::Finished;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::board::Board;
use crate::core::{Action, Core, Event, Loss, Report, Snapshot};
use crate::error::CoordinatorError;
use crate::journal::Entry;
use crate::keeper::Note;
use crate::lookout::Lookout;
use crate::metrics::Instruments;
use crate::moment::Watch;
use crate::records::{Outcome, RunEvent};
use crate::server::Session;
use crate::trace::Traces;

/// The board sees how things are at most this often, beside ticks.
const GLANCE_EVERY: Duration = Duration::from_millis(500);

/// Everything that reaches the runtime's task.
#[derive(Debug)]
pub(crate) enum Input {
    /// A worker introduced itself.
    Open { worker: WorkerId, join: v1::Join, session: Session },
    /// Something for the core.
    Event(Event),
    /// Somebody wants a worker to leave; the answer is why it may not.
    Drain { name: String, reason: String, reply: oneshot::Sender<Result<(), String>> },
    /// Somebody wants to know whether what was noted before is in the store.
    Kept(oneshot::Sender<Result<(), String>>),
    /// Somebody wants to know how things are.
    Snapshot(oneshot::Sender<Snapshot>),
    /// This process must not go on.
    Abort(CoordinatorError),
}

/// Losses that are dealt with as one.
const LOSSES: usize = 4096;

/// The losses that an event tells of, or the event.
fn loss_of(event: Event) -> Result<Vec<Loss>, Box<Event>> {
    match event {
        Event::Lost(losses) => Ok(losses),
        Event::Report { worker, report: Report::Leave { reason } } => {
            Ok(vec![Loss::left(worker, &reason)])
        }
        other => Err(Box::new(other)),
    }
}

/// What has been taken already, or else the next input.
async fn next_of(taken: &mut Option<Input>, inputs: &mut mpsc::Receiver<Input>) -> Option<Input> {
    match taken.take() {
        Some(input) => Some(input),
        None => inputs.recv().await,
    }
}

/// The task's state.
pub(crate) struct Runtime {
    pub(crate) core: Core,
    pub(crate) tick: Duration,
    pub(crate) inputs: mpsc::Receiver<Input>,
    pub(crate) stop: CancellationToken,
    pub(crate) lookout: Lookout,
    pub(crate) notes: mpsc::UnboundedSender<Note>,
    pub(crate) entries: mpsc::UnboundedSender<Entry>,
    pub(crate) events: broadcast::Sender<RunEvent>,
    pub(crate) board: Arc<Board>,
    pub(crate) instruments: Instruments,
    pub(crate) sessions: BTreeMap<WorkerId, Session>,
    pub(crate) started: Instant,
    /// When the board last saw how things are.
    pub(crate) glanced: Option<Instant>,
    /// When there is a tracer.
    pub(crate) traces: Option<Traces>,
    /// Somebody wants to know of exact moments.
    pub(crate) watch: Option<Watch>,
}

impl Runtime {
    /// Runs until the core ends the run.
    pub(crate) async fn run(mut self) -> Result<Outcome, CoordinatorError> {
        let mut tick = interval(self.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stopping = false;
        // Taken from the inputs, and not dealt with yet.
        let mut next = None;
        let result = loop {
            let event = tokio::select! {
                // Here and elsewhere: what happens at the same time happens in the same order, so
                // that a simulation can be repeated. Ticks are rare and starve nobody.
                biased;
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    Event::StopRequested { reason: "the coordinator was told to stop".into() }
                }
                _ = tick.tick() => {
                    self.glanced = None;
                    Event::Tick
                }
                input = next_of(&mut next, &mut self.inputs) => match input {
                    Some(Input::Open { worker, join, session }) => {
                        self.sessions.insert(worker, session);
                        Event::Joined { worker, join }
                    }
                    Some(Input::Event(event)) => self.with_its_like(event, &mut next),
                    Some(Input::Drain { name, reason, reply }) => {
                        let found = self.core.drainable(&name);
                        // Whoever asked may have hung up.
                        let _ = reply.send(found.clone().map(drop));
                        match found {
                            Ok(worker) => Event::DrainRequested { worker, reason },
                            Err(_) => continue,
                        }
                    }
                    Some(Input::Kept(reply)) => {
                        self.note(Note::Kept(reply));
                        continue;
                    }
                    Some(Input::Snapshot(reply)) => {
                        // Whoever asked may have hung up.
                        let _ = reply.send(self.core.snapshot(self.started.elapsed()));
                        continue;
                    }
                    Some(Input::Abort(error)) => break Err(error),
                    None => continue,
                },
            };
            let ended = self.feed(event);
            if ended.is_some() || self.glanced.is_none_or(|last| last.elapsed() >= GLANCE_EVERY) {
                self.glance();
            }
            if let Some(result) = ended {
                break result.map_err(|reason| CoordinatorError::Failed { reason });
            }
        };
        self.sessions.clear();
        self.make_durable(result).await
    }

    /// A loss together with those that wait right behind it: when many go at once, the others form one
    /// generation and not one for each. What comes next that is none goes into `next`.
    fn with_its_like(&mut self, event: Event, next: &mut Option<Input>) -> Event {
        let mut losses = match loss_of(event) {
            Ok(losses) => losses,
            Err(event) => return *event,
        };
        while losses.len() < LOSSES {
            match self.inputs.try_recv() {
                Ok(Input::Event(event)) => match loss_of(event) {
                    Ok(more) => losses.extend(more),
                    Err(other) => {
                        *next = Some(Input::Event(*other));
                        break;
                    }
                },
                Ok(other) => {
                    *next = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        Event::Lost(losses)
    }

    /// Feeds the core one event, and those that follow from executing its actions.
    fn feed(&mut self, event: Event) -> Option<Result<Outcome, String>> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if let Some(watch) = &mut self.watch {
                watch.hear(&event);
            }
            if let Some(traces) = &mut self.traces {
                traces.hear(&event);
            }
            let mut deaf = Vec::new();
            for action in self.core.handle(self.started.elapsed(), event) {
                if let Some(watch) = &mut self.watch {
                    watch.before(&action);
                }
                let traceparent = match &mut self.traces {
                    Some(traces) => traces.before(&action),
                    None => String::new(),
                };
                match action {
                    Action::Send { worker, message } => {
                        let session = self.sessions.get(&worker);
                        if session.is_some_and(|session| !session.send(message, traceparent)) {
                            self.sessions.remove(&worker);
                            deaf.push(Loss::broken(worker, "it does not read its messages"));
                        }
                    }
                    Action::Close { worker } => {
                        self.sessions.remove(&worker);
                    }
                    Action::Publish(event) => self.publish(event),
                    Action::PinNumerics { numerics } => self.note(Note::Numerics(numerics)),
                    Action::KeepPause(reason) => self.note(Note::Pause(reason)),
                    Action::GoOn { from, lost } => {
                        self.enter(Entry::Rewind(from));
                        self.board.go_on(from, &lost);
                        lost.into_iter()
                            .for_each(|record| self.enter(Entry::Step(Box::new(record))));
                    }
                    Action::SealMetrics => self.enter(Entry::Seal),
                    Action::WriteManifest(draft) => self.note(Note::Manifest(draft)),
                    Action::FindCheckpoint { behind } => self.note(Note::Find { behind }),
                    Action::LookAtStore => self.lookout.look(),
                    Action::Explain(reason) => tracing::debug!(reason, "phase"),
                    Action::Ignored { worker, reason } => {
                        tracing::debug!(%worker, reason, "message not acted on");
                    }
                    Action::End(result) => return Some(result),
                }
            }
            if let Some(watch) = &mut self.watch {
                watch.done();
            }
            // Of all at once: each loss tells all others of a generation, which fills their queues.
            if !deaf.is_empty() {
                events.push_back(Event::Lost(deaf));
            }
        }
        None
    }

    fn glance(&mut self) {
        self.glanced = Some(Instant::now());
        let snapshot = self.core.snapshot(self.started.elapsed());
        self.board.see(snapshot, self.core.ledger().clone());
    }

    fn publish(&mut self, event: RunEvent) {
        match &event {
            RunEvent::Committed(record) => self.enter(Entry::Step(record.clone())),
            RunEvent::Evaluated(record) => self.enter(Entry::Evaluation(record.clone())),
            _ => {}
        }
        {
            let context = self.traces.as_ref().and_then(Traces::current);
            let _of_trace = context.map(opentelemetry::Context::attach);
            // For people, whoever listens shows the events; as log lines they would be there twice.
            match &event {
                RunEvent::Committed(_) => tracing::debug!("{event}"),
                _ => tracing::info!(target: "looptrain::told", "{event}"),
            }
        }
        self.instruments.record(&event);
        self.board.record(&event);
        // Nobody has to listen.
        let _ = self.events.send(event);
    }

    fn note(&self, note: Note) {
        // The keeper lives as long as its notes can come.
        let _ = self.notes.send(note);
    }

    fn enter(&self, entry: Entry) {
        let _ = self.entries.send(entry);
    }

    /// The last words to the store, after those to the workers are queued.
    async fn make_durable(
        &self,
        result: Result<Outcome, CoordinatorError>,
    ) -> Result<Outcome, CoordinatorError> {
        if matches!(result, Err(CoordinatorError::Fenced { .. })) {
            return result;
        }
        let (done, flushed) = oneshot::channel();
        self.enter(Entry::Close(done));
        let _ = flushed.await;
        let outcome = result?;
        let finished = match (outcome.stopped, outcome.weights_digest) {
            (false, Some(weights_digest)) => {
                // The record is JSON, which has no NaN.
                let loss = outcome.loss.filter(|loss| loss.is_finite()).unwrap_or_default();
                Some(Finished { step: outcome.step, weights_digest, loss })
            }
            _ => None,
        };
        let (reply, durable) = oneshot::channel();
        self.note(Note::Last(finished, reply));
        if let Ok(durable) = durable.await {
            durable?;
        }
        Ok(outcome)
    }
}
