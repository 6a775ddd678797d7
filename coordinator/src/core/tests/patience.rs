//! Workers whose heartbeats go on and who do not answer.

use super::*;

fn lost(rig: &Rig) -> Vec<(String, String)> {
    let lost = |event: &RunEvent| match event {
        RunEvent::WorkerLost { name, reason, .. } => Some((name.clone(), reason.clone())),
        _ => None,
    };
    rig.published.iter().filter_map(lost).collect()
}

#[test]
fn a_rank_that_alone_does_not_vote_is_sent_away() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.prepare(ids[0]);
    rig.prepare(ids[2]);
    rig.pass(599.0);
    assert_eq!(rig.members(), ids, "a first step may take long");
    rig.pass(3.0);
    assert_eq!(rig.members(), [ids[0], ids[2]]);
    let reason = "it has not voted on step 1 within 600 s";
    assert_eq!(lost(&rig), [("w1".to_owned(), reason.to_owned())]);
    rig.ready_all();
    rig.prepare_all();
    assert_eq!(rig.core.committed, Step(1));
}

#[test]
fn a_step_may_take_ten_times_as_long_as_the_last_one_and_a_minute_at_least() {
    for (last, patience) in [(0.1, 60.0), (20.0, 200.0)] {
        let (mut rig, ids) = Rig::training(2, &[]);
        rig.pass(last);
        rig.prepare_all();
        rig.prepare(ids[0]);
        rig.pass(patience - 1.0);
        assert_eq!(rig.members(), ids, "{last}");
        rig.pass(5.0);
        assert_eq!(rig.members(), [ids[0]], "{last}");
    }
}

#[test]
fn the_first_step_of_a_smaller_generation_gets_more_time() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.pass(100.0);
    rig.prepare_all();
    rig.kill(ids[2]);
    rig.ready_all();
    rig.prepare(ids[0]);
    rig.pass(1490.0);
    assert_eq!(rig.members(), ids[..2], "ten times 100 s, for three workers' work on two");
    rig.pass(20.0);
    assert_eq!(rig.members(), ids[..1]);
}

#[test]
fn when_nobody_votes_the_next_generation_shows_who_is_stuck() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.pass(602.0);
    assert_eq!((rig.phase(), rig.members()), ("forming", ids.clone()));
    rig.ready(ids[0]);
    rig.ready(ids[2]);
    rig.pass(1199.0);
    assert_eq!(rig.members(), ids, "the second try has twice the time");
    rig.pass(3.0);
    assert_eq!(rig.members(), [ids[0], ids[2]]);
    assert_eq!(lost(&rig)[0].1, "it has not become ready for generation 2 within 1200 s");
}

#[test]
fn when_several_do_not_vote_they_may_be_waiting_for_one_that_is_stuck() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.prepare(ids[0]);
    rig.pass(602.0);
    assert_eq!((rig.phase(), rig.members()), ("forming", ids));
}

#[test]
fn when_all_become_ready_and_nobody_ever_votes_the_run_ends() {
    let (mut rig, ids) = Rig::training(2, &[]);
    for patience in [600.0, 1200.0, 2400.0] {
        rig.pass(patience + 2.0);
        assert_eq!((rig.phase(), rig.members()), ("forming", ids.clone()));
        rig.ready_all();
    }
    rig.pass(4802.0);
    assert!(rig.failure().contains("2 of 2 workers have not voted on step 1 within 4800 s"));
}

#[test]
fn a_slow_step_that_is_done_in_the_second_try_counts_as_progress() {
    let (mut rig, _) = Rig::training(2, &[]);
    rig.pass(602.0);
    rig.ready_all();
    rig.pass(1100.0);
    rig.prepare_all();
    assert_eq!((rig.core.committed, rig.core.stalls), (Step(1), 0));
}

#[test]
fn when_nobody_becomes_ready_all_are_sent_away_and_the_run_goes_back() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    rig.kill(ids[0]);
    rig.pass(602.0);
    assert_eq!(rig.form_of(ids[1]).generation, 3, "a large checkpoint may take its time");
    rig.pass(1202.0);
    assert_eq!(rig.phase(), "waiting");
    assert!(matches!(rig.last_sent(ids[1]), Directive::Finish(_)));
    assert_eq!(
        lost(&rig)[1].1,
        "1 of 1 workers have not become ready for generation 3 within 1200 s"
    );
    let again = rig.join("again");
    rig.pass(6.0);
    assert_eq!(rig.form_of(again).step, 4);
}

#[test]
fn a_rank_that_is_stuck_while_the_ring_breaks_around_it_is_found() {
    let mut rig = Rig::new(&["cluster.workers=3"]);
    let ids: Vec<WorkerId> = ["w0", "w1", "w2"].map(|name| rig.join(name)).into();
    for _ in 0..22 {
        rig.pass(30.0);
        rig.failed(ids[0], Cause::Peer, "it does not connect");
        rig.failed(ids[2], Cause::Peer, "it does not connect");
        rig.pass(2.0);
    }
    assert!(rig.result.is_none(), "{:?}", rig.result);
    assert_eq!(rig.members(), [ids[0], ids[2]]);
}

#[test]
fn a_member_of_a_generation_that_is_formed_again_after_a_loss_gets_the_whole_time() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.pass(590.0);
    rig.kill(ids[0]);
    rig.pass(590.0);
    rig.kill(ids[1]);
    rig.pass(590.0);
    assert_eq!(rig.members(), [ids[2]]);
}

#[test]
fn a_rank_that_alone_does_not_evaluate_is_sent_away() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(4);
    rig.prepare_all();
    let Directive::Evaluate(share) = rig.last_sent(ids[0]).clone() else { panic!("no share") };
    let (generation, step) = (Generation(share.generation), Step(share.step));
    rig.say(ids[0], Report::Evaluated { generation, step, sums: vec![1; 6], tokens: 64 });
    rig.pass(602.0);
    assert_eq!(rig.members(), [ids[0]]);
    assert_eq!(lost(&rig)[0].1, "it has not evaluated step 5 within 600 s");
}

#[test]
fn when_nobody_evaluates_the_generation_is_formed_again() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(4);
    rig.prepare_all();
    rig.pass(602.0);
    assert_eq!((rig.phase(), rig.members()), ("forming", ids));
    rig.ready_all();
    rig.evaluate_all();
    assert_eq!(rig.phase(), "training");
}

/// Trains with everybody well, but for saving.
fn train_for(rig: &mut Rig, seconds: u64) {
    for _ in 0..seconds / 20 {
        rig.pass(20.0);
        match rig.phase() {
            "forming" => rig.ready_all(),
            _ => rig.prepare_all(),
        }
    }
}

#[test]
fn a_writer_that_alone_does_not_bring_its_part_is_sent_away() {
    let (mut rig, ids) = Rig::training(2, &["stages.0.steps=500", "evaluation.every_steps=0"]);
    (0..4).for_each(|_| rig.prepare_all());
    rig.saved(ids[0]);
    train_for(&mut rig, 1780);
    assert_eq!(rig.members(), ids);
    train_for(&mut rig, 60);
    assert_eq!(rig.members(), [ids[0]]);
    let reason = "it has not written its part of the checkpoint of step 4 within 1800 s";
    assert_eq!(lost(&rig)[0].1, reason);
    let kept = rig.saves(ids[0]);
    assert!(kept.last().unwrap().step > 4, "another checkpoint is made: {kept:?}");
}

#[test]
fn when_nobody_brings_a_part_the_checkpoint_is_given_up_and_training_goes_on() {
    let (mut rig, ids) = Rig::training(2, &["stages.0.steps=500", "evaluation.every_steps=0"]);
    (0..4).for_each(|_| rig.prepare_all());
    train_for(&mut rig, 1840);
    let failed = rig.published.iter().filter_map(|event| match event {
        RunEvent::CheckpointFailed { step, reason } => Some((*step, reason.as_str())),
        _ => None,
    });
    let reason = "no worker has written its part of the checkpoint of step 4 within 1800 s";
    assert_eq!(failed.collect::<Vec<_>>(), [(Step(4), reason)]);
    assert_eq!((rig.members(), rig.phase()), (ids, "training"));
}

#[test]
fn time_that_the_coordinator_slept_through_does_not_count() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare(ids[0]);
    rig.pass(500.0);
    rig.now += Duration::from_secs(36_000);
    rig.feed(Event::Tick);
    rig.pass(90.0);
    assert_eq!(rig.members(), ids);
    rig.pass(15.0);
    assert_eq!(rig.members(), [ids[0]]);
}

#[test]
fn a_long_worker_timeout_is_the_least_patience() {
    let (mut rig, ids) = Rig::training(2, &["cluster.worker_timeout=900.0"]);
    rig.prepare(ids[0]);
    rig.pass(890.0);
    assert_eq!(rig.members(), ids);
    rig.pass(20.0);
    assert_eq!(rig.members(), [ids[0]]);
}
