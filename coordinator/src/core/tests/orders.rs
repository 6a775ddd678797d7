//! What operators ask for.

use super::*;

fn drain(rig: &mut Rig, name: &str) -> Result<WorkerId, String> {
    let worker = rig.core.drainable(name)?;
    rig.feed(Event::DrainRequested { worker, reason: "maintenance".into() });
    Ok(worker)
}

#[test]
fn a_drained_worker_is_told_and_leaves_by_itself() {
    let (mut rig, ids) = Rig::training(2, &[]);
    assert_eq!(drain(&mut rig, "w1"), Ok(ids[1]));
    let Directive::Drain(order) = rig.last_sent(ids[1]) else { panic!("not told") };
    assert_eq!(order.reason, "maintenance");
    assert_eq!(rig.members(), ids, "until it goes");
    rig.say(ids[1], Report::Leave { reason: "maintenance".into() });
    assert_eq!(rig.members(), [ids[0]]);
}

#[test]
fn the_last_worker_that_stays_cannot_be_drained_and_neither_can_a_stranger() {
    let (mut rig, _) = Rig::training(2, &[]);
    let error = drain(&mut rig, "w7").unwrap_err();
    assert_eq!(error, "there is no worker w7; there are w0, w1");
    assert!(drain(&mut rig, "w0").is_ok());
    let error = drain(&mut rig, "w1").unwrap_err();
    assert!(error.contains("w1 is the last worker that trains"), "{error}");
    rig.join("w2");
    assert!(drain(&mut rig, "w2").is_ok(), "a spare may go at any time");
}

#[test]
fn a_paused_run_holds_at_the_next_boundary_and_goes_on_when_resumed() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    rig.feed(Event::PauseRequested { reason: "new switches".into() });
    assert_eq!(rig.phase(), "training", "the step in flight ends first");
    rig.prepare_all();
    assert_eq!(rig.phase(), "paused");
    let snapshot = rig.core.snapshot(rig.now);
    assert_eq!(
        (snapshot.step, snapshot.reason.as_str()),
        (Step(2), "paused at step 2: new switches")
    );
    rig.pass(7200.0);
    assert_eq!((rig.phase(), rig.members()), ("paused", ids.clone()), "for as long as it takes");
    rig.kill(ids[0]);
    rig.ready_all();
    assert_eq!((rig.phase(), rig.members()), ("paused", vec![ids[1]]), "whoever comes or goes");
    rig.feed(Event::ResumeRequested);
    assert_eq!(rig.plan_of(ids[1]).step, 3);
    let reason = Some("new switches".to_owned());
    assert_eq!(rig.pauses, [reason, None], "for later coordinators");
}

#[test]
fn a_run_that_was_paused_forms_under_the_next_coordinator_and_holds() {
    let paused = Some("new switches".to_owned());
    let mut rig = Rig::resumed(&[], Resume { paused, ..Resume::default() });
    let worker = rig.join("w0");
    rig.join("w1");
    rig.pass(6.0);
    rig.ready_all();
    assert_eq!(rig.phase(), "paused");
    assert_eq!(rig.core.snapshot(rig.now).reason, "paused at step 0: new switches");
    rig.feed(Event::PauseRequested { reason: "even newer ones".into() });
    assert_eq!(rig.pauses, [], "it is paused");
    rig.feed(Event::ResumeRequested);
    assert_eq!(rig.plan_of(worker).step, 1);
    assert_eq!(rig.pauses, [None]);
}

#[test]
fn a_worker_that_joins_a_paused_run_fetches_the_state_meanwhile_and_takes_part_when_it_goes_on() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.feed(Event::PauseRequested { reason: "new machines".into() });
    rig.prepare_all();
    let late = rig.join("late");
    let Directive::Fetch(order) = rig.last_sent(late) else { panic!("not told to fetch") };
    assert_eq!(order.step, 1);
    rig.say(late, Report::Fetched { step: Step(1), result: Ok(()) });
    rig.pass(10.0);
    assert_eq!((rig.phase(), rig.members()), ("paused", ids), "nobody takes part in a pause");
    rig.feed(Event::ResumeRequested);
    assert_eq!(rig.form_of(late).members.len(), 3);
}

#[test]
fn a_paused_run_can_be_stopped() {
    let (mut rig, _) = Rig::training(2, &[]);
    rig.feed(Event::PauseRequested { reason: String::new() });
    rig.prepare_all();
    assert_eq!(rig.phase(), "paused");
    rig.feed(Event::StopRequested { reason: "enough".into() });
    rig.saved_all();
    rig.manifest_written();
    assert_eq!((rig.outcome().step, rig.outcome().stopped), (Step(1), true));
}

#[test]
fn a_message_that_is_not_acted_on_is_answered_with_why() {
    let (mut rig, ids) = Rig::training(2, &[]);
    let stale = rig.vote(Generation(0), Step(1));
    rig.say(ids[0], stale);
    let Directive::Rejected(rejected) = rig.last_sent(ids[0]) else { panic!("no answer") };
    assert_eq!(rejected.reason, "it speaks of generation 0, now is 1");
}
