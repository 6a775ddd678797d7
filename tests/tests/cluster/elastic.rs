//! Workers that come and go in the middle of a run, with real processes.

use crate::cluster::{Cluster, ENDLESS, STEP, frozen_at, world};

#[test]
fn a_worker_that_joins_in_the_middle_gets_the_state_from_its_peer_and_then_carries_the_run_alone() {
    let mut cluster = Cluster::start(1, &[]);
    let mut first = cluster.worker(&["--fault", "stop@compute:17"]);
    assert_eq!(cluster.pause_at(&mut first, "compute"), STEP);
    let mut second = cluster.worker(&["--fault", "stop@compute:40"]);
    cluster.all_ready(2);
    cluster.resume();
    // Generation 2 begins in the middle, at a step that no checkpoint holds.
    let formed = cluster.formed(2);
    assert!(formed.starts_with("generation 2: 2 workers at step 17 "), "{formed}");
    assert!(formed.contains("fetched the state and can take part"), "{formed}");
    // The other one goes on, alone, when it is dead.
    assert_eq!(frozen_at(&mut second, "compute"), 40);
    first.signal("KILL");
    assert_eq!(first.end().code, None);
    second.signal("CONT");
    let formed = cluster.formed(3);
    assert!(formed.starts_with("generation 3: 1 worker at step 39 "), "{formed}");
    let log = cluster.finish();
    assert_eq!([STEP, STEP + 1, 39, 40].map(|step| world(&log, step)), [1, 2, 2, 1]);
    let end = second.end();
    assert_eq!(end.code, Some(0), "{end:?}");
}

#[test]
fn workers_outlive_their_coordinator_and_lose_no_step() {
    let mut cluster = Cluster::start_with(&ENDLESS);
    let workers = [(); 2].map(|()| cluster.worker(&[]));
    // Not before the workers hold a step: of the first one there may be no word on its way yet.
    let line = cluster.coordinator.wait_for(|line| line.starts_with("step ") && step_of(line) > 1);
    cluster.coordinator.signal("KILL");
    let killed_at = step_of(&line);

    cluster.restart();
    let formed = cluster.coordinator.wait_for(|line| line.starts_with("generation "));
    assert!(formed.contains("which workers still hold"), "{formed}");
    let at: u64 =
        formed.split("at step ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    // The very newest is done again if it died with the coordinator before anybody was told.
    assert!(at + 1 >= killed_at, "no step is lost that a worker holds: {formed}");
    cluster.coordinator.wait_for(|line| line.starts_with("step ") && step_of(line) > at);
    // The log has every step once, those included that the first coordinator had no time to write.
    cluster.stop(&ENDLESS);
    for worker in workers {
        let end = worker.end();
        assert_eq!(end.code, Some(0), "{end:?}");
    }
}

/// The step that a progress line tells of.
fn step_of(line: &str) -> u64 {
    line.trim_start_matches("step ").split('/').next().unwrap().parse().unwrap()
}
