//! The promise: the same weights, bit for bit, whatever the machines do.

use crate::support::{Running, Scratch, signal};

/// The weights of an undisturbed run.
fn undisturbed(scratch: &Scratch) -> String {
    scratch.train(&["--workers", "2", "--fresh"]).done().field("weights").to_owned()
}

#[test]
fn any_number_of_workers_gives_the_same_weights() {
    let scratch = Scratch::new();
    let weights = undisturbed(&scratch);
    for workers in ["1", "3"] {
        let end = scratch.train(&["--workers", workers, "--fresh"]).done();
        assert_eq!(end.field("weights"), weights, "{workers} workers");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_weights() {
    let scratch = Scratch::new();
    let weights = undisturbed(&scratch);
    for threads in ["1", "3", "8"] {
        let end = scratch.train(&["--workers", "1", "--threads", threads, "--fresh"]).done();
        assert_eq!(end.field("weights"), weights, "{threads} threads");
    }
}

/// Long enough that a signal arrives in the middle.
const LONGER: [&str; 4] = ["--set", "stages.0.steps=300", "--set", "checkpoint.every_steps=50"];

#[test]
fn a_run_that_is_stopped_and_resumed_gives_the_same_weights() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    for name in ["INT", "TERM"] {
        let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
        let mut running = Running::start(scratch.command(&fresh));
        running.wait_for(|line| line.starts_with("step "));
        running.signal(name);
        let stopped = running.end();
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
        assert!(stopped.last_line().starts_with("stopped "), "{stopped:?}");
        let step: u64 = stopped.field("step").parse().unwrap();
        assert!((1..306).contains(&step), "the stop came in the middle, not at step {step}");
        let resumed = scratch.train(&[&["--workers", "3"][..], &LONGER].concat()).done();
        assert!(
            resumed.stderr.contains(&format!("going on from the checkpoint of step {step}")),
            "{resumed:?}"
        );
        assert_eq!(resumed.field("weights"), straight.field("weights"), "stopped by SIG{name}");
        assert_eq!(resumed.field("tokens"), straight.field("tokens"));
    }
}

#[test]
fn everything_killed_at_once_resumes_from_the_newest_checkpoint() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
    let mut running = Running::start(scratch.command(&fresh));
    running.wait_for(|line| line.starts_with("checkpoint of step 50:"));
    running.signal("KILL");
    assert_eq!(running.end().code, None, "it died by the signal");
    let resumed = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    assert!(resumed.stderr.contains("going on from the checkpoint of step"), "{resumed:?}");
    assert_eq!(resumed.field("weights"), straight.field("weights"));
}

#[test]
fn a_killed_worker_changes_no_bit() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
    let mut running = Running::start(scratch.command(&fresh));
    running.wait_for(|line| line.starts_with("step "));
    signal(worker_of(running.id()), "KILL");
    let end = running.end().done();
    assert!(end.stderr.contains(" lost: "), "the fault was noticed: {end:?}");
    assert_eq!(end.field("weights"), straight.field("weights"));
}

/// Process id of a child of `parent`.
fn worker_of(parent: u32) -> u32 {
    let children = format!("/proc/{parent}/task");
    std::fs::read_dir(children)
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .find_map(|id| id.parse().ok())
        .expect("the run has worker processes")
}
