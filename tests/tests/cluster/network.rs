//! Workers that are cut off and found again, with nobody dead: packets vanish, connections stay.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cluster::stop;
use crate::support::{Running, Scratch};

/// A run that lasts until it is told to stop. Who is well is not silent for so long, however busy
/// the machine is.
const ENDLESS: [&str; 6] = [
    "--set",
    "stages.0.steps=1000000",
    "--set",
    "checkpoint.every_steps=1000000",
    "--set",
    "cluster.worker_timeout=12.0",
];

/// Cuts one of two workers off until the other has gone on alone, heals, waits until both train
/// together again, and compares with an undisturbed run to the same step.
fn cut_and_heal(
    scratch: &Scratch,
    mut coordinator: Running,
    cut: impl FnOnce(),
    heal: impl FnOnce(),
) {
    coordinator.wait_for(|line| line.starts_with("generation 1: 2 workers"));
    coordinator.wait_for(|line| line.starts_with("step "));
    cut();
    coordinator.wait_for(|line| line.contains("lost: silent for 12.0 s"));
    coordinator.wait_for(|line| line.starts_with("generation 2: 1 worker "));
    coordinator.skip();
    coordinator.wait_for(|line| line.starts_with("step "));
    heal();
    let formed = coordinator.wait_for(|line| line.starts_with("generation 3: 2 workers"));
    assert!(formed.contains("fetched the state and can take part"), "{formed}");
    coordinator.wait_for(|line| line.starts_with("step "));
    stop(scratch, coordinator, &ENDLESS);
}

/// Two network namespaces and the cable between them; removed with everything in them.
struct Cable {
    names: [String; 2],
}

const ENDS: [&str; 2] = ["10.83.7.1", "10.83.7.2"];

/// Runs `ip` with words from a sentence; whether it could.
fn ip(sentence: &str) -> bool {
    let output = Command::new("ip").args(sentence.split_whitespace()).output();
    output.is_ok_and(|output| output.status.success())
}

impl Cable {
    /// `None` where this user cannot have namespaces.
    fn lay() -> Option<Self> {
        let names = ["a", "b"].map(|end| format!("looptrain-{}-{end}", std::process::id()));
        let cable = Self { names };
        let [a, b] = &cable.names;
        let laid = cable.names.iter().all(|name| ip(&format!("netns add {name}")))
            && ip(&format!("-n {a} link add cable type veth peer name cable netns {b}"));
        if !laid {
            return None;
        }
        for (name, address) in cable.names.iter().zip(ENDS) {
            assert!(ip(&format!("-n {name} addr add {address}/30 dev cable")));
            assert!(ip(&format!("-n {name} link set cable up")));
            assert!(ip(&format!("-n {name} link set lo up")));
        }
        Some(cable)
    }

    /// The program at one end.
    fn run(&self, scratch: &Scratch, end: usize, arguments: &[&str]) -> Running {
        Running::start(scratch.command_by(&["ip", "netns", "exec", &self.names[end]], arguments))
    }

    /// Packets go to a card that is not there, and nobody is told.
    fn cut(&self) {
        for (name, other) in self.names.iter().zip(ENDS.iter().rev()) {
            let nobody = "lladdr 02:00:00:00:00:01 nud permanent";
            assert!(ip(&format!("-n {name} neigh replace {other} dev cable {nobody}")));
        }
    }

    fn heal(&self) {
        for (name, other) in self.names.iter().zip(ENDS.iter().rev()) {
            assert!(ip(&format!("-n {name} neigh del {other} dev cable")));
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn a_worker_whose_network_is_cut_comes_back_when_it_is_healed() {
    let Some(cable) = Cable::lay() else {
        // The next test cuts what any user can cut.
        return eprintln!("left out: it takes root and the `ip` command");
    };
    let scratch = Scratch::new();
    let listen = format!("{}:7400", ENDS[0]);
    let coordinator = ["coordinator", "spec.toml", "--listen", &listen, "--insecure"];
    let mut coordinator = cable.run(&scratch, 0, &[&coordinator[..], &ENDLESS].concat());
    coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = format!("http://{listen}");
    let _workers = [0, 1].map(|end| {
        let peers = format!("{}:0", ENDS[end]);
        let worker = ["worker", "--coordinator", &url, "--threads", "1", "--peer-listen", &peers];
        let worker = [&worker[..], &["--insecure"]].concat();
        cable.run(&scratch, end, &worker)
    });
    cut_and_heal(&scratch, coordinator, || cable.cut(), || cable.heal());
}

/// Passes bytes on in both directions while the way is open; keeps them back while it is not.
struct Proxy {
    address: String,
    closed: Arc<AtomicBool>,
}

impl Proxy {
    fn before(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let closed = Arc::new(AtomicBool::new(false));
        let gate = Arc::clone(&closed);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(&target));
                let Ok(server) = server else { continue };
                for (from, to) in
                    [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    let gate = Arc::clone(&gate);
                    std::thread::spawn(move || pass(from, to, &gate));
                }
            }
        });
        Self { address, closed }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, closed: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        while closed.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn a_worker_that_cannot_reach_the_coordinator_for_a_while_comes_back() {
    let scratch = Scratch::new();
    let listen = ["coordinator", "spec.toml", "--listen", "127.0.0.1:0"];
    let mut coordinator = Running::start(scratch.command(&[&listen[..], &ENDLESS].concat()));
    let line = coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = line.rsplit(' ').next().unwrap();
    let proxy = Proxy::before(url.trim_start_matches("http://").to_owned());
    let way = format!("http://{}", proxy.address);
    let _workers = [url, &way].map(|url| {
        Running::start(scratch.command(&["worker", "--coordinator", url, "--threads", "1"]))
    });
    let set = |closed| proxy.closed.store(closed, Ordering::Relaxed);
    cut_and_heal(&scratch, coordinator, || set(true), || set(false));
}
