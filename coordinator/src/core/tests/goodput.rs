//! What the ledger says of runs in which this and that happens. That no second is lost or there twice,
//! the rig checks at every event of every test.

use super::*;
use crate::ledger::Category::{self, *};

/// Seconds of each category that has some, in milliseconds.
fn booked(rig: &Rig) -> Vec<(Category, u64)> {
    let seconds =
        |category: Category| (rig.core.ledger().seconds(category) * 1000.0).round() as u64;
    let all = Category::ALL.into_iter().map(|category| (category, seconds(category)));
    all.filter(|(_, milliseconds)| *milliseconds > 0).collect()
}

fn at(rig: &mut Rig, milliseconds: u64) {
    rig.now = Duration::from_millis(milliseconds);
}

#[test]
fn a_step_is_productive_but_for_the_time_that_its_members_waited_for_tokens_or_a_copy() {
    let (mut rig, ids) = Rig::training(2, &[]);
    at(&mut rig, 100);
    for (worker, data_wait) in ids.iter().zip([0.03, 7.0]) {
        let Report::Prepared {
            generation, step, digest, statistics, computed_slots, detail, ..
        } = rig.vote(rig.core.generation, Step(1))
        else {
            unreachable!()
        };
        let sections = v1::Sections { data_wait, compute: 0.05, ..v1::Sections::default() };
        let vote = Report::Prepared {
            generation,
            step,
            digest,
            statistics,
            sections,
            computed_slots,
            detail,
        };
        rig.say(*worker, vote);
    }
    // Nobody waits for longer than the step takes.
    assert_eq!(booked(&rig), [(Productive, 70), (DataWait, 130)]);
    // Step 4 is saved, and the copies are told of when the parts are there: in step 5.
    for _ in 2..=4 {
        rig.prepare_all();
    }
    for (worker, stall) in ids.iter().zip([20, 140]) {
        let Report::PartSaved { step, part, parts, result } = Rig::part(rig.saves(*worker)[0])
        else {
            unreachable!()
        };
        let saved = SavedPart { stall: Duration::from_millis(stall), ..result.unwrap() };
        rig.say(*worker, Report::PartSaved { step, part, parts, result: Ok(saved) });
    }
    rig.manifest_written();
    let saved = rig.published.iter().find_map(|event| match event {
        RunEvent::CheckpointSaved { stall, .. } => Some(*stall),
        _ => None,
    });
    assert_eq!(saved, Some(0.14), "the longest");
    rig.prepare_all();
    assert_eq!(booked(&rig), [(Productive, 750), (CheckpointStall, 120), (DataWait, 130)]);
    // A copy that took longer than a step is made up for by the next.
    rig.evaluate_all();
    rig.prepare_all();
    assert_eq!(booked(&rig), [(Productive, 910), (CheckpointStall, 160), (DataWait, 130)]);
}

#[test]
fn the_step_that_a_loss_interrupts_and_all_until_the_next_is_recovery() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    at(&mut rig, 300);
    rig.kill(ids[1]);
    at(&mut rig, 350);
    rig.ready_all();
    assert_eq!(booked(&rig), [(Productive, 200), (Recovering, 450)]);
    rig.prepare_all();
    assert_eq!(booked(&rig), [(Productive, 300), (Recovering, 450)]);
    assert_eq!(rig.core.snapshot(rig.now).retried_steps, 1);
}

#[test]
fn who_comes_first_waits_and_who_comes_later_starts_up_or_is_idle() {
    let mut rig = Rig::new(&["cluster.workers=2", "cluster.max_workers=2"]);
    rig.join("w0");
    at(&mut rig, 1000);
    rig.join("w1");
    assert_eq!(booked(&rig), [(Waiting, 1000)]);
    at(&mut rig, 1200);
    rig.ready_all();
    assert_eq!(booked(&rig), [(Waiting, 1000), (StartUp, 400)]);
    let spare = rig.join("w2");
    rig.prepare_all();
    rig.say(spare, Report::Fetched { step: Step(1), result: Ok(()) });
    rig.prepare_all();
    // It fetched in the first of the two steps, and had nothing to do in the second.
    let after = booked(&rig);
    assert_eq!(after[0], (Productive, 400));
    let spares: u64 =
        after.iter().filter(|(it, _)| matches!(it, StartUp | Idle)).map(|it| it.1).sum();
    assert_eq!(spares, 600);
    assert!(after.iter().any(|(category, _)| *category == Idle), "{after:?}");
}

#[test]
fn a_pause_is_idle_and_what_is_done_again_is_recomputed() {
    let (mut rig, ids) = Rig::training(1, &["checkpoint.every_steps=100"]);
    rig.prepare_all();
    rig.prepare_all();
    rig.feed(Event::PauseRequested { reason: "lunch".into() });
    rig.prepare_all();
    at(&mut rig, 5300);
    rig.feed(Event::ResumeRequested);
    assert_eq!(booked(&rig), [(Productive, 300), (Idle, 5000)]);
    // Nobody holds step 3 any more, and there is no checkpoint: steps 1 to 3 are done again.
    rig.kill(ids[0]);
    let again = rig.join("w9");
    assert_eq!(rig.members(), [again]);
    rig.ready_all();
    for _ in 1..=4 {
        rig.prepare_all();
    }
    assert_eq!(booked(&rig), [(Productive, 400), (Recomputed, 300), (Idle, 5000)]);
}

#[test]
fn a_worker_that_outlives_its_coordinator_is_accounted_for_meanwhile() {
    let (mut rig, _) = Rig::training(1, &[]);
    rig.prepare_all();
    let ledger = rig.core.ledger().clone();
    let held = v1::Held { generation: 1, world: 1, step: 1, ..v1::Held::default() };
    // The next coordinator starts 3 s after the ledger was written, and the worker is back after 2.
    let (zero, away) = (Duration::from_secs(4), Duration::from_secs(3));
    let books = Books { ledger, zero, away };
    let resume = Resume {
        incarnation: Incarnation(2),
        numerics: Some("avx2".into()),
        workers_may_return: true,
        books,
        ..Resume::default()
    };
    let mut rig = Rig::resumed(&["cluster.workers=1"], resume);
    at(&mut rig, 2000);
    rig.recount();
    rig.join_as(v1::Join { held: Some(held), ..introduction("w0") });
    at(&mut rig, 2100);
    rig.ready_all();
    assert_eq!(booked(&rig), [(Productive, 100), (Recovering, 5100)]);
    rig.prepare_all();
    assert_eq!(booked(&rig), [(Productive, 200), (Recovering, 5100)], "step 2 is new");
}
