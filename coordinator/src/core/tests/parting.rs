//! Workers that were told to leave.

use super::*;

fn leaves(rig: &mut Rig, worker: WorkerId) {
    rig.say(worker, Report::Leaving { reason: "SIGTERM".into() });
}

fn may_go(rig: &Rig, worker: WorkerId) -> bool {
    rig.sent[&worker].iter().any(|message| matches!(message, Directive::Drain(_)))
}

fn goes(rig: &mut Rig, worker: WorkerId) {
    rig.say(worker, Report::Leave { reason: "SIGTERM".into() });
}

#[test]
fn who_leaves_others_behind_may_go_at_once() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(2);
    leaves(&mut rig, ids[0]);
    assert!(may_go(&rig, ids[0]) && !may_go(&rig, ids[1]));
    assert_eq!(rig.phase(), "training");
    rig.prepare_all();
    goes(&mut rig, ids[0]);
    rig.ready_all();
    assert_eq!((rig.plan_of(ids[1]).step, rig.saves(ids[1]).len()), (4, 0));
}

#[test]
fn the_last_ones_go_when_a_checkpoint_holds_what_they_do() {
    for together in [true, false] {
        let (mut rig, ids) = Rig::training(2, &[]);
        rig.run_to(2);
        leaves(&mut rig, ids[0]);
        if !together {
            rig.prepare_all();
            goes(&mut rig, ids[0]);
            rig.ready_all();
        }
        leaves(&mut rig, ids[1]);
        assert!(!may_go(&rig, ids[1]));
        rig.prepare_all();
        if together {
            // It has been let go, and goes when its step is done and its part is written.
            rig.saved(ids[0]);
            goes(&mut rig, ids[0]);
            rig.ready_all();
        }
        let step = rig.core.committed;
        let save = *rig.saves(ids[1]).last().unwrap();
        assert_eq!(save.step, step.0, "{together}");
        assert!(rig.core.snapshot(rig.now).reason.starts_with("all workers are about to leave"));
        rig.pass(1.0);
        rig.saved(ids[1]);
        assert!(!may_go(&rig, ids[1]), "the checkpoint does not exist yet");
        rig.manifest_written();
        assert!(may_go(&rig, ids[1]));
        goes(&mut rig, ids[1]);
        assert_eq!((rig.phase(), rig.core.committed), ("waiting", step));

        // Whoever comes goes on from there.
        let one = rig.join("x");
        rig.join("y");
        assert_eq!(rig.form_of(one).step, step.0, "{together}");
        rig.run_to(10);
        assert_eq!(rig.outcome().weights_digest, Some(weights(Step(10))));
    }
}

#[test]
fn who_comes_while_the_last_one_waits_to_leave_takes_over() {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    rig.run_to(2);
    leaves(&mut rig, ids[0]);
    rig.prepare_all();
    let fresh = rig.join("fresh");
    rig.saved_all();
    rig.manifest_written();
    assert_eq!((rig.form_of(fresh).members.len(), rig.form_of(fresh).step), (2, 3));
    // The other one has the checkpoint to take the state from.
    assert!(may_go(&rig, ids[0]));
    goes(&mut rig, ids[0]);
    rig.ready_all();
    assert_eq!(rig.plan_of(fresh).step, 4);
}

#[test]
fn a_save_that_fails_while_all_want_to_leave_is_tried_again() {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    rig.run_to(2);
    leaves(&mut rig, ids[0]);
    rig.prepare_all();
    let save = *rig.saves(ids[0]).last().unwrap();
    let v1::Save { step, part, parts, .. } = save;
    let (part, parts, result) = (part as usize, parts as usize, Err("disk full".to_owned()));
    rig.say(ids[0], Report::PartSaved { step: Step(step), part, parts, result });
    assert!(matches!(rig.core.phase, Phase::Holding) && !may_go(&rig, ids[0]));
    rig.pass(3.0);
    assert_eq!(rig.saves(ids[0]).len(), 2);
    rig.saved_all();
    rig.manifest_written();
    assert!(may_go(&rig, ids[0]));
}

#[test]
fn before_the_first_step_and_without_a_place_nobody_has_to_wait() {
    let mut rig = Rig::new(&[]);
    let alone = rig.join("alone");
    leaves(&mut rig, alone);
    assert!(may_go(&rig, alone));

    let (mut rig, ids) = Rig::training(2, &["cluster.max_workers=2"]);
    let spare = rig.join("spare");
    leaves(&mut rig, spare);
    assert!(may_go(&rig, spare));
    ids.iter().for_each(|member| leaves(&mut rig, *member));
    assert!(!may_go(&rig, ids[1]), "step 1 is under way");
    rig.prepare_all();
    rig.saved_all();
    rig.manifest_written();
    assert!(may_go(&rig, ids[1]));
}

#[test]
fn in_a_pause_nobody_has_to_wait_for_its_end() {
    // Before the first step.
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.feed(Event::PauseRequested { reason: "maintenance".into() });
    rig.kill(ids[1]);
    rig.ready_all();
    assert_eq!((rig.phase(), rig.core.committed), ("paused", Step(0)));
    leaves(&mut rig, ids[0]);
    assert!(may_go(&rig, ids[0]));

    // At a checkpoint, also when somebody comes who could take over after it.
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    rig.run_to(3);
    rig.feed(Event::PauseRequested { reason: "maintenance".into() });
    rig.prepare_all();
    rig.saved_all();
    rig.manifest_written();
    assert_eq!((rig.phase(), rig.core.committed), ("paused", Step(4)));
    rig.join("fresh");
    leaves(&mut rig, ids[0]);
    assert!(may_go(&rig, ids[0]));
}

#[test]
fn a_warm_spare_without_a_place_is_no_reason_to_leave_unsaved() {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1", "cluster.max_workers=1"]);
    let spare = rig.join("spare");
    rig.prepare_all();
    assert!(matches!(rig.last_sent(spare), Directive::Fetch(_)));
    leaves(&mut rig, ids[0]);
    assert!(!may_go(&rig, ids[0]));
    rig.say(spare, Report::Fetched { step: Step(1), result: Ok(()) });
    assert!(!may_go(&rig, ids[0]), "the spare may lack the update of the step under way");
    rig.prepare_all();
    rig.saved_all();
    rig.manifest_written();
    assert!(may_go(&rig, ids[0]));
    goes(&mut rig, ids[0]);
    rig.say(spare, Report::Fetched { step: Step(1), result: Err("nobody has it".into()) });
    assert_eq!((rig.form_of(spare).step, rig.members()), (2, vec![spare]));
}

#[test]
fn a_warm_spare_that_gets_a_place_takes_over_from_the_last_one() {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    let spare = rig.join("spare");
    rig.prepare_all();
    leaves(&mut rig, ids[0]);
    rig.say(spare, Report::Fetched { step: Step(1), result: Ok(()) });
    rig.prepare_all();
    assert_eq!((rig.form_of(spare).step, rig.members().len()), (2, 2));
    rig.ready_all();
    assert!(may_go(&rig, ids[0]));
    goes(&mut rig, ids[0]);
    rig.ready_all();
    assert_eq!(rig.plan_of(spare).step, 3);
}

#[test]
fn who_was_let_go_while_others_stayed_is_held_when_they_are_gone() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(2);
    leaves(&mut rig, ids[0]);
    assert!(may_go(&rig, ids[0]));
    rig.kill(ids[1]);
    // The new generation holds it, in its own session too, and it is not told again that it may go.
    let drains = |rig: &Rig| {
        rig.sent[&ids[0]].iter().filter(|message| matches!(message, Directive::Drain(_))).count()
    };
    rig.ready_all();
    assert_eq!((drains(&rig), rig.members()), (1, vec![ids[0]]));
    assert!(matches!(rig.saves(ids[0]).last(), Some(v1::Save { step: 2, .. })));
    rig.saved_all();
    rig.manifest_written();
    assert_eq!(drains(&rig), 2);
}

#[test]
fn with_nothing_at_stake_a_store_that_is_away_holds_nobody() {
    let (mut rig, ids) = Rig::training(2, &[]);
    ids.iter().for_each(|member| leaves(&mut rig, *member));
    assert!(!may_go(&rig, ids[1]), "step 1 is under way");
    let (generation, detail) = (rig.core.generation, "the tokens of step 1".to_owned());
    rig.say(ids[0], Report::Waiting { generation, detail, failed: true });
    assert!(ids.iter().all(|id| may_go(&rig, *id)));
}

#[test]
fn who_was_drained_does_not_count_as_one_who_stays() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(2);
    rig.feed(Event::DrainRequested { worker: ids[0], reason: "a new disk".into() });
    leaves(&mut rig, ids[1]);
    assert!(may_go(&rig, ids[0]) && !may_go(&rig, ids[1]));
    rig.prepare_all();
    assert!(matches!(rig.saves(ids[1]).last(), Some(v1::Save { step: 3, .. })));
    rig.saved_all();
    rig.manifest_written();
    assert!(may_go(&rig, ids[1]));
}

#[test]
fn where_nothing_can_be_saved_workers_leave_after_as_many_tries_as_at_a_runs_end() {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    rig.run_to(2);
    leaves(&mut rig, ids[0]);
    rig.prepare_all();
    for _ in 0..20 {
        assert!(!may_go(&rig, ids[0]));
        rig.saved_all();
        rig.feed(Event::CheckpointRefused { step: Step(3), reason: "disk full".into() });
        rig.pass(70.0);
    }
    assert!(may_go(&rig, ids[0]) && rig.result.is_none());
}

#[test]
fn many_that_go_at_once_cost_the_others_one_generation() {
    let (mut rig, ids) = Rig::training(5, &[]);
    let before = rig.core.generation;
    let losses = ids[..3].iter().map(|id| Loss::broken(*id, "cable")).collect();
    rig.feed(Event::Lost(losses));
    assert_eq!(rig.core.generation.0, before.0 + 1);
    assert_eq!(rig.members(), ids[3..]);
    let lost = |event: &&RunEvent| matches!(event, RunEvent::WorkerLost { .. });
    assert_eq!(rig.published.iter().filter(lost).count(), 3);
}
