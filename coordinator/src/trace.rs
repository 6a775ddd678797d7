//! Traces of a run, as OpenTelemetry spans: one of each step (of every so many, as the spec says), of
//! each recovery, of each checkpoint, evaluation and state transfer. The runtime tells what happens;
//! what goes out to workers carries the span that it belongs to, so that theirs are below it. Nothing
//! here waits or fails, and without a tracer nothing is kept.
//!
//! A recovery begins where the lost worker was last heard, and ends with the next commit:
//!
//! ```text
//! recovery
//! ├─ detect     from the last word of the lost worker to when it was given up
//! ├─ form       the new generation, with each worker's abort, ring and state below it
//! └─ step       the first one that is committed again
//! ```

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use looptrain_proto::{Generation, Step, WorkerId};
use opentelemetry::global::{self, BoxedTracer};
use opentelemetry::trace::{
    Span, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue};

use crate::core::{Action, Directive, Event, Report};
use crate::records::RunEvent;

/// What is being traced now.
pub(crate) struct Traces {
    tracer: BoxedTracer,
    /// Steps whose number is a multiple of this are traced; 0 for none.
    every: u64,
    /// When each worker was last heard.
    heard: BTreeMap<WorkerId, SystemTime>,
    /// The same of the one whose session was closed last: its loss is told after that.
    closed: Option<(WorkerId, SystemTime)>,
    /// A worker that was lost since a generation last formed.
    lost: Option<Lost>,
    /// A planned step that is not committed yet.
    in_flight: Option<Step>,
    /// A generation of this coordinator has formed.
    formed: bool,
    recovery: Option<Context>,
    forming: Option<(Generation, Context)>,
    step: Option<(Step, Context)>,
    votes: Option<Context>,
    checkpoint: Option<(Step, Context)>,
    manifest: Option<Context>,
    evaluation: Option<Context>,
    transfers: BTreeMap<WorkerId, Context>,
}

/// The first loss that a recovery is about.
struct Lost {
    heard: Option<SystemTime>,
    noticed: SystemTime,
    worker: String,
    cause: String,
    reason: String,
}

impl Traces {
    /// On the process's tracer; `None` when there is none.
    pub(crate) fn new(every: u64) -> Option<Self> {
        let tracer = global::tracer("looptrain");
        is_there(&tracer).then(|| Self {
            tracer,
            every,
            heard: BTreeMap::new(),
            closed: None,
            lost: None,
            in_flight: None,
            formed: false,
            recovery: None,
            forming: None,
            step: None,
            votes: None,
            checkpoint: None,
            manifest: None,
            evaluation: None,
            transfers: BTreeMap::new(),
        })
    }

    /// The span that what happens now belongs to most likely.
    pub(crate) fn current(&self) -> Option<Context> {
        let step = || self.step.as_ref().map(|(_, context)| context);
        let checkpoint = || self.checkpoint.as_ref().map(|(_, context)| context);
        self.recovery.as_ref().or_else(step).or_else(checkpoint).cloned()
    }

    fn begin(
        &self,
        name: &'static str,
        parent: Option<&Context>,
        start: Option<SystemTime>,
        attributes: Vec<KeyValue>,
    ) -> Context {
        let mut builder = self.tracer.span_builder(name).with_attributes(attributes);
        builder.start_time = start;
        let none = Context::new();
        let span = builder.start_with_context(&self.tracer, parent.unwrap_or(&none));
        Context::new().with_span(span)
    }

    /// Something is about to reach the core.
    pub(crate) fn hear(&mut self, event: &Event) {
        match event {
            Event::Joined { worker, .. } => drop(self.heard.insert(*worker, SystemTime::now())),
            Event::Report { worker, report } => {
                if let Some(heard) = self.heard.get_mut(worker) {
                    *heard = SystemTime::now();
                }
                match report {
                    Report::Prepared { step, .. } if self.votes.is_none() => {
                        if let Some((traced, context)) = &self.step
                            && traced == step
                        {
                            self.votes = Some(self.begin("votes", Some(context), None, Vec::new()));
                        }
                    }
                    Report::Fetched { result, .. } => {
                        if let Some(transfer) = self.transfers.remove(worker) {
                            if let Err(reason) = result {
                                transfer.span().set_status(Status::error(reason.clone()));
                            }
                            transfer.span().end();
                        }
                    }
                    _ => {}
                }
            }
            Event::CheckpointWritten { .. } => end(&mut self.manifest),
            Event::CheckpointRefused { reason, .. } => fail(&mut self.manifest, reason),
            _ => {}
        }
    }

    /// What is about to be done; for a message, the span that it belongs to.
    pub(crate) fn before(&mut self, action: &Action) -> String {
        match action {
            Action::Send { worker, message } => self.before_message(*worker, message),
            Action::Publish(event) => {
                self.before_event(event);
                String::new()
            }
            Action::Close { worker } => {
                self.closed = self.heard.remove(worker).map(|heard| (*worker, heard));
                String::new()
            }
            Action::WriteManifest(_) => {
                let parent = self.checkpoint.as_ref().map(|(_, context)| context);
                self.manifest = Some(self.begin("manifest", parent, None, Vec::new()));
                String::new()
            }
            _ => String::new(),
        }
    }

    fn before_message(&mut self, worker: WorkerId, message: &Directive) -> String {
        match message {
            Directive::Form(form) => {
                let generation = Generation(form.generation);
                if self.forming.as_ref().is_none_or(|(forming, _)| *forming != generation) {
                    self.form(generation, Step(form.step), form.members.len());
                }
                traceparent(self.forming.as_ref().map(|(_, context)| context))
            }
            Directive::Plan(plan) => {
                let step = Step(plan.step);
                if self.in_flight != Some(step) {
                    self.plan(step, Generation(plan.generation));
                }
                traceparent(self.step.as_ref().map(|(_, context)| context))
            }
            Directive::Commit(_) => {
                end(&mut self.votes);
                self.in_flight = None;
                traceparent(self.step.as_ref().map(|(_, context)| context))
            }
            Directive::Save(save) => {
                let step = Step(save.step);
                if self.checkpoint.as_ref().is_none_or(|(saving, _)| *saving != step) {
                    let attributes =
                        vec![number("step", step.0), number("parts", save.parts.into())];
                    let context = self.begin("checkpoint", None, None, attributes);
                    self.checkpoint = Some((step, context));
                }
                traceparent(self.checkpoint.as_ref().map(|(_, context)| context))
            }
            Directive::Evaluate(order) => {
                if self.evaluation.is_none() {
                    let attributes = vec![number("step", order.step)];
                    self.evaluation = Some(self.begin("evaluation", None, None, attributes));
                }
                traceparent(self.evaluation.as_ref())
            }
            Directive::Fetch(fetch) => {
                let attributes = vec![
                    number("step", fetch.step),
                    number("sources", fetch.sources.len() as u64),
                    number("worker", worker.0),
                ];
                let context = self.begin("state transfer", None, None, attributes);
                let said = traceparent(Some(&context));
                self.transfers.insert(worker, context);
                said
            }
            _ => String::new(),
        }
    }

    /// A generation is formed: after a loss or for a broken ring, or since somebody joins.
    fn form(&mut self, generation: Generation, step: Step, world: usize) {
        let interrupted = self.in_flight.take().is_some() || self.lost.is_some();
        if let Some((_, context)) = self.step.take() {
            context.span().set_status(Status::error("its generation ended"));
            context.span().end();
        }
        self.votes = None;
        fail(&mut self.evaluation, "its generation ended");
        let mut superseded = self.forming.take().map(|(_, context)| context);
        fail(&mut superseded, "another generation was formed");
        if self.recovery.is_none() {
            let name = if interrupted && self.formed { "recovery" } else { "formation" };
            let start = self.lost.as_ref().and_then(|lost| lost.heard);
            let attributes = vec![number("step", step.0)];
            self.recovery = Some(self.begin(name, None, start, attributes));
        }
        if let Some(lost) = self.lost.take() {
            let attributes = vec![
                KeyValue::new("worker", lost.worker),
                KeyValue::new("cause", lost.cause),
                KeyValue::new("reason", lost.reason),
            ];
            let detect = self.begin("detect", self.recovery.as_ref(), lost.heard, attributes);
            detect.span().end_with_timestamp(lost.noticed);
        }
        let attributes = vec![
            number("generation", generation.0),
            number("step", step.0),
            number("world", world as u64),
        ];
        let context = self.begin("form", self.recovery.as_ref(), None, attributes);
        self.forming = Some((generation, context));
    }

    fn plan(&mut self, step: Step, generation: Generation) {
        self.in_flight = Some(step);
        self.votes = None;
        let due = self.every > 0 && step.0.is_multiple_of(self.every);
        self.step = (due || self.recovery.is_some()).then(|| {
            let attributes = vec![number("step", step.0), number("generation", generation.0)];
            (step, self.begin("step", self.recovery.as_ref(), None, attributes))
        });
    }

    fn before_event(&mut self, event: &RunEvent) {
        match event {
            RunEvent::WorkerLost { worker, name, cause, reason } => {
                let closed = self.closed.take_if(|(closed, _)| closed == worker);
                let heard = self.heard.remove(worker).or(closed.map(|(_, heard)| heard));
                fail(&mut self.transfers.remove(worker), reason);
                let (worker, cause, reason) = (name.clone(), cause.to_string(), reason.clone());
                let noticed = SystemTime::now();
                self.lost.get_or_insert(Lost { heard, noticed, worker, cause, reason });
            }
            RunEvent::Formed { reason, .. } => {
                self.formed = true;
                self.lost = None;
                if let Some((_, context)) = self.forming.take() {
                    context.span().set_attribute(KeyValue::new("reason", reason.clone()));
                    context.span().end();
                }
            }
            RunEvent::Committed(record) => {
                // It was a spare, whose loss interrupts nothing.
                self.lost = None;
                if let Some((_, context)) = self.step.take() {
                    let span = context.span();
                    span.set_attribute(KeyValue::new("loss", record.loss));
                    span.set_attribute(number("tokens", record.step_tokens));
                    span.set_attribute(number("world", record.world.into()));
                    span.end();
                }
                end(&mut self.recovery);
            }
            RunEvent::Evaluated(record) => {
                if let Some(context) = &self.evaluation {
                    context.span().set_attribute(KeyValue::new("loss", record.loss));
                }
                end(&mut self.evaluation);
            }
            RunEvent::CheckpointSaved { step, bytes, stall, .. } => {
                if let Some((_, context)) = self.checkpoint.take_if(|(saving, _)| saving == step) {
                    context.span().set_attribute(number("bytes", *bytes));
                    context.span().set_attribute(KeyValue::new("stall", *stall));
                    context.span().end();
                }
            }
            RunEvent::CheckpointFailed { step, reason } => {
                let saving = self.checkpoint.take_if(|(saving, _)| saving == step);
                fail(&mut saving.map(|(_, context)| context), reason);
            }
            RunEvent::Rewound { .. } => self.in_flight = None,
            _ => {}
        }
    }
}

/// Whether spans of the tracer go anywhere. It is asked for one below a span that nobody samples: one
/// that does nothing gives that back, another makes a new one, and does not record it.
fn is_there(tracer: &BoxedTracer) -> bool {
    let id = SpanId::from(1);
    let trace = TraceId::from(1);
    let unsampled = SpanContext::new(trace, id, TraceFlags::default(), true, TraceState::default());
    let below = Context::new().with_remote_span_context(unsampled);
    tracer.start_with_context("probe", &below).span_context().span_id() != id
}

fn number(key: &'static str, value: u64) -> KeyValue {
    KeyValue::new(key, i64::try_from(value).unwrap_or(i64::MAX))
}

fn end(context: &mut Option<Context>) {
    if let Some(context) = context.take() {
        context.span().end();
    }
}

fn fail(context: &mut Option<Context>, reason: &str) {
    if let Some(context) = context.take() {
        context.span().set_status(Status::error(reason.to_owned()));
        context.span().end();
    }
}

/// A span for those below it in other processes; empty for none.
fn traceparent(context: Option<&Context>) -> String {
    let Some(context) = context else { return String::new() };
    let mut carrier = HashMap::new();
    global::get_text_map_propagator(|propagator| propagator.inject_context(context, &mut carrier));
    carrier.remove("traceparent").unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use looptrain_proto::v1;
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};

    use super::*;
    use crate::records::{LossCause, example};

    #[derive(Clone, Debug, Default)]
    struct Collected(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Collected {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    impl Collected {
        fn named(&self, name: &str) -> Vec<SpanData> {
            let spans = self.0.lock().unwrap();
            spans.iter().filter(|span| span.name == name).cloned().collect()
        }
    }

    fn send(worker: u64, message: Directive) -> Action {
        Action::Send { worker: WorkerId(worker), message }
    }

    fn form(generation: u64, step: u64) -> Directive {
        Directive::Form(v1::Form { generation, step, ..v1::Form::default() })
    }

    fn plan(generation: u64, step: u64) -> Directive {
        Directive::Plan(v1::Plan { generation, step, ..v1::Plan::default() })
    }

    fn formed(generation: u64, step: u64) -> Action {
        let (generation, step) = (Generation(generation), Step(step));
        let reason = "somebody was lost".into();
        Action::Publish(RunEvent::Formed { generation, world: 1, step, reason })
    }

    fn commit(traces: &mut Traces, generation: u64, step: u64) -> String {
        let message = Directive::Commit(v1::Commit { generation, step });
        let said = traces.before(&send(1, message));
        traces.before(&Action::Publish(RunEvent::Committed(Box::new(example(step, 2.0)))));
        said
    }

    /// One test, for the tracer is the process's.
    #[test]
    fn a_recovery_is_one_trace_from_the_last_word_of_the_lost_to_the_next_commit() {
        assert!(Traces::new(1).is_none(), "nobody has installed a tracer");
        let collected = Collected::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(collected.clone()).build();
        global::set_tracer_provider(provider);
        global::set_text_map_propagator(TraceContextPropagator::new());
        let mut traces = Traces::new(3).unwrap();
        assert!(collected.named("probe").is_empty());

        for worker in [1, 2] {
            traces.before(&send(worker, form(1, 0)));
        }
        traces.before(&formed(1, 0));
        // The first step belongs to the formation; of the others every third is traced.
        for step in 1..=4 {
            let said: Vec<String> =
                [1, 2].map(|worker| traces.before(&send(worker, plan(1, step)))).to_vec();
            assert_eq!(said[0], said[1]);
            assert_eq!(said[0].is_empty(), step != 1 && step != 3, "step {step}");
            assert_eq!(commit(&mut traces, 1, step), said[0]);
        }
        assert_eq!(collected.named("formation").len(), 1);
        assert_eq!(collected.named("step").len(), 2);

        // Worker 2 says something, and then nothing, in the middle of step 5.
        traces.before(&send(1, plan(1, 5)));
        traces.hear(&Event::Joined { worker: WorkerId(2), join: v1::Join::default() });
        let report = Report::Heartbeat;
        traces.hear(&Event::Report { worker: WorkerId(2), report });
        std::thread::sleep(Duration::from_millis(30));
        let (worker, name, reason) = (WorkerId(2), "w2".into(), "silent for 3 s".into());
        let cause = LossCause::Silent;
        traces.before(&Action::Publish(RunEvent::WorkerLost { worker, name, cause, reason }));
        let told = traces.before(&send(1, form(2, 4)));
        // The first try does not stand.
        let again = traces.before(&send(1, form(3, 4)));
        traces.before(&formed(3, 4));
        let planned = traces.before(&send(1, plan(3, 5)));
        commit(&mut traces, 3, 5);

        let recovery = &collected.named("recovery")[..];
        let [recovery] = recovery else { panic!("{recovery:?}") };
        let trace = recovery.span_context.trace_id();
        let below = |name: &str| -> Vec<SpanData> {
            let parent = recovery.span_context.span_id();
            collected.named(name).into_iter().filter(|it| it.parent_span_id == parent).collect()
        };
        assert_eq!((below("detect").len(), below("form").len(), below("step").len()), (1, 2, 1));
        for said in [&told, &again, &planned] {
            assert!(said.contains(&trace.to_string()), "{said} is of trace {trace}");
        }
        let detect = &below("detect")[0];
        let took = detect.end_time.duration_since(detect.start_time).unwrap();
        assert!(took >= Duration::from_millis(30), "from the last word on: {took:?}");
        assert_eq!(recovery.start_time, detect.start_time);
        assert!(matches!(below("form")[0].status, Status::Error { .. }));
        assert!(matches!(below("form")[1].status, Status::Unset));

        // Nor is the loss of a spare, after which somebody joins.
        traces.hear(&Event::Joined { worker: WorkerId(7), join: v1::Join::default() });
        let (worker, name, reason) = (WorkerId(7), "spare".into(), "killed".into());
        let cause = LossCause::Died;
        traces.before(&Action::Close { worker });
        traces.before(&Action::Publish(RunEvent::WorkerLost { worker, name, cause, reason }));
        assert!(traces.heard.is_empty(), "nobody is remembered who is gone");
        traces.before(&send(1, plan(3, 6)));
        commit(&mut traces, 3, 6);
        // A growth is none, and a checkpoint is a trace of its own.
        traces.before(&send(1, form(4, 6)));
        traces.before(&formed(4, 6));
        traces.before(&send(1, plan(4, 7)));
        commit(&mut traces, 4, 7);
        assert_eq!(collected.named("recovery").len(), 1);
        assert_eq!(collected.named("formation").len(), 2);
        let save = v1::Save { generation: 4, step: 7, part: 0, parts: 1 };
        assert!(!traces.before(&send(1, Directive::Save(save))).is_empty());
        let (step, seconds, bytes, stall) = (Step(7), 1.0, 100, 0.5);
        let saved = RunEvent::CheckpointSaved { step, seconds, bytes, stall };
        traces.before(&Action::Publish(saved));
        assert_eq!(collected.named("checkpoint").len(), 1);
    }
}
