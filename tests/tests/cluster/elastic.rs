//! Workers that come and go in the middle of a run, with real processes.

use crate::support::{Running, Scratch, free_port};

/// Long enough for a process to start meanwhile, with no checkpoint but the last.
const LONG: [&str; 4] = ["--set", "stages.0.steps=900", "--set", "checkpoint.every_steps=100000"];

#[test]
fn a_worker_that_joins_in_the_middle_gets_the_state_from_its_peer_and_then_carries_the_run_alone() {
    let undisturbed = Scratch::new();
    let undisturbed =
        undisturbed.train(&[&["--workers", "1", "--threads", "1"], &LONG[..]].concat()).done();

    let scratch = Scratch::new();
    let listen = ["coordinator", "spec.toml", "--listen", "127.0.0.1:0"];
    let one = ["--set", "cluster.workers=1"];
    let mut coordinator =
        Running::start(scratch.command(&[&listen[..], &one[..], &LONG[..]].concat()));
    let line = coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = line.rsplit(' ').next().unwrap();
    let worker = ["worker", "--coordinator", url, "--threads", "1"];
    let first = Running::start(scratch.command(&worker));
    coordinator.wait_for(|line| line.starts_with("step "));
    let second = Running::start(scratch.command(&worker));
    // Generation 2 begins in the middle, at a step that no checkpoint holds.
    let formed = coordinator.wait_for(|line| line.starts_with("generation 2: 2 workers"));
    assert!(formed.contains("fetched the state and can take part"), "{formed}");
    first.signal("KILL");
    coordinator.wait_for(|line| line.starts_with("generation 3: 1 worker "));
    let end = second.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    let end = coordinator.end().done();
    assert!(!end.stderr.contains("back to step"), "no step was done twice: {end:?}");
    assert_eq!(end.field("weights"), undisturbed.field("weights"));
}

#[test]
fn workers_outlive_their_coordinator_and_lose_no_step() {
    let undisturbed = Scratch::new();
    let undisturbed =
        undisturbed.train(&[&["--workers", "2", "--threads", "2"], &LONG[..]].concat()).done();

    let scratch = Scratch::new();
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let command = [&["coordinator", "spec.toml", "--listen", &address][..], &LONG[..]].concat();
    let mut first = Running::start(scratch.command(&command));
    first.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = format!("http://{address}");
    let worker = ["worker", "--coordinator", &url, "--threads", "1"];
    let workers = [(); 2].map(|()| Running::start(scratch.command(&worker)));
    // Not before the workers hold a step: of the first one there may be no word on its way yet.
    let line = first.wait_for(|line| line.starts_with("step ") && step_of(line) > 1);
    first.signal("KILL");
    let killed_at = step_of(&line);

    let mut second = Running::start(scratch.command(&command));
    let formed = second.wait_for(|line| line.starts_with("generation "));
    assert!(formed.contains("which workers still hold"), "{formed}");
    let at: u64 =
        formed.split("at step ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    // The very newest is done again if it died with the coordinator before anybody was told.
    assert!(at + 1 >= killed_at && at < 900, "no step is lost that a worker holds: {formed}");
    for worker in workers {
        let end = worker.end();
        assert_eq!(end.code, Some(0), "{end:?}");
    }
    let end = second.end().done();
    assert_eq!(end.field("weights"), undisturbed.field("weights"));
    // The log has every step once, those included that the first coordinator had no time to write.
    let steps: Vec<_> = scratch.metrics().iter().map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, (1..=906).map(Some).collect::<Vec<_>>());
}

/// The step that a progress line tells of.
fn step_of(line: &str) -> u64 {
    line.trim_start_matches("step ").split('/').next().unwrap().parse().unwrap()
}
