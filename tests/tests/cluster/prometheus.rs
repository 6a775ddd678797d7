//! Dashboards and alert rules against a real Prometheus that scrapes a real run, in which workers die.
//! Its rules run at sixty times their speed: an hour of theirs is a minute here.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use looptrain_proto::metrics::Reporter;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::{Cluster, ENDLESS};
use crate::http::{escaped, get};
use crate::others;
use crate::ports::free_port;
use crate::support::{SOON, Scratch, repository};

/// How much faster than they are written the rules run.
const SPEED: u64 = 60;

/// The rules with all their times divided by [`SPEED`].
fn faster(rules: &str) -> String {
    let mut out = String::new();
    let mut rest = rules;
    while let Some(at) = rest.find(|it: char| it.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let end = from.find(|it: char| !it.is_ascii_digit()).unwrap_or(from.len());
        let (digits, after) = from.split_at(end);
        let number: u64 = digits.parse().unwrap();
        let seconds = match after.chars().next() {
            Some('s') => Some(1),
            Some('m') => Some(60),
            Some('h') => Some(3600),
            Some('d') => Some(86_400),
            _ => None,
        };
        let is_time = ["[", ":", "offset ", "for: "].iter().any(|it| out.ends_with(it))
            && after[1..].starts_with([']', ':', '\n', ' ', ')']);
        match seconds {
            Some(seconds) if is_time => {
                out.push_str(&format!("{}ms", number * seconds * 1000 / SPEED));
                rest = &after[1..];
            }
            _ => {
                let is_age = out.ends_with("age_seconds > ");
                out.push_str(&if is_age { number / SPEED } else { number }.to_string());
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[test]
fn times_of_rules_can_be_sped_up() {
    let slow = "expr: rate(x_total[30m:15s] offset 5m) > 3.5 and x_age_seconds > 600\nfor: 1m\n";
    let fast = "expr: rate(x_total[30000ms:250ms] offset 5000ms) > 3.5 and x_age_seconds > 10\n\
                for: 1000ms\n";
    assert_eq!(faster(slow), fast);
}

/// A server of Prometheus in a directory of its own.
struct Prometheus {
    server: Child,
    address: SocketAddr,
    _directory: TempDir,
}

impl Prometheus {
    /// Scrapes a coordinator with a token, workers with the certificate of a viewer, and a GPU plainly;
    /// `run` is the directory with the credentials.
    fn start(
        folder: &Path,
        run: &Path,
        coordinator: SocketAddr,
        workers: &[SocketAddr],
        gpu: SocketAddr,
    ) -> Self {
        let directory = TempDir::new().unwrap();
        let rules = repository().join("ops/prometheus/alerts.yml");
        let rules = faster(&std::fs::read_to_string(rules).unwrap());
        std::fs::write(directory.path().join("alerts.yml"), rules).unwrap();
        let workers: Vec<String> = workers.iter().map(|it| format!("\"{it}\"")).collect();
        let configuration = format!(
            "global: {{ scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms }}\n\
             rule_files: [alerts.yml]\n\
             scrape_configs:\n\
             - job_name: looptrain-coordinator\n  \
               scheme: https\n  \
               tls_config: {{ ca_file: {viewer}/ca.crt }}\n  \
               authorization: {{ credentials_file: {token} }}\n  \
               static_configs: [{{ targets: [\"{coordinator}\"] }}]\n\
             - job_name: looptrain-worker\n  \
               scheme: https\n  \
               tls_config:\n    \
                 {{ ca_file: {viewer}/ca.crt, cert_file: {viewer}/tls.crt, key_file: {viewer}/tls.key }}\n  \
               static_configs: [{{ targets: [{}] }}]\n\
             - job_name: gpu\n  \
               static_configs: [{{ targets: [\"{gpu}\"], labels: {{ job: looptrain-worker }} }}]\n",
            workers.join(", "),
            viewer = run.join("tls/viewer").display(),
            token = run.join("tokens").display(),
        );
        std::fs::write(directory.path().join("prometheus.yml"), configuration).unwrap();
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let server = Command::new(folder.join("prometheus"))
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg(format!("--web.listen-address={address}"))
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Self { server, address, _directory: directory };
        let ready = || get(address, "/-/ready").is_some_and(|(status, _)| status == 200);
        prometheus.wait("it is ready", ready);
        prometheus
    }

    #[track_caller]
    fn wait(&self, what: &str, happened: impl Fn() -> bool) {
        let begin = Instant::now();
        while !happened() {
            assert!(begin.elapsed() < SOON, "it never came to that: {what}; {:?}", self.firing());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn ask(&self, path: &str) -> Value {
        let (status, body) = get(self.address, path).unwrap();
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &answer["status"]), (200, &"success".into()), "{path}: {answer}");
        answer["data"].clone()
    }

    /// How many series a query has a number for.
    fn series(&self, query: &str) -> usize {
        let answer = self.ask(&format!("/api/v1/query?query={}", escaped(query)));
        let number = |series: &&Value| {
            let value = series["value"][1].as_str().unwrap().parse::<f64>().unwrap();
            !value.is_nan()
        };
        match answer["resultType"].as_str() {
            Some("scalar") => 1,
            _ => answer["result"].as_array().unwrap().iter().filter(number).count(),
        }
    }

    /// Names of the alerts that fire.
    fn firing(&self) -> BTreeSet<String> {
        let alerts = self.ask("/api/v1/alerts");
        let firing = |alert: &&Value| alert["state"] == "firing";
        let alerts = alerts["alerts"].as_array().unwrap().iter().filter(firing);
        alerts.map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The dashboards, with their names.
fn dashboards() -> Vec<(&'static str, Value)> {
    let read = |name| {
        let file = repository().join(format!("ops/grafana/{name}.json"));
        let dashboard: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert!(dashboard["schemaVersion"].as_u64() >= Some(39), "{}", file.display());
        (name, dashboard)
    };
    ["run", "workers", "storage", "looplm"].map(read).to_vec()
}

/// Serves metrics of a GPU, of which the machines of these tests have none.
fn serve_a_gpu() -> SocketAddr {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let value = |label: &&str| match *label {
        "gpu" => "GPU-1",
        "severity" => "corrected",
        _ => "thermal",
    };
    let gpus = looptrain_proto::metrics::CATALOGUE.iter();
    let gpus = gpus.filter(|metric| metric.reporter == Reporter::Gpu).map(|metric| {
        let labels = metric.labels.iter().map(|label| format!("{label}=\"{}\"", value(label)));
        format!("{}{{{}}} 0\n", metric.prometheus(), labels.collect::<Vec<_>>().join(","))
    });
    let page: String = gpus.collect();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let kind = "Content-Type: text/plain; version=0.0.4";
            let _ = write!(stream, "HTTP/1.0 200 OK\r\n{kind}\r\n\r\n{page}");
        }
    });
    address
}

/// Title and query of each panel's targets, with the dashboards' variables filled in.
fn panels() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let query = target["expr"].as_str().unwrap();
                let query = query
                    .replace("$__rate_interval", "5s")
                    .replace("$__range", "1m")
                    .replace("$__interval", "1s");
                let query = ["$job", "$instance", "$run"]
                    .iter()
                    .fold(query, |query, variable| query.replace(variable, ".+"));
                assert!(!query.contains('$'), "{query}");
                found.push((format!("{name}: {}", panel["title"].as_str().unwrap()), query));
            }
        }
    }
    found
}

#[test]
fn every_panel_has_data_and_the_right_alerts_fire_in_a_run_whose_workers_die() {
    let Some(folder) = others::prometheus() else { return };
    for arguments in [
        ["check", "rules", "ops/prometheus/alerts.yml"],
        ["test", "rules", "ops/prometheus/alerts_test.yml"],
        ["check", "config", "ops/prometheus/prometheus.yml"],
    ] {
        let mut promtool = Command::new(folder.join("promtool"));
        let checked = promtool.args(arguments).current_dir(repository()).output().unwrap();
        assert!(checked.status.success(), "{arguments:?}: {checked:?}");
    }

    if let Some(packages) = others::given("LOOPTRAIN_TEST_GRAFANA", "grafana-foundation-sdk") {
        let mut build = Command::new("python3");
        build.args(["ops/grafana/build.py", "--check"]).env("PYTHONPATH", packages);
        build.env("PYTHONDONTWRITEBYTECODE", "1");
        let checked = build.current_dir(repository()).output().unwrap();
        assert!(checked.status.success(), "the dashboards are not what builds them: {checked:?}");
    }

    let local = || -> SocketAddr { ([127, 0, 0, 1], free_port()).into() };
    let (page, ports) = (local(), [local(), local()]);
    let dashboard = page.to_string();
    let more = [
        "--dashboard",
        &dashboard,
        "--page-tokens",
        "tokens",
        "--set",
        "cluster.workers=2",
        "--set",
        "cluster.peak_tflops=0.1",
        "--set",
        "evaluation.every_steps=40",
        "--set",
        "checkpoint.every_steps=25",
    ];
    // The token is there before the coordinator is.
    let scratch = Scratch::new();
    assert_eq!(scratch.run(&["certs", "token", "--to", "tokens"]).code, Some(0));
    let mut cluster = Cluster::secure(scratch, &[&ENDLESS[..], &more].concat());
    let start = |name: &str, port: SocketAddr| {
        cluster.worker(&["--name", name, "--metrics", &port.to_string()])
    };
    let stays = start("stays", ports[0]);
    let mut dies = start("dies-0", ports[1]);
    cluster.wait_for(|status| status["step"].as_u64() > Some(100));
    let run = cluster.scratch.path("");
    let prometheus = Prometheus::start(&folder, &run, page, &ports, serve_a_gpu());
    let committing = || prometheus.series("rate(looptrain_steps_total[2s]) > 0") > 0;
    prometheus.wait("it is scraped", committing);
    // For a few minutes of the rules' time.
    for _ in 0..20 {
        assert_eq!(prometheus.firing(), BTreeSet::new(), "all is well");
        std::thread::sleep(Duration::from_millis(200));
    }

    // Four are lost within half an hour of the rules' time, and replaced.
    for death in 1..=4 {
        dies.signal("KILL");
        assert_eq!(dies.end().code, None);
        dies = start(&format!("dies-{death}"), ports[1]);
        cluster.wait_for(|status| {
            let workers = status["workers"].as_array().unwrap();
            workers.iter().filter(|worker| worker["rank"].is_u64()).count() == 2
        });
    }
    // One who speaks another language is turned away, and counted.
    let mut stranger = std::net::TcpStream::connect(page).unwrap();
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    prometheus.wait("workers flap", || prometheus.firing().contains("LooptrainWorkersFlapping"));
    for (title, query) in panels() {
        prometheus.wait(&format!("{title} has data: {query}"), || prometheus.series(&query) > 0);
    }
    // What else may be true of a run that is hurt so on a busy machine.
    let excused = ["LooptrainWorkersFlapping", "LooptrainGoodputLow", "LooptrainStraggler"];
    let strange = |firing: BTreeSet<String>, expected: &[&str]| -> BTreeSet<String> {
        let known = |name: &String| excused.iter().chain(expected).any(|known| known == name);
        firing.into_iter().filter(|name| !known(name)).collect()
    };
    assert_eq!(strange(prometheus.firing(), &[]), BTreeSet::new());

    // Nobody commits any more, for a member does not move.
    stays.signal("STOP");
    prometheus.wait("nothing is committed", || prometheus.firing().contains("LooptrainNoCommit"));
    assert_eq!(strange(prometheus.firing(), &["LooptrainNoCommit"]), BTreeSet::new());
    stays.signal("CONT");
    prometheus.wait("it goes on", || !prometheus.firing().contains("LooptrainNoCommit"));

    cluster.coordinator.signal("KILL");
    let down = || prometheus.firing().contains("LooptrainCoordinatorDown");
    prometheus.wait("the coordinator is down", down);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    cluster.restart();
    prometheus.wait("it is back", || !down() && committing());
    // Of what was counted before, nothing is counted again: two workers have two seconds in each second.
    let much = format!(
        "looptrain_goodput_time_seconds_total{{category=\"productive\"}} > 2 * (time() - {since:.3})"
    );
    for _ in 0..20 {
        assert_eq!(prometheus.series(&much), 0, "more time than there is");
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(dies);
}

#[test]
fn dashboards_and_rules_ask_for_metrics_of_the_catalogue_alone() {
    let mut known: BTreeSet<String> = BTreeSet::new();
    for metric in looptrain_proto::metrics::CATALOGUE {
        let name = metric.prometheus();
        for suffix in ["_bucket", "_sum", "_count"] {
            known.insert(format!("{name}{suffix}"));
        }
        known.insert(name);
    }
    let rules = repository().join("ops/prometheus/alerts.yml");
    let rules = std::fs::read_to_string(rules).unwrap();
    let expressions = rules.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut asked: Vec<String> = expressions.map(str::to_owned).collect();
    asked.extend(panels().into_iter().map(|(_, query)| query));
    for (_, dashboard) in dashboards() {
        let variables = dashboard["templating"]["list"].as_array().unwrap().clone();
        asked.extend(variables.into_iter().map(|variable| variable["query"].to_string()));
    }
    let mut used = BTreeSet::new();
    for text in asked {
        let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_' || it == ':';
        for word in text.split(|it: char| !is_name(it)) {
            if word.starts_with("looptrain_") && !word.contains(':') {
                assert!(known.contains(word), "`{word}`, of `{text}`, is in no catalogue");
                used.insert(word.to_owned());
            }
        }
    }
    assert!(used.len() > 40, "{used:?}");
    // And every metric is to be seen somewhere.
    let unseen = looptrain_proto::metrics::CATALOGUE.iter().filter(|metric| {
        let name = metric.prometheus();
        let parts = ["", "_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}"));
        !parts.iter().any(|part| used.contains(part))
    });
    let unseen: Vec<&str> = unseen.map(|metric| metric.name).collect();
    assert!(unseen.is_empty(), "on no dashboard and in no rule: {unseen:?}");
}
