//! How runs end.

use super::*;

fn stop(rig: &mut Rig) {
    rig.feed(Event::StopRequested { reason: "ctrl-c".into() });
}

#[test]
fn after_the_last_step_the_run_evaluates_saves_and_finishes() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(9);
    rig.prepare_all();
    assert_eq!(rig.phase(), "evaluating");
    rig.evaluate_all();
    assert_eq!(rig.phase(), "finishing");
    rig.saved_all();
    assert!(rig.result.is_none(), "the checkpoint does not exist yet");
    rig.manifest_written();
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.tokens, outcome.stopped), (Step(10), 1600, false));
    assert_eq!(outcome.weights_digest, Some(weights(Step(10))));
    assert_eq!(outcome.loss, Some(5.0));
    assert_eq!(outcome.evaluation.as_ref().unwrap().step, Step(10));
    assert!(ids.iter().all(|id| matches!(rig.last_sent(*id), Directive::Finish(_))));
    assert!(ids.iter().all(|id| rig.closed.contains(id)));
}

#[test]
fn a_stop_lets_the_step_in_flight_commit_and_saves_it() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(5);
    rig.prepare(ids[0]);
    stop(&mut rig);
    stop(&mut rig);
    assert_eq!(rig.phase(), "training");
    rig.prepare(ids[1]);
    assert_eq!(rig.commits(ids[1]).last(), Some(&6));
    assert!(matches!(rig.last_sent(ids[0]), Directive::Save(v1::Save { step: 6, .. })));
    rig.saved_all();
    rig.manifest_written();
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.stopped), (Step(6), true));
    assert_eq!(outcome.weights_digest, Some(weights(Step(6))));
}

#[test]
fn a_stop_before_the_first_step_needs_no_checkpoint() {
    let mut rig = Rig::new(&[]);
    rig.join("w0");
    stop(&mut rig);
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.loss, outcome.weights_digest), (Step(0), None, None));
}

#[test]
fn a_stop_while_forming_ends_the_run_as_soon_as_the_generation_holds_its_state() {
    let mut rig = Rig::new(&[]);
    rig.join("w0");
    rig.join("w1");
    stop(&mut rig);
    assert!(rig.result.is_none());
    rig.ready_all();
    assert_eq!(rig.outcome().weights_digest, Some(weights(Step(0))));
}

#[test]
fn a_stop_waits_for_an_older_checkpoint_and_then_makes_its_own() {
    let (mut rig, ids) = Rig::training(1, &[]);
    (0..4).for_each(|_| rig.prepare_all());
    stop(&mut rig);
    rig.prepare_all();
    assert_eq!(rig.phase(), "finishing");
    rig.saved_all();
    rig.manifest_written();
    assert_eq!(rig.saves(ids[0]).last().unwrap().step, 5);
    rig.saved_all();
    rig.manifest_written();
    assert_eq!(rig.outcome().step, Step(5));
}

#[test]
fn a_death_during_the_final_save_makes_the_survivors_save_again() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(9);
    rig.prepare_all();
    rig.evaluate_all();
    rig.saved(ids[0]);
    rig.kill(ids[1]);
    assert_eq!(rig.form_of(ids[0]).step, 10);
    rig.ready_all();
    assert_eq!(rig.saves(ids[0]).last().unwrap().parts, 1);
    rig.saved_all();
    rig.manifest_written();
    assert_eq!(rig.outcome().step, Step(10));
    assert_eq!(rig.commits(ids[0]).iter().filter(|step| **step == 10).count(), 1);
}

#[test]
fn a_final_checkpoint_that_the_store_refuses_is_tried_again_and_then_given_up() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.run_to(9);
    rig.prepare_all();
    rig.evaluate_all();
    for attempt in 1..=20 {
        assert!(rig.result.is_none());
        assert_eq!(rig.saves(ids[0]).iter().filter(|save| save.step == 10).count(), attempt);
        rig.saved_all();
        rig.feed(Event::CheckpointRefused { step: Step(10), reason: "disk full".into() });
        rig.pass(70.0);
    }
    assert!(rig.failure().contains("disk full"));
}

#[test]
fn a_stop_when_everybody_has_died_ends_at_the_checkpoint() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.run_to(6);
    stop(&mut rig);
    rig.kill(ids[0]);
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.stopped), (Step(4), true));
    assert_eq!(outcome.weights_digest, Some(weights(Step(4))));
}

#[test]
fn a_run_resumed_behind_its_last_step_only_evaluates() {
    let mark =
        Mark { step: Step(10), weights_digest: weights(Step(10)), record: None, trend: None };
    let resume = Resume { checkpoint: Some(mark), ..Resume::default() };
    let mut rig = Rig::resumed(&["cluster.workers=1"], resume);
    rig.join("w0");
    rig.ready_all();
    rig.evaluate_all();
    assert_eq!((rig.outcome().step, rig.outcome().stopped), (Step(10), false));
}

/// A run that is to be stopped at step 6, at its last step but one before that.
fn nearly_far_enough(workers: usize) -> (Rig, Vec<WorkerId>) {
    let (mut rig, ids) = Rig::training(workers, &[]);
    rig.core.until = Some(Step(6));
    rig.run_to(5);
    (rig, ids)
}

#[test]
fn a_run_that_is_to_stop_at_a_step_makes_a_checkpoint_of_it_and_plans_no_further() {
    let (mut rig, ids) = nearly_far_enough(2);
    rig.prepare_all();
    assert_eq!(rig.phase(), "finishing");
    assert!(ids.iter().all(|id| rig.saves(*id).last().unwrap().step == 6));
    rig.saved_all();
    rig.manifest_written();
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.stopped), (Step(6), true));
    assert_eq!(outcome.weights_digest, Some(weights(Step(6))));
    let planned = |message: &Directive| matches!(message, Directive::Plan(plan) if plan.step > 6);
    assert!(!rig.sent.values().flatten().any(planned));
}

#[test]
fn a_step_to_stop_at_is_done_again_when_all_who_held_it_die_before_its_checkpoint() {
    let (mut rig, ids) = nearly_far_enough(1);
    rig.prepare_all();
    rig.kill(ids[0]);
    assert!(rig.result.is_none(), "the checkpoint of step 4 is not far enough");
    rig.join("another");
    rig.pass(10.0);
    rig.run_to(6);
    assert_eq!(rig.outcome().step, Step(6));
}

#[test]
fn a_run_whose_checkpoint_is_where_it_is_to_stop_needs_no_worker() {
    let mark = Mark { step: Step(6), weights_digest: weights(Step(6)), record: None, trend: None };
    let resume = Resume { checkpoint: Some(mark), ..Resume::default() };
    let mut rig = Rig::resumed(&[], resume);
    rig.core.until = Some(Step(6));
    rig.feed(Event::Tick);
    let outcome = rig.outcome();
    assert_eq!((outcome.step, outcome.stopped), (Step(6), true));
    assert_eq!(outcome.weights_digest, Some(weights(Step(6))));
}

#[test]
fn a_step_to_stop_at_beyond_the_last_one_changes_nothing() {
    let (mut rig, _) = Rig::training(1, &[]);
    rig.core.until = Some(Step(11));
    rig.run_to(10);
    assert_eq!((rig.outcome().step, rig.outcome().stopped), (Step(10), false));
}
