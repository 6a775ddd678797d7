//! Real processes with real certificates, and others that have none.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::cluster::{Cluster, ENDLESS, certify, died_at};
use crate::ports::free_port;
use crate::support::{Scratch, wait_until};

/// Hurts a port for as long as it lives: silent connections, half a word of TLS, HTTP, noise, and greetings of
/// nobody. How many were opened, and how many were hung up on.
struct Flood {
    on: Arc<AtomicBool>,
    opened: Arc<AtomicUsize>,
    closed: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What junk says. The first is the beginning of a handshake whose rest never comes.
const JUNK: [&[u8]; 6] = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"looptrng\x08\x00\x00\x00\x01\x00\x00\x00",
    b"\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff\x00\xff",
    b"",
];

impl Flood {
    fn of(address: SocketAddr, connections: usize) -> Self {
        let [opened, closed] = [(); 2].map(|()| Arc::<AtomicUsize>::default());
        let on = Arc::new(AtomicBool::new(true));
        let (going, ins, outs) = (Arc::clone(&on), Arc::clone(&opened), Arc::clone(&closed));
        let thread = std::thread::spawn(move || {
            let mut open: Vec<TcpStream> = Vec::new();
            let look = |open: &mut Vec<TcpStream>| {
                open.retain_mut(|stream| match stream.read(&mut [0; 512]) {
                    Ok(1..) => true,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
                    Ok(0) | Err(_) => {
                        outs.fetch_add(1, Ordering::Relaxed);
                        false
                    }
                });
            };
            for number in 0..connections {
                if !going.load(Ordering::Relaxed) {
                    break;
                }
                if let Ok(mut stream) = TcpStream::connect(address) {
                    // It may be hung up on before it has spoken.
                    let _ = stream.write_all(JUNK[number % JUNK.len()]);
                    let _ = stream.set_nonblocking(true);
                    open.push(stream);
                    ins.fetch_add(1, Ordering::Relaxed);
                }
                if number % 16 == 0 {
                    look(&mut open);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            while going.load(Ordering::Relaxed) && !open.is_empty() {
                look(&mut open);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { on, opened, closed, thread: Some(thread) }
    }

    fn is_over(&self, connections: usize) -> bool {
        let closed = self.closed.load(Ordering::Relaxed);
        closed == connections && self.opened.load(Ordering::Relaxed) == connections
    }

    /// Whoever listened there is gone.
    fn is_gone(&self) -> bool {
        self.thread.as_ref().is_some_and(std::thread::JoinHandle::is_finished)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.on.store(false, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

#[test]
fn with_certificates_a_run_survives_kills_of_everybody_with_the_same_weights() {
    let mut cluster = Cluster::start_secured(2, &["--fault", "kill@decided:40"]);
    let _first = cluster.worker(&["--name", "first"]);
    let second = cluster.worker(&["--name", "second", "--fault", "kill@reduce:17"]);
    died_at(second, "reduce");
    let _third = cluster.worker(&["--name", "third"]);
    // The coordinator kills itself, too; the next one is found, with its certificate.
    cluster.restart();
    let log = cluster.finish();
    for world in [1, 2] {
        assert!(log.iter().any(|line| line["world"] == world), "there were steps by {world}");
    }
}

#[test]
fn a_thousand_junk_connections_to_every_port_do_not_stop_a_run() {
    const CONNECTIONS: usize = 1000;
    let page = format!("127.0.0.1:{}", free_port());
    let given = ENDLESS;
    let mut cluster = Cluster::start_secured(2, &[&["--dashboard", &page], &given[..]].concat());
    let peers: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let metrics: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let _first = cluster.worker(&["--name", "first", "--peer-listen", &peers.to_string()]);
    let second = cluster.worker(&["--name", "second", "--metrics", &metrics.to_string()]);
    cluster.formed(1);
    let coordinator: SocketAddr = cluster.url.trim_start_matches("https://").parse().unwrap();
    let ports = [coordinator, peers, page.parse().unwrap(), metrics];
    let floods: Vec<Flood> =
        ports.into_iter().map(|address| Flood::of(address, CONNECTIONS)).collect();
    // In the midst of it the ring forms anew, twice, and operators are heard.
    second.signal("KILL");
    cluster.formed(2);
    let _third = cluster.worker(&["--name", "third"]);
    cluster.formed(3);
    let before = cluster.step();
    wait_until(|| floods.iter().all(|flood| flood.is_over(CONNECTIONS) || flood.is_gone()));
    assert!(floods.iter().filter(|flood| flood.is_over(CONNECTIONS)).count() >= 3);
    let after = cluster.wait_for(|status| status["step"].as_u64() > Some(before + 20));
    assert_eq!(after["generation"], 3, "nobody was lost over it: {after:#}");
    let events = after["events"].to_string();
    assert!(!events.contains("silent"), "{events}");
    cluster.order(&["pause"]);
    cluster.resume();
    // With the weights of a run that nobody disturbed.
    let (end, _) = cluster.stop(&given);
    let refused = end.stderr.lines().filter(|line| line.contains("refused connections")).count();
    assert!((1..250).contains(&refused), "told of, and not a thousand times: {end:?}");
}

#[test]
fn who_has_the_wrong_certificate_or_none_is_told_so() {
    let mut cluster = Cluster::start_secured(1, &["--set", "stages.0.steps=1000000"]);
    let _worker = cluster.worker(&["--name", "worker"]);
    cluster.formed(1);
    let other = Scratch::new();
    certify(&other);
    let theirs = other.path("tls/worker");
    let (url, theirs) = (cluster.url.clone(), theirs.to_str().unwrap());
    let plain = url.replace("https", "http");
    let worker = |url: &str, more: &[&str]| {
        let worker = ["worker", "--coordinator", url, "--connect-timeout", "2"];
        cluster.scratch.run(&[&worker[..], more].concat())
    };
    worker(&url, &["--tls", theirs]).fails(1, &["signed by another authority"]);
    worker(&url, &["--tls", "tls/viewer"]).fails(1, &["viewer/test", "--role worker"]);
    worker(&url, &["--tls", "nowhere"]).fails(1, &["nowhere/ca.crt", "certs issue"]);
    worker(&url, &[]).fails(2, &["--tls DIR"]);
    worker(&plain, &["--tls", "tls/worker"]).fails(2, &["begins with https://"]);
    worker(&plain, &[]).fails(1, &["127.0.0.1"]);

    let order = |command: &str, role: &str| {
        let role = format!("tls/{role}");
        let order = [command, "--coordinator", &url, "--tls", &role];
        cluster.scratch.run(&order)
    };
    for command in ["pause", "resume", "stop"] {
        order(command, "viewer").fails(1, &["viewer/test", "--role operator"]);
        order(command, "worker").fails(1, &["--role operator"]);
    }
    assert_eq!(order("status", "viewer").code, Some(0));
    order("status", "worker").fails(1, &["--role viewer"]);
    let plainly = cluster.scratch.run(&["status", "--coordinator", &url]);
    plainly.fails(2, &["--tls DIR"]);
    // What is heard of it depends on who hangs up first.
    cluster.scratch.run(&["pause", "--coordinator", &plain]).fails(1, &[]);
    assert_eq!(order("stop", "operator").code, Some(0));
    let end = cluster.coordinator.end().stopped();
    assert!(end.stderr.contains("refused a connection"), "{end:?}");
}

#[test]
fn nobody_listens_to_other_machines_by_accident() {
    let scratch = Scratch::new();
    let remedies = ["--tls DIR", "certs", "--insecure"];
    let everywhere = ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"];
    for address in everywhere {
        let refused = |arguments: &[&str], flag: &str| {
            let end = scratch.run(&[arguments, &[flag, address]].concat());
            end.fails(2, &[&remedies[..], &[flag, address]].concat());
        };
        refused(&["coordinator", "spec.toml"], "--listen");
        refused(&["coordinator", "spec.toml"], "--dashboard");
        refused(&["train", "spec.toml"], "--dashboard");
        refused(&["worker", "--coordinator", "http://127.0.0.1:9"], "--peer-listen");
        refused(&["worker", "--coordinator", "http://127.0.0.1:9"], "--metrics");
    }
    // Told so explicitly, it does.
    let insecure = ["--workers", "1", "--until", "3", "--dashboard", "0.0.0.0:0", "--insecure"];
    scratch.train(&insecure).stopped();
    let both = scratch.run(&["coordinator", "spec.toml", "--tls", "tls", "--insecure"]);
    assert_eq!(both.code, Some(2), "{both:?}");
    certify(&scratch);
    let secured = ["--workers", "1", "--until", "6", "--dashboard", "0.0.0.0:0"];
    let end = scratch.train(&[&secured[..], &["--tls", "tls/coordinator"]].concat()).stopped();
    assert!(end.stderr.contains("status page on https://0.0.0.0:"), "{end:?}");
    let wrong = scratch.train(&[&secured[..], &["--tls", "tls/worker"]].concat());
    wrong.fails(1, &["worker/test", "--role coordinator"]);
}

#[test]
fn certificates_are_made_shown_and_not_written_over() {
    let scratch = Scratch::new();
    certify(&scratch);
    scratch.run(&["certs", "ca", "--to", "ca"]).fails(1, &["ca.crt is there already"]);
    let issue = ["certs", "issue", "--ca", "ca", "--role", "worker", "--name"];
    let to = ["--to", "tls/worker"];
    scratch.run(&[&issue[..], &["a"], &to].concat()).fails(1, &["--renew"]);
    scratch.run(&[&issue[..], &["a b"], &to].concat()).fails(1, &["no name"]);
    let renewed = scratch.run(&[&issue[..], &["a", "--days", "7", "--renew"], &to].concat());
    assert_eq!(renewed.last_line(), "spiffe://looptrain/worker/a for 7 days in tls/worker");

    let shown = scratch.run(&["certs", "show", "tls/worker"]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.stdout.contains("spiffe://looptrain/worker/a\n"), "{shown:?}");
    let shown = scratch.run(&["certs", "show", "tls/coordinator", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(shown["hosts"], serde_json::json!(["localhost", "127.0.0.1"]));
    assert_eq!((&shown["good"], &shown["days_left"]), (&true.into(), &365.into()));
    std::fs::copy(scratch.path("tls/viewer/tls.key"), scratch.path("tls/worker/tls.key")).unwrap();
    scratch.run(&["certs", "show", "tls/worker"]).fails(1, &["tls.key", "not the key of tls.crt"]);

    let made = scratch.run(&["certs", "token", "--to", "tokens"]);
    assert_eq!(made.code, Some(0), "{made:?}");
    let token = std::fs::read_to_string(scratch.path("tokens")).unwrap();
    assert_eq!(token.trim().len(), 64);
    scratch.run(&["certs", "token", "--to", "tokens"]).fails(1, &["tokens", "exists"]);
    let end = scratch.train(&["--dashboard", "127.0.0.1:0", "--page-tokens", "spec.toml"]);
    end.fails(1, &["spec.toml", "certs token"]);
    scratch.train(&["--page-tokens", "tokens"]).fails(2, &["--dashboard"]);
    scratch.train(&["--tls", "tls/coordinator"]).fails(2, &["--dashboard"]);

    // Another authority: both are believed until all certificates are of the new one.
    assert_eq!(scratch.run(&["certs", "ca", "--to", "other"]).code, Some(0));
    let issue = ["certs", "issue", "--role", "worker", "--name", "a", "--ca"];
    let renewed = scratch.run(&[&issue[..], &["other", "--renew"], &to].concat());
    assert_eq!(renewed.code, Some(0), "{renewed:?}");
    let believed = std::fs::read_to_string(scratch.path("tls/worker/ca.crt")).unwrap();
    assert_eq!(believed.matches("BEGIN CERTIFICATE").count(), 2);
    assert_eq!(scratch.run(&["certs", "show", "tls/worker"]).code, Some(0));
    scratch.run(&[&issue[..], &["other", "--to", "ca"]].concat()).fails(1, &["of an authority"]);
    std::fs::copy(scratch.path("ca/ca.key"), scratch.path("other/ca.key")).unwrap();
    let foreign = scratch.run(&[&issue[..], &["other", "--to", "tls/new"]].concat());
    foreign.fails(1, &["ca.key is not the key of"]);
}
