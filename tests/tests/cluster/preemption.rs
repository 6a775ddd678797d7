//! Machines that are taken away after a notice: their workers leave before, and nobody waits.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, ENDLESS};
use crate::support::wait_until;

/// A metadata service as AWS has it: nothing without a token, and no token for a GET.
struct Service {
    url: String,
    /// The machine is to go.
    notice: Arc<AtomicBool>,
    /// Times that it was asked with a token, and had nothing to say.
    asked: Arc<AtomicU64>,
}

impl Service {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (notice, asked) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, counted) = (Arc::clone(&notice), Arc::clone(&asked));
        // Ends with the process of the tests.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (told, counted) = (Arc::clone(&told), Arc::clone(&counted));
                std::thread::spawn(move || answer(stream.unwrap(), &told, &counted));
            }
        });
        Self { url, notice, asked }
    }
}

/// Answers the requests of a connection, until there are no more.
fn answer(mut stream: TcpStream, notice: &AtomicBool, asked: &AtomicU64) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = move || -> Option<Vec<String>> {
        let head: Vec<String> =
            (&mut lines).map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        (!head.is_empty()).then_some(head)
    };
    while let Some(head) = next() {
        let has_token = head.iter().any(|line| line.ends_with("-token: secret"));
        let (status, body) = match head[0].as_str() {
            "PUT /latest/api/token HTTP/1.1" => ("200 OK", "secret"),
            "GET /latest/meta-data/spot/instance-action HTTP/1.1" if has_token => {
                if notice.load(Ordering::Relaxed) {
                    ("200 OK", r#"{"action": "terminate", "time": "2026-09-18T08:22:00Z"}"#)
                } else {
                    asked.fetch_add(1, Ordering::Relaxed);
                    ("404 Not Found", "")
                }
            }
            _ => ("401 Unauthorized", ""),
        };
        let length = body.len();
        let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
    }
}

#[test]
fn a_worker_whose_machine_is_to_be_preempted_leaves_and_nobody_waits_for_it() {
    let service = Service::start();
    let mut cluster = Cluster::start_with(&ENDLESS);
    let source = ["--preemption-notice", "aws", "--metadata-service", &service.url];
    let leaver = cluster.worker(&[&["--name", "spot"], &source[..]].concat());
    let _stays = cluster.worker(&["--name", "stays"]);
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    wait_until(|| service.asked.load(Ordering::Relaxed) > 0);
    service.notice.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    let end = leaver.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    let notice = "preemption notice: AWS will terminate this machine at 2026-09-18T08:22:00Z";
    assert!(end.stderr.contains(&format!("ended: {notice}")), "{end:?}");
    cluster.coordinator.wait_for(|line| line.contains(&format!("spot lost: it left: {notice}")));
    cluster.coordinator.wait_for(|line| line.starts_with("generation 2: 1 worker "));
    assert!(begin.elapsed() < Duration::from_secs(45), "nobody waits for a time-out of 60 s");
    cluster.stop(&ENDLESS);
}

#[test]
fn a_file_that_appears_has_a_worker_leave() {
    let mut cluster = Cluster::start_with(&ENDLESS);
    let notice = cluster.scratch.path("leave");
    let source = format!("file:{}", notice.display());
    let leaver = cluster.worker(&["--name", "node7", "--preemption-notice", &source]);
    let _stays = cluster.worker(&["--name", "stays"]);
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    std::fs::write(&notice, "maintenance of rack 4\n").unwrap();
    assert_eq!(leaver.end().code, Some(0));
    let left = "node7 lost: it left: preemption notice: maintenance of rack 4";
    cluster.coordinator.wait_for(|line| line.contains(left));
    cluster.coordinator.wait_for(|line| line.starts_with("generation 2: 1 worker "));
    cluster.stop(&ENDLESS);
}
