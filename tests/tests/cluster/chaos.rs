//! Everything that can happen to a cluster, one thing after the other, in one run; and the weights
//! come out as if nothing had.

use std::time::Duration;

use crate::cluster::stop;
use crate::ports::free_port;
use crate::support::{Running, Scratch, is_gone, state, wait_until};

/// Pause between two faults: long enough for steps to commit in between.
const CALM: Duration = Duration::from_millis(900);

/// A run that lasts until it is told to stop.
const LONG: [&str; 6] = [
    "--set",
    "stages.0.steps=1000000",
    "--set",
    "checkpoint.every_steps=1500",
    "--set",
    "cluster.worker_timeout=1.0",
];

struct Cluster {
    scratch: Scratch,
    address: String,
    coordinator: Running,
    workers: Vec<Running>,
}

impl Cluster {
    fn start() -> Self {
        let scratch = Scratch::new();
        let address = format!("127.0.0.1:{}", free_port());
        let coordinator = coordinator(&scratch, &address);
        let mut cluster = Self { scratch, address, coordinator, workers: Vec::new() };
        cluster.coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
        cluster.join();
        cluster.join();
        cluster
    }

    fn join(&mut self) {
        let url = format!("http://{}", self.address);
        let worker = ["worker", "--coordinator", &url, "--threads", "1"];
        self.workers.push(Running::start(self.scratch.command(&worker)));
    }

    /// Waits until a step is committed by what there is of the cluster now.
    fn commits(&mut self) {
        // What was printed before does not count.
        self.coordinator.skip();
        self.coordinator.wait_for(|line| line.starts_with("step "));
    }

    fn kill_worker(&mut self) {
        let victim = self.workers.remove(0);
        victim.signal("KILL");
        wait_until(|| is_gone(victim.id()));
    }

    fn freeze_worker(&mut self) {
        let victim = self.workers.remove(0);
        victim.signal("STOP");
        wait_until(|| state(victim.id()) == Some('T'));
        self.coordinator.wait_for(|line| line.contains("lost: silent for"));
        // It wakes up in a cluster that has gone on without it, and may come back.
        victim.signal("CONT");
        self.workers.push(victim);
    }

    fn tell_worker_to_leave(&mut self) {
        let leaver = self.workers.remove(0);
        leaver.signal("TERM");
        let end = leaver.end();
        assert_eq!(end.code, Some(0), "{end:?}");
    }

    fn kill_coordinator(&mut self) {
        self.coordinator.signal("KILL");
        wait_until(|| is_gone(self.coordinator.id()));
        self.coordinator = coordinator(&self.scratch, &self.address);
    }
}

/// Something that happens to a cluster.
type Fault = fn(&mut Cluster);

fn coordinator(scratch: &Scratch, address: &str) -> Running {
    let command = ["coordinator", "spec.toml", "--listen", address];
    Running::start(scratch.command(&[&command[..], &LONG[..]].concat()))
}

#[test]
fn kills_freezes_joins_leaves_and_failovers_change_no_bit_of_the_weights() {
    let mut cluster = Cluster::start();
    cluster.commits();
    let faults: [(&str, Fault); 8] = [
        ("a join", |cluster| cluster.join()),
        ("a worker's death", Cluster::kill_worker),
        ("the coordinator's death", Cluster::kill_coordinator),
        ("a frozen worker", Cluster::freeze_worker),
        ("another join", |cluster| cluster.join()),
        ("a farewell", Cluster::tell_worker_to_leave),
        ("the death of coordinator and worker", |cluster| {
            cluster.kill_worker();
            cluster.kill_coordinator();
            cluster.join();
        }),
        ("the coordinator's second death", Cluster::kill_coordinator),
    ];
    for (name, fault) in faults {
        eprintln!("{name}");
        fault(&mut cluster);
        cluster.commits();
        std::thread::sleep(CALM);
    }
    stop(&cluster.scratch, cluster.coordinator, &LONG);
}
