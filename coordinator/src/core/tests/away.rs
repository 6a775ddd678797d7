//! Workers that wait for the store.

use super::*;

const DETAIL: &str = "the tokens of step 1: 503";

fn wait(rig: &mut Rig, worker: WorkerId, failed: bool) {
    let (generation, detail) = (rig.core.generation, DETAIL.to_owned());
    rig.say(worker, Report::Waiting { generation, detail, failed });
}

/// Time passes in which these say that the store fails them, and it answers the coordinator like this.
fn pass(rig: &mut Rig, seconds: u32, waiting: &[WorkerId], seen: &Result<(), String>) {
    pass_with(rig, seconds, waiting, true, seen);
}

/// Time passes in which these say that they wait: since the store has `failed` them, or merely takes long.
fn pass_with(
    rig: &mut Rig,
    seconds: u32,
    waiting: &[WorkerId],
    failed: bool,
    seen: &Result<(), String>,
) {
    for _ in 0..seconds / 5 {
        waiting.iter().for_each(|worker| wait(rig, *worker, failed));
        for _ in 0..5 {
            if std::mem::take(&mut rig.looks) > 0 {
                rig.feed(Event::StoreSeen(seen.clone()));
            }
            rig.pass(1.0);
        }
    }
}

fn told(rig: &Rig) -> Vec<String> {
    let of_store = |event: &&RunEvent| {
        matches!(event, RunEvent::StoreAway { .. } | RunEvent::StoreBack { .. })
    };
    rig.published.iter().filter(of_store).map(ToString::to_string).collect()
}

const HOURS: u32 = 3 * 3600;

#[test]
fn the_only_worker_waits_for_as_long_as_the_store_is_away() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    pass(&mut rig, HOURS, &ids, &Err("connection refused".into()));
    assert_eq!((rig.phase(), rig.members()), ("training", ids.clone()));
    let snapshot = rig.core.snapshot(rig.now);
    let reason = format!("waiting for the store: {DETAIL} (the coordinator: connection refused)");
    assert_eq!(snapshot.reason, reason);
    // It does so, too, when the coordinator, which is elsewhere, is answered.
    pass(&mut rig, HOURS, &ids, &Ok(()));
    assert_eq!(rig.members(), ids);
    rig.prepare_all();
    assert_eq!(rig.core.committed, Step(2));
    rig.pass(16.0);
    let [away, back] = &told(&rig)[..] else { panic!("{:?}", told(&rig)) };
    assert!(away.starts_with("the store is away, and the run waits for it: w0, for"), "{away}");
    assert!(back.starts_with("the store is back, after the run has waited for 21"), "{back}");
    // What the store took does not make the next step's time longer.
    assert_eq!(rig.core.committed, Step(2));
    rig.pass(40.0);
    assert_eq!(rig.phase(), "training");
    rig.pass(25.0);
    assert_eq!(rig.phase(), "forming", "it has not voted for a minute, and waits for nothing");
}

#[test]
fn nobody_is_sent_away_while_the_store_answers_nobody() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.prepare_all();
    // One has no tokens any more, and the others wait for it in the all-reduce.
    pass(&mut rig, HOURS, &ids[..1], &Err("503".into()));
    assert_eq!((rig.phase(), rig.members()), ("training", ids.clone()));
    rig.prepare_all();
    assert_eq!((rig.core.committed, rig.core.stalls), (Step(2), 0));
    // Who dies meanwhile is lost all the same, and the store is away as before.
    pass(&mut rig, 60, &ids[..1], &Err("503".into()));
    rig.kill(ids[2]);
    assert_eq!(rig.members(), ids[..2]);
    rig.ready_all();
    rig.pass(5.0);
    pass(&mut rig, 60, &ids[..1], &Err("503".into()));
    assert_eq!(told(&rig).len(), 1, "{:?}", told(&rig));
    rig.prepare_all();
    rig.pass(1.0);
    assert!(told(&rig)[1].starts_with("the store is back"), "{:?}", told(&rig));
    assert_eq!(rig.core.snapshot(rig.now).reason, "generation 2: 2 workers");
}

#[test]
fn whoever_was_held_up_has_the_whole_time_when_the_store_is_back() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    rig.pass(50.0);
    for _ in 0..3 {
        pass(&mut rig, 30, &ids, &Err("503".into()));
        // Its reads take a while to come to an end.
        rig.pass(55.0);
    }
    assert_eq!((rig.phase(), rig.members()), ("training", ids));
}

#[test]
fn several_whose_reads_are_merely_long_are_not_sent_away() {
    let (mut rig, ids) = Rig::training(4, &[]);
    rig.prepare_all();
    pass_with(&mut rig, 70, &ids[..3], false, &Ok(()));
    assert_eq!((rig.phase(), rig.members(), rig.core.stalls), ("forming", ids, 1));
}

#[test]
fn who_waits_while_the_store_answers_the_coordinator_is_sent_away() {
    let (mut rig, ids) = Rig::training(3, &[]);
    rig.prepare_all();
    pass(&mut rig, 55, &ids[1..2], &Ok(()));
    assert_eq!(rig.members(), ids, "it has its minute");
    pass(&mut rig, 15, &ids[1..2], &Ok(()));
    assert_eq!(rig.members(), [ids[0], ids[2]], "and not the two that wait for it");
    let reason = rig.published.iter().find_map(|event| match event {
        RunEvent::WorkerLost { name, reason, .. } if name == "w1" => Some(reason.clone()),
        _ => None,
    });
    let expected = format!(
        "it has not voted on step 2 within 60 s: it waits for {DETAIL}, while the store answers the coordinator"
    );
    assert_eq!(reason, Some(expected));
    assert_eq!(told(&rig), [""; 0]);
}

#[test]
fn a_short_wait_is_no_event_and_one_of_an_older_generation_is_none() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    pass(&mut rig, 10, &ids, &Err("503".into()));
    rig.prepare_all();
    rig.pass(30.0);
    assert_eq!(told(&rig), [""; 0]);
    rig.looks = 0;
    let generation = Generation(rig.core.generation.0 - 1);
    rig.say(ids[0], Report::Waiting { generation, detail: DETAIL.into(), failed: true });
    assert_eq!((rig.looks, rig.ignored.len()), (0, 0));
}

#[test]
fn a_read_that_is_merely_long_holds_no_deadline_up_while_the_store_answers() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    pass_with(&mut rig, 70, &ids, false, &Ok(()));
    assert_eq!((rig.phase(), rig.core.stalls), ("forming", 1), "nobody voted for a minute");
    assert_eq!(told(&rig), [""; 0]);
}
