//! Installs the OpenTelemetry SDK: metrics for Prometheus, traces over OTLP, logs on stderr.
//!
//! Traces are exported when the standard variables name an endpoint
//! (`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`); the log level follows
//! `RUST_LOG`.

use std::io::{IsTerminal, Write};
use std::sync::Arc;

use anyhow::{Context, Result};
use opentelemetry::global;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use prometheus::{Encoder, Registry, TextEncoder};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The installed telemetry; to be shut down at the end, so that the last spans leave.
pub(crate) struct Telemetry {
    registry: Registry,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Installs the global meter and tracer providers and the log subscriber.
    pub(crate) fn install(command: &'static str) -> Result<Self> {
        let resource =
            Resource::builder().with_service_name(format!("looptrain-{command}")).build();
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .build()
            .context("cannot install the metrics exporter")?;
        let meters =
            SdkMeterProvider::builder().with_resource(resource.clone()).with_reader(reader).build();
        global::set_meter_provider(meters.clone());

        let tracers = if exports_traces() { Some(tracer_provider(resource)?) } else { None };
        let spans = tracers.as_ref().map(|provider| {
            tracing_opentelemetry::layer().with_tracer(provider.tracer("looptrain"))
        });
        let level = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
        let logs = tracing_subscriber::fmt::layer()
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(|| LineWriter);
        tracing_subscriber::registry()
            .with(tracing_subscriber::Layer::with_filter(logs, level))
            .with(spans)
            .try_init()
            .context("cannot install the log subscriber")?;
        Ok(Self { registry, meters, tracers })
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
        if let Some(Err(error)) = self.tracers.as_ref().map(SdkTracerProvider::shutdown) {
            tracing::warn!("the last spans were not exported: {error}");
        }
        if let Err(error) = self.meters.shutdown() {
            tracing::warn!("the meters did not shut down: {error}");
        }
    }
}

fn exports_traces() -> bool {
    ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

fn tracer_provider(resource: Resource) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
        .context("cannot set up the OTLP exporter; check OTEL_EXPORTER_OTLP_ENDPOINT")?;
    let provider =
        SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
    global::set_tracer_provider(provider.clone());
    Ok(provider)
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
