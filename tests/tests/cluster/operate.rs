//! What operators do to a running cluster, and machines that are not alike: with real processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Running, Scratch, free_port, signal};

/// Long enough for a person to step in, with no checkpoint but the last.
const LONG: [&str; 4] = ["--set", "stages.0.steps=900", "--set", "checkpoint.every_steps=100000"];

struct Cluster {
    scratch: Scratch,
    url: String,
    coordinator: Running,
}

impl Cluster {
    fn start(given: &[&str]) -> Self {
        let scratch = Scratch::new();
        let address = format!("127.0.0.1:{}", free_port());
        let command = ["coordinator", "spec.toml", "--listen", &address];
        let mut coordinator = Running::start(scratch.command(&[&command[..], given].concat()));
        coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
        Self { scratch, url: format!("http://{address}"), coordinator }
    }

    fn worker(&self, name: &str) -> Running {
        let worker = ["worker", "--coordinator", &self.url, "--threads", "1", "--name", name];
        Running::start(self.scratch.command(&worker))
    }

    /// Runs an operator's command; the one line that it prints.
    #[track_caller]
    fn order(&self, command: &[&str]) -> String {
        let end = self.scratch.run(&[command, &["--coordinator", &self.url]].concat());
        assert_eq!(end.code, Some(0), "{end:?}");
        end.last_line().to_owned()
    }

    fn status(&self) -> Value {
        let end = self.scratch.run(&["status", "--coordinator", &self.url, "--json"]);
        serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"))
    }

    /// Waits until the status is as wanted.
    #[track_caller]
    fn wait_for(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "it never came to that: {status:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn undisturbed(given: &[&str]) -> String {
    let end = Scratch::new().train(&[&["--workers", "1", "--threads", "2"], given].concat());
    end.done().field("weights").to_owned()
}

fn worker<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["workers"].as_array()?.iter().find(|worker| worker["name"] == name)
}

#[test]
fn a_warm_spare_takes_the_place_of_a_killed_worker_and_no_step_is_done_again() {
    let given = [&LONG[..], &["--set", "cluster.max_workers=2"]].concat();
    let mut cluster = Cluster::start(&given);
    let (first, _second) = (cluster.worker("first"), cluster.worker("second"));
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    let spare = cluster.worker("spare");
    let warm =
        |status: &Value| worker(status, "spare").is_some_and(|worker| worker["warm"] == true);
    let status = cluster.wait_for(warm);
    assert_eq!(worker(&status, "spare").unwrap()["rank"], Value::Null, "{status:#}");
    first.signal("KILL");
    // The generation without the dead one is the generation with the spare.
    let formed = cluster.coordinator.wait_for(|line| line.starts_with("generation 2: "));
    assert!(formed.starts_with("generation 2: 2 workers at step "), "{formed}");
    let begun = cluster.coordinator.wait_for(|line| line.starts_with("step "));
    assert!(!begun.starts_with("step 906/"), "long before the end: {begun}");
    let end = cluster.coordinator.end().done();
    assert!(!end.stderr.contains("back to step"), "{end:?}");
    assert_eq!(spare.end().code, Some(0));
    assert_eq!(end.field("weights"), undisturbed(&LONG));
}

#[test]
fn a_drained_worker_leaves_a_paused_run_waits_and_a_stopped_one_goes_on_later() {
    let mut cluster = Cluster::start(&LONG);
    let (stays, goes) = (cluster.worker("stays"), cluster.worker("goes"));
    cluster.coordinator.wait_for(|line| line.starts_with("step "));

    let said = cluster.order(&["drain", "goes", "--reason", "a new disk"]);
    assert_eq!(said, "goes leaves after the step it computes");
    let end = goes.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.stderr.contains("ended: a new disk"), "{end:?}");
    cluster.coordinator.wait_for(|line| line.starts_with("generation 2: 1 worker "));
    let refused = cluster.scratch.run(&["drain", "stays", "--coordinator", &cluster.url]);
    refused.fails(1, &["stays is the last worker that trains"]);
    let refused = cluster.scratch.run(&["drain", "nobody", "--coordinator", &cluster.url]);
    refused.fails(1, &["there is no worker nobody; there are stays"]);

    cluster.order(&["pause", "--reason", "thunderstorm"]);
    let status = cluster.wait_for(|status| status["phase"] == "paused");
    let (at, why) = (status["step"].as_u64().unwrap(), status["reason"].as_str().unwrap());
    assert_eq!(why, format!("paused at step {at}: thunderstorm"));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.status()["step"], at, "nothing is committed in a pause");
    cluster.order(&["resume"]);
    cluster.wait_for(|status| status["step"].as_u64() > Some(at));

    cluster.order(&["stop"]);
    let end = cluster.coordinator.end();
    assert!(
        end.code == Some(0) && end.last_line().starts_with("stopped run=small step="),
        "{end:?}"
    );
    assert_eq!(stays.end().code, Some(0));
    let end = cluster.scratch.train(&LONG).done();
    assert_eq!(end.field("weights"), undisturbed(&LONG));
}

#[test]
fn a_slow_machine_gets_fewer_slots_and_is_named_as_a_straggler() {
    // Steps that take much longer than the naps of the slow worker.
    let given = [
        "--set",
        "stages.0.steps=40",
        "--set",
        "stages.0.slots=24",
        "--set",
        "stages.0.slot_sequences=40",
        "--set",
        "checkpoint.every_steps=100000",
    ];
    let mut cluster = Cluster::start(&given);
    let (_fast, slow) = (cluster.worker("fast"), cluster.worker("slow"));
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    let on = Arc::new(AtomicBool::new(true));
    let (process, naps) = (slow.id(), Arc::clone(&on));
    let sleepy = std::thread::spawn(move || {
        while naps.load(Ordering::Relaxed) {
            signal(process, "STOP");
            std::thread::sleep(Duration::from_millis(30));
            signal(process, "CONT");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let slots = |status: &Value, name| worker(status, name).and_then(|w| w["slots"].as_u64());
    let uneven = |status: &Value| {
        let (fast, slow) = (slots(status, "fast"), slots(status, "slow"));
        fast.zip(slow).is_some_and(|(fast, slow)| slow > 0 && fast >= 2 * slow)
    };
    cluster.wait_for(uneven);
    cluster.coordinator.wait_for(|line| line.contains("worker slow straggles in compute: "));
    on.store(false, Ordering::Relaxed);
    sleepy.join().unwrap();
    let end = cluster.coordinator.end().done();
    assert_eq!(end.field("weights"), undisturbed(&given));
}

#[test]
fn workers_whose_coordinator_stays_away_leave_a_checkpoint_from_which_the_run_goes_on() {
    let scratch = Scratch::new();
    let address = format!("127.0.0.1:{}", free_port());
    let command = [&["coordinator", "spec.toml", "--listen", &address][..], &LONG[..]].concat();
    let mut coordinator = Running::start(scratch.command(&command));
    coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = format!("http://{address}");
    let worker = ["worker", "--coordinator", &url, "--threads", "1", "--reconnect-timeout", "1"];
    let workers = [(); 2].map(|()| Running::start(scratch.command(&worker)));
    let step =
        |line: &str| -> Option<u64> { line.strip_prefix("step ")?.split('/').next()?.parse().ok() };
    // Of the first step there may be no word on its way to the workers yet.
    let line = coordinator.wait_for(|line| step(line).is_some_and(|step| step > 1));
    let seen = step(&line).unwrap();
    coordinator.signal("KILL");
    for worker in workers {
        let end = worker.end();
        end.fails(1, &["no coordinator answers at", "the state of step", "as a checkpoint"]);
    }
    let coordinator = Running::start(scratch.command(&command));
    let mut cluster = Cluster { coordinator, scratch, url };
    let line =
        cluster.coordinator.wait_for(|line| line.starts_with("going on from the checkpoint"));
    let from: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    // The newest may have died with the coordinator before any worker was told to commit it.
    assert!(from + 1 >= seen, "no step is lost that a worker holds: {line}, after {seen}");
    let _workers = (cluster.worker("a"), cluster.worker("b"));
    let Cluster { coordinator, scratch, .. } = cluster;
    assert_eq!(coordinator.end().done().field("weights"), undisturbed(&LONG));
    let log: Vec<_> = scratch.metrics().iter().map(|line| line["step"].as_u64()).collect();
    assert!(log.is_sorted_by(|a, b| a < b) && log.last() == Some(&Some(906)), "{log:?}");
}
