//! What leaves over OTLP, as a collector gets it from real processes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{
    LogsService, LogsServiceServer,
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use crate::cluster::{Cluster, ENDLESS, LAST, STEP, certify};
use crate::http::get;
use crate::others::given;
use crate::ports::free_port;
use crate::support::{SOON, Scratch, wait_until};

/// A span, with the service that it is of.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    attributes: BTreeMap<String, String>,
    seconds: f64,
}

/// A log record.
#[derive(Clone, Debug)]
struct Log {
    service: String,
    text: String,
    trace: Vec<u8>,
}

#[derive(Debug, Default)]
struct Received {
    spans: Vec<Span>,
    logs: Vec<Log>,
    /// Name and unit.
    metrics: BTreeMap<String, String>,
}

/// Takes what processes export.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Received>>);

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::DoubleValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(truth)) => truth.to_string(),
        _ => String::new(),
    }
}

fn attributes(given: Vec<KeyValue>) -> BTreeMap<String, String> {
    given.into_iter().map(|attribute| (attribute.key, text(attribute.value))).collect()
}

fn service(resource: Option<Resource>) -> String {
    let attributes = attributes(resource.unwrap_or_default().attributes);
    for key in ["service.version", "service.instance.id", "host.name", "process.pid"] {
        assert!(attributes.contains_key(key), "{key} is not in {attributes:?}");
    }
    attributes["service.name"].clone()
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let service = service(of_resource.resource);
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| Span {
                service: service.clone(),
                name: span.name,
                trace: span.trace_id,
                id: span.span_id,
                parent: span.parent_span_id,
                attributes: attributes(span.attributes),
                seconds: (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e9,
            });
            self.0.lock().unwrap().spans.extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Collector {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_logs {
            let service = service(of_resource.resource);
            let logs = of_resource.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            let logs = logs.map(|log| Log {
                service: service.clone(),
                text: text(log.body),
                trace: log.trace_id,
            });
            self.0.lock().unwrap().logs.extend(logs);
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_metrics {
            service(of_resource.resource);
            let metrics = of_resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            let metrics = metrics.map(|metric| (metric.name, metric.unit));
            self.0.lock().unwrap().metrics.extend(metrics);
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

impl Collector {
    /// Listens on this port until the runtime is dropped.
    fn serve(&self, runtime: &tokio::runtime::Runtime, port: u16) {
        self.serve_on(Server::builder(), runtime, port);
    }

    /// Listens there for who trusts `ca.crt` of this folder of credentials and has a certificate of it.
    fn serve_within_tls(&self, folder: &Path, runtime: &tokio::runtime::Runtime, port: u16) {
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(read("tls.crt"), read("tls.key")))
            .client_ca_root(Certificate::from_pem(read("ca.crt")));
        self.serve_on(Server::builder().tls_config(tls).unwrap(), runtime, port);
    }

    fn serve_on(&self, mut server: Server, runtime: &tokio::runtime::Runtime, port: u16) {
        let gzip = CompressionEncoding::Gzip;
        let server = server
            .add_service(TraceServiceServer::new(self.clone()).accept_compressed(gzip))
            .add_service(LogsServiceServer::new(self.clone()).accept_compressed(gzip))
            .add_service(MetricsServiceServer::new(self.clone()).accept_compressed(gzip))
            .serve(([127, 0, 0, 1], port).into());
        runtime.spawn(server);
    }

    /// Listens for what another collector passes on over HTTP, until the process ends.
    fn serve_http(&self) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let own = own.clone();
                std::thread::spawn(move || own.hear(stream.unwrap()));
            }
        });
        port
    }

    /// Requests of one connection, each with a length.
    fn hear(&self, stream: TcpStream) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut stream = BufReader::new(stream);
        loop {
            let (mut path, mut length, mut is_gzip) = (String::new(), 0, false);
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let line = line.trim().to_ascii_lowercase();
                match line.split_once(": ") {
                    _ if line.is_empty() => break,
                    Some(("content-length", text)) => length = text.parse().unwrap(),
                    Some(("content-encoding", text)) => is_gzip = text == "gzip",
                    _ if path.is_empty() => path = line,
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            if is_gzip {
                let packed = std::mem::take(&mut body);
                flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut body).unwrap();
            }
            let body = &body[..];
            if path.contains("/v1/traces") {
                let request = ExportTraceServiceRequest::decode(body).unwrap();
                runtime.block_on(TraceService::export(self, Request::new(request))).unwrap();
            } else if path.contains("/v1/logs") {
                let request = ExportLogsServiceRequest::decode(body).unwrap();
                runtime.block_on(LogsService::export(self, Request::new(request))).unwrap();
            } else {
                let request = ExportMetricsServiceRequest::decode(body).unwrap();
                runtime.block_on(MetricsService::export(self, Request::new(request))).unwrap();
            }
            let kind = "Content-Type: application/x-protobuf";
            let answer = format!("HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: 0\r\n\r\n");
            if stream.get_mut().write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn spans(&self) -> Vec<Span> {
        self.0.lock().unwrap().spans.clone()
    }
}

/// The variables of a process that exports to this port, in short intervals.
fn exporting_to(port: u16) -> Vec<(String, String)> {
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}")),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("OTEL_BLRP_SCHEDULE_DELAY", "100".into()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "200".into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

#[test]
fn a_recovery_is_one_trace_over_coordinator_and_workers_with_logs_and_metrics_beside_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (collector, port) = (Collector::default(), free_port());
    collector.serve(&runtime, port);
    let mut variables = exporting_to(port);
    // At the top of traces alone: a worker does not trace what its coordinator does not.
    variables.push(("OTEL_TRACES_SAMPLER".into(), "always_on".into()));
    let every = ["--set", "telemetry.trace_every_steps=10"];
    let cluster = Cluster::start_exporting(&variables, 2, &every);
    let survivor = cluster.worker(&["--name", "survivor"]);
    let victim = cluster.worker(&["--name", "victim", "--fault", &format!("kill@reduce:{STEP}")]);
    assert_eq!(victim.end().code, None, "it was killed");
    cluster.finish();
    assert_eq!(survivor.end().code, Some(0));

    let spans = collector.spans();
    let named =
        |name: &str| -> Vec<&Span> { spans.iter().filter(|span| span.name == name).collect() };
    let recoveries = named("recovery");
    let [recovery] = recoveries[..] else { panic!("{recoveries:?}") };
    assert_eq!((recovery.service.as_str(), recovery.parent.len()), ("looptrain-coordinator", 0));
    let of_trace: Vec<&Span> = spans.iter().filter(|span| span.trace == recovery.trace).collect();
    let there: BTreeSet<(&str, &str)> =
        of_trace.iter().map(|span| (span.service.as_str(), span.name.as_str())).collect();
    for name in ["recovery", "detect", "form", "step", "votes"] {
        assert!(there.contains(&("looptrain-coordinator", name)), "no {name} in {there:?}");
    }
    for name in [
        "abort",
        "join generation",
        "ring",
        "reach state",
        "work",
        "compute",
        "reduce",
        "vote",
        "commit",
    ] {
        assert!(there.contains(&("looptrain-worker", name)), "no {name} in {there:?}");
    }
    let detect = of_trace.iter().find(|span| span.name == "detect").unwrap();
    assert_eq!(detect.attributes["worker"], "victim");
    assert!(detect.seconds <= recovery.seconds && recovery.seconds < 60.0, "{recovery:?}");

    // A worker's spans hang below those of the coordinator, and none stands alone.
    let ids: HashMap<&[u8], &Span> = spans.iter().map(|span| (&span.id[..], span)).collect();
    for span in spans.iter().filter(|span| span.service == "looptrain-worker") {
        let mut above = span;
        while above.service == "looptrain-worker" {
            let parent = ids.get(&above.parent[..]);
            above = parent.unwrap_or_else(|| panic!("{above:?} is below nothing"));
        }
        assert_eq!(above.trace, span.trace);
    }
    let untraced = |trace: &[u8]| trace.len() == 16 && trace[..15] == [0; 15] && trace[15] == 1;
    assert!(spans.iter().all(|span| !untraced(&span.trace)), "what is not traced is not told");
    // Every tenth step, the first one as part of the formation, and the one that was done again.
    let mut traced: Vec<u64> =
        named("step").iter().map(|span| span.attributes["step"].parse().unwrap()).collect();
    traced.sort_unstable();
    let mut expected: Vec<u64> = (1..=LAST / 10).map(|step| step * 10).collect();
    expected.extend([1, STEP]);
    expected.sort_unstable();
    assert_eq!(traced, expected);
    // The last step is saved, in parts.
    let saves: Vec<_> = named("checkpoint").iter().map(|span| span.trace.clone()).collect();
    assert!(!saves.is_empty());
    for name in ["save", "copy", "upload", "manifest"] {
        assert!(named(name).iter().all(|span| saves.contains(&span.trace)), "{name}");
        assert!(!named(name).is_empty(), "no {name}");
    }

    let received = collector.0.lock().unwrap();
    assert!(received.logs.iter().all(|log| !untraced(&log.trace)));
    let log = |words: &str| received.logs.iter().find(|log| log.text.contains(words));
    let formed = log("generation 2: 1 worker from step").unwrap();
    assert_eq!(formed.trace, recovery.trace, "logs lead to their trace");
    assert_eq!(log("worker victim lost").unwrap().service, "looptrain-coordinator");
    assert_eq!(received.metrics["looptrain.goodput.time"], "s");
    assert_eq!(received.metrics["looptrain.store.operations"], "{operation}");
    let known: BTreeSet<&str> =
        looptrain_proto::metrics::CATALOGUE.iter().map(|metric| metric.name).collect();
    let strange: Vec<_> =
        received.metrics.keys().filter(|name| !known.contains(name.as_str())).collect();
    assert!(strange.is_empty(), "{strange:?} are not in the catalogue");
}

/// A collector of others between the program and [`Collector`]; ended with the test.
struct Between(std::process::Child);

impl Between {
    /// Starts it: it takes OTLP on one port and passes it on to another.
    fn start(program: &std::ffi::OsStr, folder: &Path, from: u16, to: u16) -> Self {
        let (file, address) = (|name| folder.join(name), |port| format!("127.0.0.1:{port}"));
        let child = Command::new(program)
            .arg("start")
            .args(["--otlp-grpc-endpoint", &address(from)])
            .args(["--otlp-http-endpoint", &address(free_port())])
            .args(["--exporter", "otlp", "--otlp-exporter-protocol", "http"])
            .args(["--otlp-exporter-endpoint", &format!("http://{}", address(to))])
            .args(["--batch-timeout", "100ms"])
            .arg("--pid-file")
            .arg(file("collector.pid"))
            .arg("--log-file")
            .arg(file("collector.log"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let between = Self(child.unwrap());
        wait_until(|| TcpStream::connect(address(from)).is_ok());
        between
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_real_collector_takes_traces_metrics_and_logs_and_passes_them_on() {
    let Some(program) = given("LOOPTRAIN_TEST_COLLECTOR", "OpenTelemetry collector") else {
        return;
    };
    let (collector, from) = (Collector::default(), free_port());
    let to = collector.serve_http();
    let folder = tempfile::tempdir().unwrap();
    let between = Between::start(&program, folder.path(), from, to);
    let cluster = Cluster::start_exporting(&exporting_to(from), 2, &[]);
    let first = cluster.worker(&["--name", "first"]);
    let second = cluster.worker(&["--name", "second"]);
    cluster.finish();
    for worker in [first, second] {
        assert_eq!(worker.end().code, Some(0));
    }
    // Whole steps, from the plan to the commit of both workers.
    let whole = |spans: &[Span]| {
        let of = |service: &str, name: &str| {
            let there = spans.iter().filter(|span| span.service == service && span.name == name);
            there.map(|span| span.trace.clone()).collect::<Vec<_>>()
        };
        let steps = of("looptrain-coordinator", "step");
        let commits = of("looptrain-worker", "commit");
        let both = |step: &&Vec<u8>| commits.iter().filter(|commit| commit == step).count() == 2;
        steps.iter().filter(both).count() as u64
    };
    let begin = Instant::now();
    while whole(&collector.spans()) < LAST / 10 {
        let spans = collector.spans();
        let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        assert!(begin.elapsed() < SOON, "{} whole steps; spans: {names:?}", whole(&spans));
        std::thread::sleep(Duration::from_millis(50));
    }
    let metrics = ["looptrain.steps", "looptrain.goodput.time", "looptrain.step.duration"];
    let received = || collector.0.lock().unwrap();
    wait_until(|| metrics.iter().all(|name| received().metrics.contains_key(*name)));
    wait_until(|| received().logs.iter().any(|log| log.text.contains("generation 1: 2 workers")));
    drop(between);
}

#[test]
fn what_leaves_over_tls_reaches_whom_its_authority_vouches_for() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (collector, port, pki) = (Collector::default(), free_port(), Scratch::new());
    certify(&pki);
    let file = |name: &str| pki.path(&format!("tls/worker/{name}")).display().to_string();
    collector.serve_within_tls(&pki.path("tls/coordinator"), &runtime, port);
    let mut variables = exporting_to(port);
    variables.retain(|(name, _)| name != "OTEL_EXPORTER_OTLP_ENDPOINT");
    let also = [
        ("ENDPOINT", format!("https://127.0.0.1:{port}")),
        ("COMPRESSION", "gzip".into()),
        ("CERTIFICATE", file("ca.crt")),
        ("CLIENT_CERTIFICATE", file("tls.crt")),
        ("CLIENT_KEY", file("tls.key")),
    ];
    variables.extend(also.map(|(name, value)| (format!("OTEL_EXPORTER_OTLP_{name}"), value)));
    let every = ["--set", "telemetry.trace_every_steps=1"];
    let cluster = Cluster::start_exporting(&variables, 2, &every);
    let trusts = cluster.worker(&["--name", "trusts"]);
    // Of another authority, which has not signed the collector's certificate.
    let other = Scratch::new();
    certify(&other);
    let authority = other.path("tls/worker/ca.crt").display().to_string();
    let authority = ("OTEL_EXPORTER_OTLP_CERTIFICATE".to_owned(), authority);
    let doubts = cluster.worker_exporting(&[authority], &["--name", "doubts"]);
    cluster.finish();
    for worker in [trusts, doubts] {
        assert_eq!(worker.end().code, Some(0));
    }
    let spans = collector.spans();
    let named = |service: &str, name: &str| {
        spans.iter().filter(|span| span.service == service && span.name == name).count() as u64
    };
    assert_eq!(named("looptrain-coordinator", "step"), LAST);
    assert_eq!(named("looptrain-worker", "commit"), LAST, "of one of the two");
    let received = collector.0.lock().unwrap();
    assert!(received.logs.iter().any(|log| log.text.contains("generation 1: 2 workers")));
    assert!(received.metrics.contains_key("looptrain.steps"));
}

#[test]
fn a_collector_that_takes_nothing_holds_no_run_up() {
    // It accepts connections, and says nothing on them.
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = deaf.local_addr().unwrap().port();
    let all = ["--set", "telemetry.trace_every_steps=1"];
    let mut variables = exporting_to(port);
    variables.push(("OTEL_BSP_MAX_QUEUE_SIZE".into(), "64".into()));
    let page: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let dashboard = page.to_string();
    let more = ["--dashboard", &dashboard, "--set", "cluster.workers=1"];
    let cluster = Cluster::start_in(&variables, &[&ENDLESS[..], &all, &more].concat());
    let worker = cluster.worker(&["--name", "w"]);
    let dropped = || {
        let (_, text) = get(page, "/metrics").unwrap_or_default();
        let line = text.lines().find_map(|line| {
            let rest = line.strip_prefix("looptrain_telemetry_dropped_total{")?;
            rest.contains("signal=\"traces\"").then(|| rest.rsplit(' ').next())?
        });
        line.map_or(0.0, |number| number.parse().unwrap())
    };
    wait_until(|| dropped() > 0.0);
    let step = cluster.step();
    wait_until(|| cluster.step() > step + 100);
    let begin = Instant::now();
    cluster.order(&["stop"]);
    cluster.coordinator.end().stopped();
    assert_eq!(worker.end().code, Some(0));
    // Each process waits at its end for a few seconds for the last spans, logs and metrics to leave.
    assert!(begin.elapsed() < Duration::from_secs(30), "it took {:?}", begin.elapsed());
}
