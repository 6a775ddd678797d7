//! The status page in a real browser, while workers and the coordinator die.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::cluster::{Cluster, ENDLESS};
use crate::http::get;
use crate::others;
use crate::ports::free_port;
use crate::support::{Scratch, repository, wait_until};

/// `tests/browser/check.py`, with what it needs.
fn check(packages: &OsStr, page: SocketAddr) -> Command {
    let mut command = Command::new("python3");
    command
        .arg(repository().join("tests/browser/check.py"))
        .arg(format!("http://{page}/"))
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

#[test]
fn a_browser_shows_a_token_once_and_follows_the_run_over_https() {
    let Some(packages) = others::given("LOOPTRAIN_TEST_SELENIUM", "Selenium") else { return };
    let page: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let dashboard = page.to_string();
    let scratch = Scratch::new();
    assert_eq!(scratch.run(&["certs", "token", "--to", "tokens"]).code, Some(0));
    let alone = ["--set", "cluster.workers=1"];
    let more = [&["--dashboard", &dashboard, "--page-tokens", "tokens"][..], &alone].concat();
    let cluster = Cluster::secure(scratch, &[&ENDLESS[..], &more].concat());
    let _worker = cluster.worker(&["--name", "worker"]);
    cluster.wait_for(|status| status["step"].as_u64() > Some(0));
    let token = std::fs::read_to_string(cluster.scratch.path("tokens")).unwrap();
    let shots = std::env::var_os("LOOPTRAIN_TEST_SCREENSHOTS").map(Into::into);
    let shots = shots.unwrap_or_else(|| cluster.scratch.path("screenshots"));
    let mut command = Command::new("python3");
    command.arg(repository().join("tests/browser/login.py")).arg(format!("https://{page}/"));
    command.args(["--token", token.trim(), "--screenshots"]).arg(&shots);
    command.env("PYTHONPATH", &packages).env("PYTHONDONTWRITEBYTECODE", "1");
    let checked = command.output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    assert!(String::from_utf8_lossy(&checked.stdout).contains("ok: and after a reload"));
}

fn status(page: SocketAddr) -> Option<Value> {
    let (code, body) = get(page, "/api/status")?;
    (code == 200).then(|| serde_json::from_str(&body).unwrap())
}

/// A check that waits for the coordinator to go and to come back.
struct Watching(Child, BufReader<std::process::ChildStdout>);

impl Watching {
    fn start(mut command: Command) -> Self {
        command.arg("--gone").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self(child, said)
    }

    #[track_caller]
    fn says(&mut self, wanted: &str) {
        let mut line = String::new();
        while line.trim() != wanted {
            line.clear();
            assert_ne!(self.1.read_line(&mut line).unwrap(), 0, "it never said {wanted}");
        }
    }

    fn go_on(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_page_shows_a_run_with_deaths_in_it_and_its_history_outlives_the_coordinator() {
    let Some(packages) = others::given("LOOPTRAIN_TEST_SELENIUM", "Selenium") else { return };
    let page: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let dashboard = page.to_string();
    let more = [
        "--dashboard",
        &dashboard,
        "--set",
        "cluster.workers=2",
        "--set",
        "evaluation.every_steps=100",
        "--set",
        "checkpoint.every_steps=50",
        // Some steps, not hundreds, while the browser looks.
        "--set",
        "stages.0.slots=60",
    ];
    let mut cluster = Cluster::start_with(&[&ENDLESS[..], &more].concat());
    let _stays = cluster.worker(&["--name", "stays"]);
    let victim = cluster.worker(&["--name", "victim"]);
    cluster.wait_for(|status| status["checkpoint_step"].as_u64() > Some(0));
    victim.signal("KILL");
    assert_eq!(victim.end().code, None);
    let _heir = cluster.worker(&["--name", "heir"]);
    cluster.wait_for(|status| {
        let workers = status["workers"].as_array().unwrap();
        workers.iter().filter(|worker| worker["rank"].is_u64()).count() == 2
    });

    let expected = cluster.scratch.path("expected.json");
    let facts = json!({ "lost_worker": "victim", "min_generation": 3 });
    std::fs::write(&expected, facts.to_string()).unwrap();
    let shots = std::env::var_os("LOOPTRAIN_TEST_SCREENSHOTS").map(Into::into);
    let shots = shots.unwrap_or_else(|| cluster.scratch.path("screenshots"));
    let mut command = check(&packages, page);
    command.arg("--screenshots").arg(&shots).arg("--expect").arg(&expected);
    let checked = command.output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));

    let before = status(page).unwrap();
    let mut watching = Watching::start(check(&packages, page));
    watching.says("ready");
    cluster.coordinator.signal("KILL");
    watching.go_on();
    watching.says("unreachable");
    cluster.restart();
    watching.go_on();
    assert!(watching.0.wait().unwrap().success(), "the page recovers by itself");

    // Both workers have come back with what they held.
    wait_until(|| {
        status(page).is_some_and(|after| after["step"].as_u64() > before["step"].as_u64())
    });
    let after = status(page).unwrap();
    assert_eq!(after["incarnation"], 2);
    let kinds = |status: &Value| -> Vec<String> {
        let events = status["events"].as_array().unwrap().iter();
        events.map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
    };
    assert!(kinds(&after).contains(&"worker_lost".to_owned()), "{after:#}");
    assert_eq!(kinds(&after).iter().filter(|kind| *kind == "coordinator_started").count(), 2);
    let generations = after["generations"].as_array().unwrap();
    assert_eq!(generations[0], before["generations"][0], "the first one is still there");
    assert!(generations.last().unwrap()["generation"].as_u64() > before["generation"].as_u64());
    assert_eq!(after["goodput"]["since_unix_ms"], before["goodput"]["since_unix_ms"]);
    let seconds = |status: &Value, category: &str| status["goodput"]["seconds"][category].as_f64();
    assert!(seconds(&after, "recovering") > seconds(&before, "recovering"), "{after:#}");
    // What was booked in the last seconds before the kill is earned again.
    wait_until(|| {
        status(page)
            .is_some_and(|after| seconds(&after, "productive") > seconds(&before, "productive"))
    });
    let saved = after["checkpoints"].as_array().unwrap();
    assert!(saved.iter().any(|it| it["state"] == "verified"), "it went on from one: {saved:?}");
}
