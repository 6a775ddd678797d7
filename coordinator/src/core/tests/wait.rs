//! Waiting for workers.

use super::*;

fn waits(rig: &Rig) -> Vec<(u32, u32)> {
    let wait = |event: &RunEvent| match event {
        RunEvent::Waiting { here, wanted } => Some((*here, *wanted)),
        _ => None,
    };
    rig.published.iter().filter_map(wait).collect()
}

/// A run of two workers that has lost both.
fn deserted() -> Rig {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    ids.into_iter().for_each(|worker| rig.kill(worker));
    rig
}

#[test]
fn a_run_that_begins_waits_for_all_its_workers_and_says_so() {
    let mut rig = Rig::new(&[]);
    rig.pass(29.0);
    assert_eq!(waits(&rig), []);
    rig.pass(2.0);
    assert_eq!(waits(&rig), [(0, 2)]);
    rig.join("w0");
    assert_eq!(waits(&rig), [(0, 2), (1, 2)]);
    rig.pass(65.0);
    assert_eq!(waits(&rig), [(0, 2), (1, 2), (1, 2), (1, 2)]);
    rig.pass(3600.0);
    assert_eq!(rig.phase(), "waiting");
    rig.join("w1");
    assert_eq!(rig.phase(), "forming");
}

#[test]
fn a_run_that_has_lost_everybody_goes_on_with_whoever_comes() {
    let mut rig = deserted();
    assert_eq!(waits(&rig).last(), Some(&(0, 2)));
    rig.pass(1000.0);
    assert_eq!(rig.phase(), "waiting");
    let one = rig.join("again");
    let reason = "waiting for 2 workers; only again is here; going on without the others after 5 s";
    assert_eq!(rig.core.snapshot(rig.now).reason, reason);
    rig.pass(4.0);
    assert_eq!(rig.phase(), "waiting");
    rig.pass(2.0);
    let form = rig.form_of(one);
    assert_eq!((form.members.len(), form.step), (1, 4));
    rig.run_to(10);
    assert_eq!(rig.outcome().weights_digest, Some(weights(Step(10))));
}

#[test]
fn who_comes_while_a_run_settles_is_let_in_and_restarts_the_wait() {
    let (mut rig, ids) = Rig::training(3, &[]);
    ids.into_iter().for_each(|worker| rig.kill(worker));
    rig.join("a");
    rig.pass(4.0);
    let second = rig.join("b");
    rig.pass(4.0);
    assert_eq!(rig.phase(), "waiting");
    rig.pass(2.0);
    assert_eq!(rig.form_of(second).members.len(), 2);
}

#[test]
fn who_comes_and_goes_does_not_hold_up_a_wait_for_those_that_hold_more() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(4);
    for _ in 0..3 {
        rig.pass(20.0);
        rig.prepare_all();
    }
    // All fall silent.
    (0..5).for_each(|_| {
        rig.now += Duration::from_secs(1);
        rig.feed(Event::Tick);
    });
    assert_eq!((rig.core.roster.len(), ids.len()), (0, 2));
    rig.join("a");
    rig.join("b");
    for _ in 0..10 {
        rig.pass(5.0);
        let flapping = rig.join("flapping");
        rig.pass(1.0);
        if rig.phase() != "waiting" {
            break;
        }
        rig.kill(flapping);
    }
    assert_eq!((rig.phase(), rig.core.committed), ("forming", Step(4)));
}

#[test]
fn all_that_are_wanted_need_not_wait() {
    let mut rig = deserted();
    rig.join("a");
    rig.join("b");
    assert_eq!(rig.phase(), "forming");
}

#[test]
fn a_resumed_run_gives_its_workers_a_minute_to_come_back() {
    let mark = Mark { step: Step(4), weights_digest: weights(Step(4)), record: None, trend: None };
    let mut rig = Rig::resumed(&[], Resume { checkpoint: Some(mark), ..Resume::default() });
    rig.pass(500.0);
    let one = rig.join("w0");
    rig.pass(59.0);
    assert_eq!(rig.phase(), "waiting");
    rig.pass(2.0);
    assert_eq!((rig.form_of(one).members.len(), rig.form_of(one).step), (1, 4));
}

#[test]
fn a_wait_does_not_end_while_its_coordinator_sleeps() {
    let mut rig = deserted();
    rig.join("again");
    rig.now += Duration::from_secs(3600);
    rig.feed(Event::Tick);
    assert_eq!(rig.phase(), "waiting", "the others slept as well and are on their way");
    rig.pass(3.0);
    assert_eq!(rig.phase(), "forming");
}
