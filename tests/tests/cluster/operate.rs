//! What operators do to a running cluster, and machines that are not alike: with real processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, ENDLESS, STEP, frozen_at, undisturbed_until};
use crate::ports::free_port;
use crate::support::{Running, Scratch, signal, wait_until};

fn named(cluster: &Cluster, name: &str) -> Running {
    cluster.worker(&["--name", name])
}

fn worker<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["workers"].as_array()?.iter().find(|worker| worker["name"] == name)
}

#[test]
fn a_warm_spare_takes_the_place_of_a_killed_worker_and_no_step_is_done_again() {
    let mut cluster = Cluster::start(2, &["--set", "cluster.max_workers=2"]);
    let first = named(&cluster, "first");
    let holds = ["--fault", "stop@compute:17", "--fault", "stop@compute:19"];
    let mut second = cluster.worker(&[&["--name", "second"], &holds[..]].concat());
    assert_eq!(cluster.pause_at(&mut second, "compute"), STEP);
    let spare = named(&cluster, "spare");
    let status = cluster.all_ready(3);
    let there = worker(&status, "spare").unwrap();
    assert_eq!((&there["rank"], &there["warm"]), (&Value::Null, &true.into()), "{status:#}");
    cluster.resume();
    assert_eq!(frozen_at(&mut second, "compute"), 19);
    first.signal("KILL");
    assert_eq!(first.end().code, None);
    second.signal("CONT");
    // The generation without the dead one is the generation with the spare.
    let formed = cluster.formed(2);
    assert!(formed.starts_with("generation 2: 2 workers at step 18 "), "{formed}");
    let log = cluster.finish();
    assert!(log.iter().all(|line| line["world"] == 2));
    assert_eq!(spare.end().code, Some(0));
}

#[test]
fn a_spare_follows_a_stage_that_trains_the_gate_and_takes_over() {
    let alone = ["--set", "cluster.workers=1", "--set", "cluster.max_workers=1"];
    let gate = ["--set", "stages.0.objective=exit-gate"];
    let given = [&ENDLESS[..], &alone, &gate].concat();
    let mut cluster = Cluster::start_with(&given);
    let mut first = cluster.worker(&["--fault", "stop@compute:17", "--fault", "stop@compute:25"]);
    assert_eq!(cluster.pause_at(&mut first, "compute"), STEP);
    let _spare = named(&cluster, "spare");
    cluster.all_ready(2);
    cluster.resume();
    assert_eq!(frozen_at(&mut first, "compute"), 25);
    first.signal("KILL");
    assert_eq!(first.end().code, None);
    // A generation may have to end with its word of how far it came.
    let formed = cluster
        .coordinator
        .wait_for(|line| line.starts_with("generation ") && !line.starts_with("generation 1: "));
    let (_, at) = formed.split_once(": 1 worker at step ").expect(&formed);
    let at: u64 = at.split(' ').next().unwrap().parse().expect(&formed);
    // There is no checkpoint: it has what it has by updates, of which the last may still be on the
    // way when a machine dies.
    assert!(STEP < at && at <= 24, "{formed}");
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    cluster.stop(&given);
}

#[test]
fn a_drained_worker_leaves_a_paused_run_waits_and_a_stopped_one_goes_on_later() {
    let mut cluster = Cluster::start_with(&ENDLESS);
    let (stays, goes) = (named(&cluster, "stays"), named(&cluster, "goes"));
    cluster.coordinator.wait_for(|line| line.starts_with("step "));

    // There is no other checkpoint of this run.
    let said = cluster.order(&["save"]);
    let step = said.strip_prefix("the checkpoint of step ").and_then(|it| it.split_once(' '));
    let (step, end) = step.expect(&said);
    assert_eq!(end, "is saved", "{said}");
    assert_eq!(cluster.status()["checkpoint_step"].to_string(), step);

    let said = cluster.order(&["drain", "goes", "--reason", "a new disk"]);
    assert_eq!(said, "goes leaves after the step it computes");
    let end = goes.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.stderr.contains("ended: a new disk"), "{end:?}");
    assert!(cluster.formed(2).starts_with("generation 2: 1 worker "));
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
    // Nor under a coordinator that takes over.
    cluster.coordinator.signal("KILL");
    cluster.restart();
    cluster
        .coordinator
        .wait_for(|line| line.starts_with("the run is still paused: thunderstorm; "));
    let status = cluster.wait_for(|status| status["phase"] == "paused");
    assert_eq!((&status["step"], &status["reason"]), (&at.into(), &why.into()), "{status:#}");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.status()["step"], at, "nothing is committed in a pause");
    cluster.resume();
    cluster.wait_for(|status| status["step"].as_u64() > Some(at));
    assert!(cluster.order(&["resume"]).starts_with("the run was not paused; "));

    cluster.order(&["stop"]);
    let Cluster { coordinator, scratch, .. } = cluster;
    let end = coordinator.end().stopped();
    assert!(end.last_line().starts_with("stopped run=small step="), "{end:?}");
    assert_eq!(stays.end().code, Some(0));
    let later = end.step() + 20;
    let end = scratch.train(&[&ENDLESS[..], &["--until", &later.to_string()]].concat()).stopped();
    assert_eq!(end.step(), later);
    assert_eq!(end.field("weights"), undisturbed_until(later, &ENDLESS));
}

#[test]
fn a_slow_machine_gets_fewer_slots_and_is_named_as_a_straggler() {
    // Steps that take much longer than the naps of the slow worker.
    let given = [
        "--set",
        "stages.0.steps=1000000",
        "--set",
        "stages.0.slots=24",
        "--set",
        "stages.0.slot_sequences=40",
        "--set",
        "checkpoint.every_steps=1000000",
    ];
    let mut cluster = Cluster::start_with(&given);
    let (_fast, slow) = (named(&cluster, "fast"), named(&cluster, "slow"));
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    let on = Arc::new(AtomicBool::new(true));
    let (process, naps) = (slow.id(), Arc::clone(&on));
    let sleepy = std::thread::spawn(move || {
        while naps.load(Ordering::Relaxed) {
            // It naps four times as long as it was awake, however late this thread gets its turns.
            let awake = Instant::now();
            signal(process, "CONT");
            std::thread::sleep(Duration::from_millis(10));
            signal(process, "STOP");
            std::thread::sleep(4 * awake.elapsed());
        }
        signal(process, "CONT");
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
    cluster.stop(&given);
}

#[test]
fn workers_whose_coordinator_stays_away_leave_a_checkpoint_from_which_the_run_goes_on() {
    let mut cluster = Cluster::start(2, &["--fault", "kill@planned:18"]);
    let workers = [(); 2].map(|()| cluster.worker(&["--reconnect-timeout", "1"]));
    let died = |line: &str| line.starts_with("fault: kill at planned of step 18");
    cluster.coordinator.wait_for(died);
    for worker in workers {
        let end = worker.end();
        end.fails(1, &["no coordinator answers at", "the state of step 17", "as a checkpoint"]);
    }
    cluster.restart();
    let from = cluster.coordinator.wait_for(|line| line.starts_with("going on from"));
    assert_eq!(from, "going on from the checkpoint of step 17");
    let _workers = (named(&cluster, "a"), named(&cluster, "b"));
    cluster.finish();
}

/// Weights so large that no loss is a number.
const DIVERGED: [&str; 2] = ["--set", "model.initializer_range=1e30"];

#[test]
fn a_loss_that_is_no_number_ends_the_run_naming_the_place_or_skips_the_step_as_the_spec_says() {
    let end = Scratch::new().train(&[&["--workers", "2"], &DIVERGED[..]].concat());
    end.fails(1, &["step 1", "slot", "sequences", "NaN"]);

    let scratch = Scratch::new();
    let skip = ["--workers", "2", "--set", "optimizer.non_finite=skip"];
    let end = scratch.train(&[&skip[..], &DIVERGED].concat());
    end.fails(1, &["10 steps in a row had to be skipped", "step 10, slot 0", "NaN"]);
    assert!(end.stderr.contains("step 1 committed without an update: "), "{end:?}");
    let log = scratch.metrics();
    assert_eq!(log.len(), 10);
    for (line, step) in log.iter().zip(1..) {
        let slots = if step <= 8 { 6 } else { 5 };
        assert_eq!((&line["step"], &line["bad_slots"]), (&step.into(), &slots.into()), "{line}");
        assert!(line["skipped"].as_str().unwrap().contains(&format!("step {step}, slot 0")));
    }
}

#[test]
fn workers_of_a_machine_share_a_cache_of_the_dataset_and_say_where_its_blocks_came_from() {
    let cache = tempfile::tempdir().unwrap();
    let shared = ["--cache", cache.path().to_str().unwrap(), "--cache-gib", "1"];
    let cluster = Cluster::start(1, &[]);
    let _worker = cluster.worker(&shared);
    cluster.finish();
    assert!(cache.path().join("blocks").is_dir());

    // Another run, of another store, on the same text: the blocks are the same.
    let cluster = Cluster::start_with(&[&ENDLESS[..], &["--set", "cluster.workers=1"]].concat());
    let page = format!("127.0.0.1:{}", free_port());
    let _worker = cluster.worker(&[&shared[..], &["--metrics", &page]].concat());
    let from = |source: &str| {
        let text = get(&page, "/metrics");
        let label = format!("source=\"{source}\"");
        let is_it =
            |line: &&str| line.starts_with("looptrain_feed_blocks") && line.contains(&label);
        text.lines().find(is_it)?.rsplit(' ').next()?.parse::<f64>().ok()
    };
    wait_until(|| from("disk").is_some_and(|blocks| blocks > 0.0));
    assert_eq!(from("store"), Some(0.0), "the first has read them for all");
}

/// What a page says.
fn get(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(address) else { return String::new() };
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}
