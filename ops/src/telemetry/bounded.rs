//! Exporters behind a bound: no more than so many items wait for a collector, and those that find no
//! room, or that the collector does not take, are counted. What is being told never waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use looptrain_worker::UNTRACED;
use opentelemetry::logs::{LogRecord, Severity};
use opentelemetry::trace::{SpanId, TraceId};
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{LogBatch, LogExporter, LogProcessor, SdkLogRecord};
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};

/// The items of one signal on their way.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    /// Items that may wait; the queue of the batch processor is as long.
    pub(super) room: usize,
    waiting: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
}

impl Gate {
    pub(super) fn new(room: usize) -> Self {
        Self { room, waiting: Arc::default(), dropped: Arc::default() }
    }

    /// Whether there is room for one more; one that finds none is counted.
    fn enter(&self) -> bool {
        let room = self.waiting.fetch_add(1, Ordering::Relaxed) < self.room;
        if !room {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        room
    }

    /// So many have left, for the collector or for nowhere.
    fn leave(&self, count: usize, taken: bool) {
        self.waiting.fetch_sub(count, Ordering::Relaxed);
        if !taken {
            self.dropped.fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// A processor or an exporter behind a gate.
#[derive(Debug)]
pub(super) struct Bounded<T> {
    pub(super) inner: T,
    pub(super) gate: Gate,
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.gate.enter() {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: SpanExporter> SpanExporter for Bounded<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        let result = self.inner.export(batch).await;
        self.gate.leave(count, result.is_ok());
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<P: LogProcessor> LogProcessor for Bounded<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.gate.enter() {
            // What the coordinator does not trace is below a span that stands for nothing.
            if record.trace_context().is_some_and(|context| context.trace_id == UNTRACED) {
                record.set_trace_context(TraceId::INVALID, SpanId::INVALID, None);
            }
            self.inner.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.inner.event_enabled(level, target, name)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Bounded<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count();
        let result = self.inner.export(batch).await;
        self.gate.leave(count, result.is_ok());
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use opentelemetry::trace::{Tracer, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;

    use super::super::span_processor;
    use super::*;

    /// A collector that takes nothing before it is let go.
    #[derive(Debug)]
    struct Stuck(std::sync::Mutex<mpsc::Receiver<()>>);

    impl SpanExporter for Stuck {
        async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
            let _ = self.0.lock().map(|go| go.recv());
            Ok(())
        }
    }

    #[test]
    fn a_collector_that_hangs_holds_nobody_up_and_what_it_misses_is_counted() {
        const ROOM: usize = 4096;
        let gate = Gate::new(ROOM);
        let (go, held) = mpsc::channel();
        let processor = span_processor(Stuck(held.into()), gate.clone());
        let provider = SdkTracerProvider::builder().with_span_processor(processor).build();
        let tracer = provider.tracer("test");
        let begin = Instant::now();
        for _ in 0..ROOM + 1000 {
            drop(tracer.start("span"));
        }
        assert!(begin.elapsed() < Duration::from_secs(2), "it took {:?}", begin.elapsed());
        assert_eq!(gate.dropped(), 1000);
        drop(go);
        assert!(provider.shutdown().is_ok());
        assert_eq!(gate.waiting.load(Ordering::Relaxed), 0, "all others have left");
        assert_eq!(gate.dropped(), 1000);
    }
}
