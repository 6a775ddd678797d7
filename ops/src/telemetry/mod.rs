//! Installs the OpenTelemetry SDK: metrics for Prometheus; traces, metrics and logs over OTLP (gRPC);
//! logs on stderr.
//!
//! A signal is exported when the standard variables name an endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT`, or
//! that of the signal such as `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`), unless `OTEL_SDK_DISABLED` is true
//! or its exporter is `none` (`OTEL_LOGS_EXPORTER=none`). Sampler, resource, time-outs, batches and
//! headers follow their `OTEL_*` variables as well. `RUST_LOG` sets the level of both kinds of logs.
//! Nothing here waits for a collector but the end of the program, for a few seconds.

mod bounded;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use looptrain_proto::metrics;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{KeyValue, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatches, BatchLogProcessor, SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatches, BatchSpanProcessor, SdkTracerProvider, SpanExporter,
    SpanProcessor,
};
use prometheus::{Encoder, Registry, TextEncoder};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::bounded::{Bounded, Gate, QUEUE};

/// Log records of this target are for collectors alone: people are told the same in another way.
pub(crate) const TOLD: &str = "looptrain::told";

/// How long the end of the program may wait for the last items to leave.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// The installed telemetry; to be shut down at the end, so that the last items leave.
pub(crate) struct Telemetry {
    registry: Registry,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
    loggers: Option<SdkLoggerProvider>,
}

impl Telemetry {
    /// Installs the global meter and tracer providers and the log subscriber.
    pub(crate) fn install(command: &'static str) -> Result<Self> {
        let resource = resource(command);
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .build()
            .context("cannot install the metrics exporter")?;
        let meters =
            SdkMeterProvider::builder().with_resource(resource.clone()).with_reader(reader);
        let meters = match is_exported("METRICS") {
            true => meters.with_reader(metric_reader()?).build(),
            false => meters.build(),
        };
        global::set_meter_provider(meters.clone());

        let [spans_gate, logs_gate] = [Gate::default(), Gate::default()];
        let tracers = match is_exported("TRACES") {
            true => Some(tracer_provider(resource.clone(), spans_gate.clone())?),
            false => None,
        };
        let loggers = match is_exported("LOGS") {
            true => Some(logger_provider(resource, logs_gate.clone())?),
            false => None,
        };
        metrics::TELEMETRY_DROPPED.observe(move || {
            let series =
                |signal: &str, gate: &Gate| (vec![signal.to_owned()], gate.dropped() as f64);
            vec![series("traces", &spans_gate), series("logs", &logs_gate)]
        });

        // What libraries below do is not what a trace of a run is about.
        let ours = filter_fn(|metadata| metadata.target().starts_with("looptrain"));
        let spans = tracers.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("looptrain"))
                .with_filter(ours)
        });
        let level = |default: &str| {
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default))
        };
        let records = loggers.as_ref().map(|provider| {
            // What happens on the way to the collector must not be sent there in turn.
            let of_export = ["opentelemetry", "tonic", "h2", "hyper", "tower"];
            let others = filter_fn(move |metadata| {
                !of_export.iter().any(|name| metadata.target().starts_with(name))
            });
            OpenTelemetryTracingBridge::new(provider).with_filter(others).with_filter(level("info"))
        });
        let for_people = filter_fn(|metadata| metadata.target() != TOLD);
        let logs = tracing_subscriber::fmt::layer()
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(|| LineWriter)
            .with_filter(for_people)
            .with_filter(level("warn"));
        tracing_subscriber::registry()
            .with(logs)
            .with(spans)
            .with(records)
            .try_init()
            .context("cannot install the log subscriber")?;
        Ok(Self { registry, meters, tracers, loggers })
    }

    /// A function that renders all metrics in Prometheus' text format.
    pub(crate) fn renderer(&self) -> Arc<dyn Fn() -> String + Send + Sync> {
        let registry = self.registry.clone();
        Arc::new(move || {
            let mut text = Vec::new();
            match TextEncoder::new().encode(&registry.gather(), &mut text) {
                Ok(()) => String::from_utf8_lossy(&text).into_owned(),
                Err(error) => format!("# cannot render the metrics: {error}\n"),
            }
        })
    }

    /// Sends what is still queued; failures are logged, for telemetry never fails a run.
    pub(crate) fn shutdown(&self) {
        let warn = |what: &str, result: Option<OTelSdkResult>| {
            if let Some(Err(error)) = result {
                tracing::warn!("the last {what} were not exported: {error}");
            }
        };
        // All at the same time: each may wait for a collector that does not answer.
        std::thread::scope(|scope| {
            let shutdown =
                |provider: &SdkTracerProvider| provider.shutdown_with_timeout(LAST_WORDS);
            scope.spawn(move || warn("spans", self.tracers.as_ref().map(shutdown)));
            let shutdown =
                |provider: &SdkLoggerProvider| provider.shutdown_with_timeout(LAST_WORDS);
            scope.spawn(move || warn("log records", self.loggers.as_ref().map(shutdown)));
            scope.spawn(move || {
                warn("metrics", Some(self.meters.shutdown_with_timeout(LAST_WORDS)))
            });
        });
    }
}

/// Who tells: `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say otherwise.
fn resource(command: &str) -> Resource {
    let host = looptrain_worker::host_name();
    let process = std::process::id();
    let ours = Resource::builder_empty()
        .with_service_name(format!("looptrain-{command}"))
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", format!("{host}:{process}")),
            KeyValue::new("host.name", host),
            KeyValue::new("process.pid", i64::from(process)),
        ])
        .build();
    let given = Resource::builder().build();
    let given = given.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    // A name that was not said has a default that says less than ours.
    let unknown = |it: &KeyValue| {
        it.key.as_str() == "service.name" && it.value.as_str().starts_with("unknown_service")
    };
    let said = given.filter(|attribute| !unknown(attribute));
    let ours = ours.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    Resource::builder_empty().with_attributes(ours).with_attributes(said).build()
}

/// Whether a signal is to leave, and some endpoint is named for it.
fn is_exported(signal: &str) -> bool {
    exports(signal, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn exports(signal: &str, variable: impl Fn(&str) -> Option<String>) -> bool {
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|it| it.eq_ignore_ascii_case("true"));
    let none = variable(&format!("OTEL_{signal}_EXPORTER")).is_some_and(|it| it == "none");
    let own = format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT");
    let endpoint = variable("OTEL_EXPORTER_OTLP_ENDPOINT").or_else(|| variable(&own));
    !disabled && !none && endpoint.is_some()
}

const CANNOT: &str = "cannot set up the OTLP exporter; check the OTEL_EXPORTER_OTLP_* variables";

fn metric_reader() -> Result<PeriodicReader<opentelemetry_otlp::MetricExporter>> {
    let exporter = opentelemetry_otlp::MetricExporter::builder().with_tonic().build();
    Ok(PeriodicReader::builder(exporter.context(CANNOT)?).build())
}

fn span_processor(exporter: impl SpanExporter + 'static, gate: Gate) -> impl SpanProcessor {
    let batches = SpanBatches::default().with_max_queue_size(QUEUE).build();
    let inner = Bounded { inner: exporter, gate: gate.clone() };
    let inner = BatchSpanProcessor::builder(inner).with_batch_config(batches).build();
    Bounded { inner, gate }
}

fn tracer_provider(resource: Resource, gate: Gate) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().build();
    let processor = span_processor(exporter.context(CANNOT)?, gate);
    let provider =
        SdkTracerProvider::builder().with_resource(resource).with_span_processor(processor).build();
    global::set_tracer_provider(provider.clone());
    global::set_text_map_propagator(TraceContextPropagator::new());
    Ok(provider)
}

fn logger_provider(resource: Resource, gate: Gate) -> Result<SdkLoggerProvider> {
    let exporter = opentelemetry_otlp::LogExporter::builder().with_tonic().build();
    let inner = Bounded { inner: exporter.context(CANNOT)?, gate: gate.clone() };
    let batches = LogBatches::default().with_max_queue_size(QUEUE).build();
    let inner = BatchLogProcessor::builder(inner).with_batch_config(batches).build();
    let processor = Bounded { inner, gate };
    Ok(SdkLoggerProvider::builder().with_resource(resource).with_log_processor(processor).build())
}

/// Log lines pass above the progress bars.
struct LineWriter;

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        crate::progress::print_line(String::from_utf8_lossy(bytes).trim_end());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_leaves_when_an_endpoint_is_named_for_it() {
        let with = |signal: &str, variables: &[(&str, &str)]| {
            exports(signal, |name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317");
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4317");
        assert!(with("LOGS", &[all]) && with("TRACES", &[traces]));
        assert!(!with("LOGS", &[]) && !with("LOGS", &[traces]));
        assert!(!with("LOGS", &[all, ("OTEL_LOGS_EXPORTER", "none")]));
        assert!(!with("METRICS", &[all, ("OTEL_SDK_DISABLED", "TRUE")]));
    }
}
