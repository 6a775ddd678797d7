//! Plan, prepared, commit.

use super::*;

#[test]
fn the_slots_of_a_step_are_shared_out_once() {
    let (rig, ids) = Rig::training(3, &[]);
    let slots: Vec<(u32, u32)> = (ids.iter())
        .map(|worker| (rig.plan_of(*worker).slot_begin, rig.plan_of(*worker).slot_end))
        .collect();
    assert_eq!(slots, [(0, 2), (2, 4), (4, 5)]);
}

#[test]
fn ranks_beyond_the_slots_are_planned_without_any() {
    let (rig, ids) = Rig::training(7, &[]);
    let plan = rig.plan_of(ids[6]);
    assert_eq!((plan.step, plan.slot_begin, plan.slot_end), (1, 5, 5));
}

#[test]
fn a_step_is_committed_when_the_last_vote_is_in_and_the_next_plan_follows() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.now = Duration::from_millis(250);
    rig.prepare(ids[0]);
    rig.prepare(ids[0]);
    assert!(rig.commits(ids[0]).is_empty());
    rig.prepare(ids[1]);
    for worker in ids {
        let sent = &rig.sent[&worker];
        let tail = &sent[sent.len() - 2..];
        assert!(matches!(tail[0], Directive::Commit(v1::Commit { generation: 1, step: 1 })));
        assert!(matches!(tail[1], Directive::Plan(v1::Plan { step: 2, .. })));
    }
    let Some(RunEvent::Committed(record)) = rig.published.last() else { panic!("no record") };
    assert_eq!((record.step, record.world, record.tokens), (Step(1), 2, 160));
    assert_eq!((record.cursor.stage, record.cursor.sequences), (0, 10));
    assert_eq!((record.mean_depth, record.lr, record.seconds), (1.75, 1e-3, 0.25));
    assert_eq!(record.digest, gradient(Step(1)));
}

#[test]
fn a_vote_of_an_older_generation_does_not_count() {
    let (mut rig, ids) = Rig::training(3, &[]);
    let stale = rig.vote(Generation(1), Step(1));
    rig.kill(ids[2]);
    rig.ready_all();
    rig.say(ids[0], stale.clone());
    rig.say(ids[1], stale);
    assert!(rig.commits(ids[0]).is_empty());
    assert_eq!(rig.core.committed, Step(0));
}

#[test]
fn a_vote_on_another_step_does_not_count() {
    let (mut rig, _) = Rig::training(1, &[]);
    let ahead = rig.vote(Generation(1), Step(2));
    rig.say(rig.members()[0], ahead);
    assert_eq!(rig.core.committed, Step(0));
}

/// A vote on a gradient that nobody else has.
fn odd_vote(rig: &Rig) -> Report {
    let mut vote = rig.vote(Generation(1), Step(1));
    if let Report::Prepared { digest, .. } = &mut vote {
        *digest = Digest::of(b"cosmic ray");
    }
    vote
}

#[test]
fn a_rank_whose_gradient_differs_is_sent_away_and_the_step_is_retried() {
    let (mut rig, ids) = Rig::training(3, &[]);
    let odd = odd_vote(&rig);
    rig.say(ids[0], odd);
    rig.prepare(ids[1]);
    rig.prepare(ids[2]);
    assert!(rig.commits(ids[1]).is_empty());
    assert_eq!(rig.members(), [ids[1], ids[2]]);
    rig.ready_all();
    let plan = rig.plan_of(ids[1]);
    assert_eq!((plan.generation, plan.step, plan.slot_begin, plan.slot_end), (2, 1, 0, 3));
    rig.prepare_all();
    assert_eq!(rig.core.committed, Step(1));
}

#[test]
fn two_unequal_gradients_end_the_run() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare(ids[0]);
    let odd = odd_vote(&rig);
    rig.say(ids[1], odd);
    assert!(rig.failure().contains("no majority"));
    assert!(matches!(rig.last_sent(ids[0]), Directive::Finish(_)));
}

#[test]
fn the_pace_is_tokens_over_time() {
    let (mut rig, _) = Rig::training(1, &[]);
    (0..3).for_each(|_| rig.prepare_all());
    let pace = rig.core.snapshot(rig.now).tokens_per_second;
    assert!((pace - 1600.0).abs() < 1e-6, "{pace}");
}

#[test]
fn a_step_of_another_stage_takes_that_stages_slots_and_tokens() {
    let (mut rig, ids) = Rig::training(1, &["stages.0.steps=1", "evaluation.every_steps=0"]);
    let mut two = spec(&["stages.0.steps=1", "evaluation.every_steps=0"]);
    two.stages.push(looptrain_proto::spec::Stage { slots: 3, steps: 2, ..two.stages[0].clone() });
    rig.core.spec = two;
    rig.core.total = Step(3);
    rig.prepare_all();
    assert_eq!(rig.plan_of(ids[0]).slot_end, 3);
    rig.prepare_all();
    let Some(RunEvent::Committed(record)) = rig.published.last() else { panic!("no record") };
    assert_eq!((record.tokens, record.cursor.stage, record.cursor.sequences), (256, 1, 6));
}

/// All vote on a step that changes no weight.
fn skip(rig: &mut Rig) {
    for (rank, worker) in rig.members().into_iter().enumerate() {
        let mut vote = rig.vote(rig.core.generation, rig.core.committed.next());
        if let Report::Prepared { statistics, detail, .. } = &mut vote {
            statistics.bad_slots = 1;
            // Only who computed the slot can tell.
            detail.push_str(["", "the loss is NaN at step 1, slot 3"][rank]);
        }
        rig.say(worker, vote);
    }
}

#[test]
fn a_step_without_a_usable_gradient_is_committed_and_its_record_says_why_it_changes_nothing() {
    let (mut rig, ids) = Rig::training(2, &[]);
    skip(&mut rig);
    assert_eq!((rig.core.committed, rig.commits(ids[0])), (Step(1), vec![1]));
    let record = rig.core.snapshot(rig.now).last.unwrap();
    assert_eq!(record.skipped.as_deref(), Some("the loss is NaN at step 1, slot 3"));
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!((&json["bad_slots"], json["skipped"].is_string()), (&1.into(), true));
    rig.prepare_all();
    assert_eq!(rig.core.snapshot(rig.now).last.unwrap().skipped, None);
}

#[test]
fn ten_skipped_steps_in_a_row_end_the_run() {
    let long = ["stages.0.steps=40", "checkpoint.every_steps=90", "evaluation.every_steps=90"];
    let (mut rig, _) = Rig::training(2, &long);
    (0..9).for_each(|_| skip(&mut rig));
    rig.prepare_all();
    (0..9).for_each(|_| skip(&mut rig));
    assert!(rig.result.is_none());
    skip(&mut rig);
    assert!(rig.failure().contains("10 steps in a row had to be skipped"), "{}", rig.failure());
}

#[test]
fn a_record_without_a_loss_survives_the_log() {
    let record =
        StepRecord { loss: f64::NAN, entropy: f64::NAN, ..crate::records::example(3, 1.0) };
    let line = serde_json::to_string(&record).unwrap();
    let read: StepRecord = serde_json::from_str(&line).unwrap();
    assert!(read.loss.is_nan() && read.entropy.is_nan() && read.step == Step(3), "{line}");
}
