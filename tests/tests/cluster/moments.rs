//! Processes that die, freeze or leave at exact moments of a step. Whatever the moment, the run
//! ends with the weights of an undisturbed one, and every step is committed once.

use std::time::{Duration, Instant};

use crate::cluster::{Cluster, STEP, died_at, frozen_at, world};
use crate::support::{Running, wait_until};

/// `stop@reduce:17`
fn fault(action: &str, moment: &str) -> String {
    format!("{action}@{moment}:{STEP}")
}

/// One of three workers dies; by how many the step is committed then.
fn step_of_a_worker_that_dies_at(moment: &str) -> u64 {
    let cluster = Cluster::start(3, &[]);
    let victim = cluster.worker(&["--fault", &fault("kill", moment)]);
    let _others = [cluster.worker(&[]), cluster.worker(&[])];
    assert_eq!(died_at(victim, moment), STEP);
    let log = cluster.finish();
    assert_eq!((world(&log, STEP - 1), world(&log, STEP + 1)), (3, 2));
    world(&log, STEP)
}

#[test]
fn a_worker_dies_while_it_computes_and_the_step_is_done_by_the_others() {
    assert_eq!(step_of_a_worker_that_dies_at("compute"), 2);
}

#[test]
fn a_worker_dies_in_the_middle_of_the_all_reduce_and_the_step_is_done_by_the_others() {
    assert_eq!(step_of_a_worker_that_dies_at("reduce"), 2);
}

#[test]
fn a_worker_dies_when_it_has_voted_and_its_vote_counts() {
    assert_eq!(step_of_a_worker_that_dies_at("prepared"), 3);
}

#[test]
fn a_worker_dies_with_the_commit_in_its_hand_and_the_others_have_committed() {
    assert_eq!(step_of_a_worker_that_dies_at("commit"), 3);
}

#[test]
fn a_worker_dies_while_all_votes_are_in_and_nobody_has_been_told() {
    let mut cluster = Cluster::start(3, &["--fault", &fault("stop", "decided")]);
    let workers = [(); 3].map(|()| cluster.worker(&[]));
    assert_eq!(frozen_at(&mut cluster.coordinator, "decided"), STEP);
    let [victim, _others @ ..] = workers;
    victim.signal("KILL");
    assert_eq!(victim.end().code, None);
    cluster.coordinator.signal("CONT");
    let log = cluster.finish();
    assert_eq!((world(&log, STEP), world(&log, STEP + 1)), (3, 2));
}

/// Two members and another worker that fetches the state from them: the run is paused meanwhile, so
/// that it cannot end before.
fn two_and_a_joiner(member: &[&str], joiner: &[&str]) -> (Cluster, [Running; 2], Running) {
    let mut cluster = Cluster::start(2, &[]);
    let holds = fault("stop", "compute");
    let mut members = [cluster.worker(member), cluster.worker(&["--fault", &holds])];
    assert_eq!(cluster.pause_at(&mut members[1], "compute"), STEP);
    let joiner = cluster.worker(joiner);
    cluster.coordinator.wait_for(|line| line.ends_with("joined as a spare"));
    (cluster, members, joiner)
}

#[test]
fn a_worker_dies_while_it_sends_the_state_to_a_joiner_which_gets_the_rest_from_another() {
    let (mut cluster, [member, _other], _joiner) =
        two_and_a_joiner(&["--fault", "kill@serving"], &[]);
    assert_eq!(died_at(member, "serving"), STEP);
    cluster.coordinator.wait_for(|line| line.contains("lost: "));
    cluster.all_ready(2);
    cluster.resume();
    let log = cluster.finish();
    assert_eq!((world(&log, STEP), world(&log, STEP + 1)), (2, 2));
    let generation = |step: u64| log[step as usize - 1]["generation"].as_u64();
    assert!(generation(STEP + 1) > Some(1), "the joiner has taken the place of the dead");
}

#[test]
fn a_joiner_dies_with_the_state_in_its_hand_and_the_members_do_not_notice() {
    let (cluster, [_member, _other], joiner) = two_and_a_joiner(&[], &["--fault", "kill@fetched"]);
    assert_eq!(died_at(joiner, "fetched"), STEP);
    cluster.resume();
    let log = cluster.finish();
    assert!(log.iter().all(|line| line["generation"] == 1 && line["world"] == 2));
}

/// One of three workers freezes until it is taken for dead. The others go on without it, for two
/// steps or three; then one of them holds the run, so that the first can wake up and come back in time.
fn freezes_at(moment: &str) {
    // Longer than a busy machine leaves a worker that is well without a turn.
    const TIMEOUT: Duration = Duration::from_secs(12);
    let timeout = ["--set", "cluster.worker_timeout=12.0"];
    let mut cluster = Cluster::start(3, &timeout);
    let mut victim = cluster.worker(&["--fault", &fault("stop", moment)]);
    // With the vote of one that freezes then, step 17 is still committed by three.
    let later = format!("stop@compute:{}", STEP + 2);
    let mut other = cluster.worker(&["--fault", &later]);
    let _third = cluster.worker(&[]);
    assert_eq!(frozen_at(&mut victim, moment), STEP);
    let frozen = Instant::now();
    cluster.coordinator.wait_for(|line| line.contains("lost: silent for 12.0 s"));
    let silent = frozen.elapsed();
    assert!(silent < 3 * TIMEOUT, "it was missed only after {silent:?}");
    assert!(cluster.formed(2).contains(": 2 workers"));
    assert_eq!(cluster.pause_at(&mut other, "compute"), STEP + 2);
    victim.signal("CONT");
    cluster.all_ready(3);
    cluster.resume();
    let log = cluster.finish();
    let worlds = [STEP - 1, STEP + 1, STEP + 2, STEP + 3].map(|step| world(&log, step));
    assert_eq!(worlds, [3, 2, 2, 3]);
}

#[test]
fn a_worker_freezes_in_the_middle_of_the_all_reduce() {
    freezes_at("reduce");
}

#[test]
fn a_worker_freezes_when_it_has_voted() {
    freezes_at("prepared");
}

#[test]
fn a_worker_that_is_told_to_leave_in_the_middle_of_the_all_reduce_commits_the_step_first() {
    let mut cluster = Cluster::start(3, &[]);
    let mut leaver = cluster.worker(&["--fault", &fault("stop", "reduce")]);
    let _others = [cluster.worker(&[]), cluster.worker(&[])];
    assert_eq!(frozen_at(&mut leaver, "reduce"), STEP);
    leaver.signal("TERM");
    leaver.signal("CONT");
    let begin = Instant::now();
    let end = leaver.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.stderr.contains("ended: told to stop"), "{end:?}");
    cluster.coordinator.wait_for(|line| line.contains("lost: it left"));
    assert!(begin.elapsed() < Duration::from_secs(45), "nobody waits for a time-out of 60 s");
    let log = cluster.finish();
    assert_eq!((world(&log, STEP), world(&log, log.len() as u64)), (3, 2));
}

/// The coordinator dies while one of three workers is frozen at a moment of step 17 and step
/// `committed` is the newest; the next one goes on from there.
fn coordinator_dies_while_a_worker_is_at(moment: &str, committed: u64) {
    let mut cluster = Cluster::start(3, &[]);
    let mut worker = cluster.worker(&["--fault", &fault("stop", moment)]);
    let _others = [cluster.worker(&[]), cluster.worker(&[])];
    assert_eq!(frozen_at(&mut worker, moment), STEP);
    wait_until(|| cluster.step() == committed);
    cluster.coordinator.signal("KILL");
    cluster.restart();
    worker.signal("CONT");
    let formed = cluster.formed(2);
    assert!(formed.contains(&format!("3 workers at step {committed} (")), "{formed}");
    assert!(formed.contains("which workers still hold"), "{formed}");
    cluster.finish();
}

#[test]
fn the_coordinator_dies_while_a_worker_computes() {
    coordinator_dies_while_a_worker_is_at("compute", STEP - 1);
}

#[test]
fn the_coordinator_dies_in_the_middle_of_the_all_reduce() {
    coordinator_dies_while_a_worker_is_at("reduce", STEP - 1);
}

#[test]
fn the_coordinator_dies_when_the_others_have_committed_what_one_has_only_prepared() {
    coordinator_dies_while_a_worker_is_at("prepared", STEP);
}

#[test]
fn the_coordinator_dies_while_a_worker_has_the_commit_in_its_hand() {
    coordinator_dies_while_a_worker_is_at("commit", STEP);
}

#[test]
fn the_coordinator_dies_while_a_worker_sends_the_state_to_a_joiner() {
    let (mut cluster, [mut member, _other], _joiner) =
        two_and_a_joiner(&["--fault", "stop@serving"], &[]);
    assert!(frozen_at(&mut member, "serving") >= 1);
    cluster.coordinator.signal("KILL");
    cluster.restart();
    member.signal("CONT");
    // The joiner may have been told of generation 2 already, with the chunks of another member.
    let formed = cluster.coordinator.wait_for(|line| line.starts_with("generation "));
    assert!(formed.contains("which workers still hold"), "{formed}");
    // The pause has outlived it.
    cluster.resume();
    cluster.finish();
}

/// The coordinator dies at a moment of its own in step 17; the next one goes on from `committed`.
fn coordinator_dies_at(moment: &str, committed: u64) {
    let mut cluster = Cluster::start(3, &["--fault", &fault("kill", moment)]);
    let _workers = [(); 3].map(|()| cluster.worker(&[]));
    cluster
        .coordinator
        .wait_for(|line| line.starts_with(&format!("fault: kill at {moment} of step {STEP}")));
    cluster.restart();
    let formed = cluster.formed(2);
    assert!(formed.contains(&format!("3 workers at step {committed} (")), "{formed}");
    cluster.finish();
}

#[test]
fn the_coordinator_dies_when_it_has_planned_a_step() {
    coordinator_dies_at("planned", STEP - 1);
}

#[test]
fn the_coordinator_dies_with_some_of_the_votes() {
    coordinator_dies_at("vote", STEP - 1);
}

#[test]
fn the_coordinator_dies_with_all_votes_before_anybody_is_told_and_the_step_is_done_again() {
    coordinator_dies_at("decided", STEP - 1);
}

#[test]
fn the_coordinator_dies_when_one_has_been_told_to_commit_and_the_others_commit_it_too() {
    coordinator_dies_at("committing", STEP);
}
