//! Workers that cannot carry out a directive.

use super::*;

#[test]
fn a_loss_that_is_not_finite_ends_the_run_with_its_detail() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.failed(ids[1], Cause::NonFinite, "loss of slot 3 is NaN");
    assert_eq!(rig.failure(), "step 1 on w1: loss of slot 3 is NaN");
    assert!(ids.iter().all(|id| matches!(rig.last_sent(*id), Directive::Finish(_))));
}

#[test]
fn a_worker_that_cannot_read_its_data_is_sent_away() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.failed(ids[0], Cause::Store, "shard 3: hash is wrong");
    assert_eq!(rig.members(), [ids[1]]);
    let Directive::Finish(finish) = rig.last_sent(ids[0]) else { panic!("not sent away") };
    assert_eq!(finish.reason, "shard 3: hash is wrong");
}

#[test]
fn when_the_only_worker_fails_so_does_the_run() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.failed(ids[0], Cause::Internal, "out of memory");
    assert_eq!(rig.failure(), "w0, the only worker: out of memory");
}

#[test]
fn a_failure_of_an_older_generation_is_not_acted_on() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.kill(ids[2]);
    let (generation, step) = (Generation(1), Step(1));
    for cause in [Cause::Peer, Cause::Store, Cause::NonFinite] {
        rig.say(ids[0], Report::Failed { generation, step, cause, detail: "late".into() });
    }
    rig.pass(2.0);
    assert_eq!((rig.core.generation, rig.members().len()), (Generation(2), 2));
}

#[test]
fn a_broken_ring_waits_for_the_session_that_explains_it() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.failed(ids[0], Cause::Peer, "connection reset");
    rig.pass(0.5);
    assert_eq!(rig.core.generation, Generation(1));
    rig.kill(ids[1]);
    assert_eq!(rig.core.generation, Generation(2));
    rig.pass(2.0);
    assert_eq!(rig.core.generation, Generation(2));
}

#[test]
fn a_broken_ring_without_a_culprit_is_formed_again_after_a_second() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.failed(ids[0], Cause::Peer, "connection reset");
    rig.pass(1.5);
    assert_eq!((rig.core.generation, rig.members()), (Generation(2), ids));
}

#[test]
fn a_ring_that_never_holds_ends_the_run() {
    let (mut rig, ids) = Rig::training(2, &[]);
    for _ in 0..11 {
        rig.failed(ids[0], Cause::Peer, "no route to host");
        rig.pass(1.5);
        if rig.result.is_none() {
            rig.ready_all();
        }
    }
    assert!(rig.failure().contains("no route to host"), "{}", rig.failure());
}
