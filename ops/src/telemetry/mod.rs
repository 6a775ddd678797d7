//! Installs the OpenTelemetry SDK: metrics for Prometheus; traces, metrics and logs over OTLP (gRPC);
//! logs on stderr.
//!
//! A signal is exported when the standard variables name an endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT`, or
//! that of the signal such as `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`), unless `OTEL_SDK_DISABLED` is true
//! or its exporter is `none` (`OTEL_LOGS_EXPORTER=none`). Resource, time-outs, batches, headers, compression
//! and TLS follow their `OTEL_*` variables as well; so does the sampler, for the spans at the top of a
//! trace. `RUST_LOG` sets the level of both kinds of logs. Nothing here waits for a collector but the end
//! of the program, for a few seconds, and what cannot be set up is told and left out.

mod bounded;
mod otlp;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use looptrain_proto::metrics;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{KeyValue, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, MetricExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogBatches, BatchLogProcessor, SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::{Instrument, PeriodicReader, SdkMeterProvider, Stream};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder as SpanBatches, BatchSpanProcessor, Sampler, SdkTracerProvider,
    SpanExporter, SpanProcessor,
};
use prometheus::{Encoder, Registry, TextEncoder};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::bounded::{Bounded, Gate};
use self::otlp::{exporter, is_exported};

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
        let mut troubles: Vec<String> = variables_that_do_not_hold();
        let mut unless = |trouble: anyhow::Error| troubles.push(format!("{trouble:#}"));
        let meters = meters.with_view(many_workers);
        let exported = is_exported("METRICS").then(metric_reader).transpose();
        let meters = match exported.map_err(&mut unless) {
            Ok(Some(reader)) => meters.with_reader(reader).build(),
            _ => meters.build(),
        };
        global::set_meter_provider(meters.clone());

        let spans_gate = Gate::new(room("OTEL_BSP_MAX_QUEUE_SIZE"));
        let logs_gate = Gate::new(room("OTEL_BLRP_MAX_QUEUE_SIZE"));
        let tracers = is_exported("TRACES")
            .then(|| tracer_provider(resource.clone(), spans_gate.clone()))
            .transpose();
        let tracers = tracers.map_err(&mut unless).unwrap_or_default();
        let loggers = is_exported("LOGS")
            .then(|| logger_provider(resource.clone(), logs_gate.clone()))
            .transpose();
        let loggers = loggers.map_err(&mut unless).unwrap_or_default();
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
        for trouble in troubles {
            tracing::warn!("{trouble}");
        }
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

/// Items of a signal that may wait, unless the variable says it.
const ROOM: usize = 8192;

fn room(variable: &str) -> usize {
    let given = std::env::var(variable).ok().and_then(|text| text.trim().parse().ok());
    given.filter(|room| *room > 0).unwrap_or(ROOM)
}

/// What the variables ask for and do not get.
fn variables_that_do_not_hold() -> Vec<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let mut troubles = Vec::new();
    for name in ["", "TRACES_", "METRICS_", "LOGS_"] {
        let name = format!("OTEL_EXPORTER_OTLP_{name}PROTOCOL");
        if let Some(other) = set(&name).filter(|protocol| protocol != "grpc") {
            troubles.push(format!("{name} is {other}; what leaves, leaves over grpc"));
        }
    }
    for signal in ["TRACES", "METRICS", "LOGS"] {
        let name = format!("OTEL_{signal}_EXPORTER");
        if let Some(other) = set(&name).filter(|it| it != "otlp" && it != "none") {
            troubles.push(format!("{name} is {other}; otlp and none are known here"));
        }
    }
    if let Some(Err(error)) = set("RUST_LOG").map(EnvFilter::try_new) {
        troubles.push(format!("RUST_LOG is not obeyed: {error}"));
    }
    troubles
}

/// More series than is usual where each worker has some.
fn many_workers(instrument: &Instrument) -> Option<Stream> {
    let by_worker = |metric: &&metrics::Metric| {
        metric.name == instrument.name() && metric.labels.contains(&"worker")
    };
    metrics::CATALOGUE.iter().find(by_worker)?;
    Stream::builder().with_cardinality_limit(SERIES_BY_WORKER).build().ok()
}

/// Those of 16,384 workers in five sections.
const SERIES_BY_WORKER: usize = 5 * 16_384;

/// The sampler that the variables ask for at the top of a trace; what is below follows what is above
/// it, also in other processes.
fn sampler(variable: impl Fn(&str) -> Option<String>) -> Sampler {
    let name = variable("OTEL_TRACES_SAMPLER").unwrap_or_default();
    let share = variable("OTEL_TRACES_SAMPLER_ARG").and_then(|share| share.trim().parse().ok());
    let top = match name.strip_prefix("parentbased_").unwrap_or(&name) {
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => Sampler::TraceIdRatioBased(share.unwrap_or(1.0)),
        _ => Sampler::AlwaysOn,
    };
    Sampler::ParentBased(Box::new(top))
}

fn metric_reader() -> Result<PeriodicReader<MetricExporter>> {
    let builder = MetricExporter::builder().with_tonic();
    Ok(PeriodicReader::builder(exporter("METRICS", builder, |it| it.build())?).build())
}

fn span_processor(exporter: impl SpanExporter + 'static, gate: Gate) -> impl SpanProcessor {
    let batches = SpanBatches::default().with_max_queue_size(gate.room).build();
    let inner = Bounded { inner: exporter, gate: gate.clone() };
    let inner = BatchSpanProcessor::builder(inner).with_batch_config(batches).build();
    Bounded { inner, gate }
}

fn tracer_provider(resource: Resource, gate: Gate) -> Result<SdkTracerProvider> {
    let builder = opentelemetry_otlp::SpanExporter::builder().with_tonic();
    let processor = span_processor(exporter("TRACES", builder, |it| it.build())?, gate);
    let provider = SdkTracerProvider::builder()
        .with_sampler(sampler(|name| std::env::var(name).ok()))
        .with_resource(resource)
        .with_span_processor(processor)
        .build();
    global::set_tracer_provider(provider.clone());
    global::set_text_map_propagator(TraceContextPropagator::new());
    Ok(provider)
}

fn logger_provider(resource: Resource, gate: Gate) -> Result<SdkLoggerProvider> {
    let builder = LogExporter::builder().with_tonic();
    let inner = exporter("LOGS", builder, |it| it.build())?;
    let inner = Bounded { inner, gate: gate.clone() };
    let batches = LogBatches::default().with_max_queue_size(gate.room).build();
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
    fn the_sampler_decides_at_the_top_alone() {
        let with = |name: &str, share: &str| {
            let sampler = sampler(|variable| match variable {
                "OTEL_TRACES_SAMPLER" => Some(name.to_owned()),
                "OTEL_TRACES_SAMPLER_ARG" => Some(share.to_owned()),
                _ => None,
            });
            format!("{sampler:?}")
        };
        assert_eq!(with("always_on", ""), "ParentBased(AlwaysOn)");
        assert_eq!(with("parentbased_always_off", ""), "ParentBased(AlwaysOff)");
        assert_eq!(with("traceidratio", "0.25"), "ParentBased(TraceIdRatioBased(0.25))");
        assert_eq!(with("nonsense", "x"), "ParentBased(AlwaysOn)");
    }
}
