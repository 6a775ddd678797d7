//! No worker outlives `looptrain train`, however that ends.

use crate::support::{Running, Scratch, is_gone, signal, signal_if_there, wait_until, workers_of};

/// A run in the middle of a stage that takes hours, and its two workers.
fn long_run(scratch: &Scratch) -> (Running, Vec<u32>) {
    let arguments = ["train", "spec.toml", "--workers", "2", "--set", "stages.0.steps=1000000"];
    let mut running = Running::start(scratch.command(&arguments));
    running.wait_for(|line| line.starts_with("step "));
    let workers = workers_of(running.id());
    assert_eq!(workers.len(), 2);
    assert!(!workers.iter().any(|worker| is_gone(*worker)));
    (running, workers)
}

#[test]
fn the_only_worker_comes_back_when_it_was_taken_for_dead() {
    let end = |stops: bool| {
        let scratch = Scratch::new();
        let arguments = ["train", "spec.toml", "--workers", "1", "--set", "stages.0.steps=400"];
        let impatient = ["--set", "cluster.worker_timeout=1.0"];
        let mut running = Running::start(scratch.command(&[&arguments[..], &impatient].concat()));
        if stops {
            running.wait_for(|line| line.starts_with("step "));
            let [worker] = workers_of(running.id())[..] else { panic!("one worker") };
            signal(worker, "STOP");
            running.wait_for(|line| line.contains("lost: silent for 1.0 s"));
            signal(worker, "CONT");
        }
        running.end().done()
    };
    let (undisturbed, stopped) = (end(false), end(true));
    assert_eq!(stopped.field("weights"), undisturbed.field("weights"), "{stopped:?}");
    assert!(stopped.stderr.contains("generation 2: 1 worker"), "{stopped:?}");
}

#[test]
fn a_second_interrupt_ends_the_workers_too() {
    let scratch = Scratch::new();
    let (mut running, workers) = long_run(&scratch);
    // Without this worker the step in flight does not end, and neither does the run.
    signal(workers[0], "STOP");
    running.signal("INT");
    running.wait_for(|line| line.starts_with("stopping at the next step"));
    running.signal("INT");
    assert_eq!(running.end().code, Some(130));
    wait_until(|| is_gone(workers[1]));
    signal_if_there(workers[0], "CONT");
    wait_until(|| is_gone(workers[0]));
}

#[test]
fn a_killed_parent_leaves_no_worker() {
    let scratch = Scratch::new();
    let (running, workers) = long_run(&scratch);
    running.signal("KILL");
    assert_eq!(running.end().code, None, "it died by the signal");
    wait_until(|| workers.iter().all(|worker| is_gone(*worker)));
}
