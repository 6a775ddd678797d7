//! Spans of this worker below those of the coordinator, which come with its directives.

use std::collections::HashMap;

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry::{Context, global};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The trace of what the coordinator does not trace: nobody samples it.
pub const UNTRACED: TraceId = TraceId::from_bytes(1_u128.to_be_bytes());

/// The span that a directive belongs to. What the coordinator does not trace is below one that nobody
/// samples, so that this worker does not trace it either.
pub(crate) fn parent(traceparent: String) -> Context {
    if traceparent.is_empty() {
        let span = SpanId::from(1);
        let unsampled =
            SpanContext::new(UNTRACED, span, TraceFlags::default(), true, TraceState::default());
        return Context::new().with_remote_span_context(unsampled);
    }
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent)]);
    let none = Context::new();
    global::get_text_map_propagator(|propagator| propagator.extract_with_context(&none, &carrier))
}

/// The span, below `parent`.
pub(crate) fn below(span: Span, parent: &Context) -> Span {
    // Where nothing is exported there is nobody to take it.
    let _ = span.set_parent(parent.clone());
    span
}
