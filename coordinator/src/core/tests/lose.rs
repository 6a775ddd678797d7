//! Workers die, fall silent and leave.

use super::*;

#[test]
fn survivors_form_the_next_generation_and_retry_the_same_step() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.prepare_all();
    rig.prepare(ids[0]);
    rig.kill(ids[1]);
    let form = rig.form_of(ids[2]);
    assert_eq!((form.generation, form.rank, form.step), (2, 1, 1));
    rig.ready_all();
    let plans: Vec<(u64, u32, u32)> = [ids[0], ids[2]]
        .map(|worker| rig.plan_of(worker))
        .map(|plan| (plan.step, plan.slot_begin, plan.slot_end))
        .into();
    assert_eq!(plans, [(2, 0, 3), (2, 3, 5)]);
}

#[test]
fn a_commit_reaches_all_survivors_before_the_next_generation() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    rig.kill(ids[0]);
    let kinds: Vec<&Directive> = rig.sent[&ids[1]].iter().rev().take(3).collect();
    assert!(matches!(kinds[2], Directive::Commit(_)));
    assert!(matches!(kinds[1], Directive::Plan(_)));
    assert!(matches!(kinds[0], Directive::Form(v1::Form { step: 1, .. })));
}

#[test]
fn a_silent_worker_is_dead_after_the_timeout() {
    let (mut rig, ids) = Rig::training(2, &[]);
    for _ in 0..7 {
        rig.now += Duration::from_millis(500);
        rig.say(ids[0], Report::Heartbeat);
        rig.feed(Event::Tick);
    }
    assert_eq!(rig.members(), [ids[0]]);
    assert!(rig.closed.contains(&ids[1]));
    let lost = |event: &RunEvent| match event {
        RunEvent::WorkerLost { reason, .. } => Some(reason.clone()),
        _ => None,
    };
    assert_eq!(rig.published.iter().find_map(lost).unwrap(), "silent for 3.0 s");
}

#[test]
fn a_coordinator_that_was_frozen_itself_does_not_blame_its_workers() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.pass(1.0);
    rig.now += Duration::from_secs(60);
    rig.feed(Event::Tick);
    assert_eq!(rig.members(), ids);
}

#[test]
fn a_coordinator_that_was_frozen_for_less_than_the_timeout_does_not_blame_its_workers_either() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.pass(1.0);
    // The beats before the freeze were on time, and those after it have not been read yet.
    rig.now += Duration::from_millis(700);
    rig.feed(Event::Tick);
    rig.now += Duration::from_millis(2800);
    rig.feed(Event::Tick);
    assert_eq!(rig.members(), ids);
}

#[test]
fn a_worker_that_leaves_is_gone_at_once() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.say(ids[0], Report::Leave { reason: "preempted".into() });
    assert_eq!(rig.members(), [ids[1]]);
    assert_eq!(rig.core.generation, Generation(2));
    rig.kill(ids[0]);
    assert_eq!(rig.core.generation, Generation(2), "its closing stream says nothing new");
}

#[test]
fn when_nobody_is_left_the_run_goes_back_to_the_checkpoint() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    rig.kill(ids[0]);
    rig.kill(ids[1]);
    assert_eq!(rig.phase(), "waiting");
    let rewound = |event: &RunEvent| matches!(event, RunEvent::Rewound { to: Step(4), .. });
    let back = rig.join("w0");
    assert_eq!(rig.phase(), "waiting");
    assert!(!rig.published.iter().any(rewound), "somebody may come who holds more");
    rig.join("w1");
    assert!(rig.published.iter().any(rewound));
    let form = rig.form_of(back);
    assert_eq!(form.step, 4);
    rig.ready_all();
    assert_eq!(rig.plan_of(back).step, 5);
}

#[test]
fn without_a_checkpoint_the_run_goes_back_to_the_start() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    rig.kill(ids[0]);
    let back = rig.join("again");
    assert_eq!(rig.core.committed, Step(0));
    assert_eq!(rig.form_of(back).step, 0);
}

#[test]
fn a_manifest_under_way_decides_how_far_back_the_run_goes() {
    let (mut rig, ids) = Rig::training(1, &[]);
    (0..4).for_each(|_| rig.prepare_all());
    rig.saved_all();
    rig.kill(ids[0]);
    assert_eq!(rig.core.committed, Step(4), "nothing is undone before the store has answered");
    let again = rig.join("again");
    rig.manifest_written();
    assert_eq!(rig.form_of(again).step, 4);
}

#[test]
fn spares_take_over_when_all_members_are_lost() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.run_to(5);
    let spare = rig.join("spare");
    rig.kill(ids[0]);
    assert_eq!(rig.form_of(spare).step, 4);
}

#[test]
fn losing_a_spare_disturbs_nobody() {
    let (mut rig, _) = Rig::training(2, &[]);
    let spare = rig.join("spare");
    rig.kill(spare);
    assert_eq!(rig.core.generation, Generation(1));
    assert_eq!(rig.phase(), "training");
}

#[test]
fn a_spare_that_dies_while_others_hold_for_it_sets_them_free() {
    let (mut rig, ids) = Rig::training(2, &[]);
    let spare = rig.join("spare");
    rig.prepare_all();
    rig.say(spare, Report::Fetched { step: Step(1), result: Err("no route".into()) });
    (0..3).for_each(|_| rig.prepare_all());
    assert_eq!(rig.phase(), "waiting");
    rig.kill(spare);
    assert_eq!(rig.plan_of(ids[0]).step, 5);
}
