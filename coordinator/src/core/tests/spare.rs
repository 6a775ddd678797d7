//! Workers beyond `max_workers`.

use super::*;

const LONG: [&str; 4] = [
    "cluster.max_workers=2",
    "stages.0.steps=100",
    "checkpoint.every_steps=90",
    "evaluation.every_steps=90",
];

/// A run of two at step 2, which may have no more, and a third worker that has fetched the state.
fn with_a_warm_spare() -> (Rig, Vec<WorkerId>, WorkerId) {
    let (mut rig, ids) = Rig::training(2, &LONG);
    rig.prepare_all();
    let spare = rig.join("spare");
    rig.prepare_all();
    assert!(matches!(rig.last_sent(spare), Directive::Fetch(v1::Fetch { step: 2, .. })));
    rig.say(spare, Report::Fetched { step: Step(2), result: Ok(()) });
    (rig, ids, spare)
}

fn lost_its_way(rig: &mut Rig, spare: WorkerId, step: u64) {
    let result = Err("no peer has the update".to_owned());
    rig.say(spare, Report::Fetched { step: Step(step), result });
}

fn withdrawals(rig: &Rig, worker: WorkerId) -> Vec<bool> {
    let withdrawal = |message: &Directive| match message {
        Directive::Withdraw(withdraw) => Some(withdraw.keep_updates),
        _ => None,
    };
    rig.sent[&worker].iter().filter_map(withdrawal).collect()
}

fn warm(rig: &Rig) -> Vec<String> {
    let workers = rig.core.snapshot(rig.now).workers.into_iter();
    workers.filter(|worker| worker.warm).map(|worker| worker.name).collect()
}

#[test]
fn a_generation_is_no_larger_than_the_spec_says_from_the_start() {
    let mut rig = Rig::new(&["cluster.max_workers=2"]);
    let ids: Vec<WorkerId> = (0..2).map(|at| rig.join(&format!("w{at}"))).collect();
    let third = rig.join("w2");
    assert_eq!(rig.members(), ids);
    rig.ready_all();
    assert_eq!((rig.phase(), rig.members()), ("training", ids));
    assert!(matches!(rig.last_sent(third), Directive::Fetch(v1::Fetch { step: 0, .. })));
}

#[test]
fn a_spare_that_has_fetched_stays_warm_and_the_members_keep_only_updates_for_it() {
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..20).for_each(|_| rig.prepare_all());
    assert_eq!((rig.members(), rig.core.committed), (ids.clone(), Step(22)));
    assert_eq!(warm(&rig), ["spare"]);
    for member in ids {
        assert_eq!(withdrawals(&rig, member), [true], "once, and never all of it");
    }
    assert!(matches!(rig.last_sent(spare), Directive::Fetch(_)), "and it is left alone");
}

#[test]
fn a_warm_spare_is_in_the_generation_that_forms_when_a_member_dies() {
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..20).for_each(|_| rig.prepare_all());
    rig.kill(ids[0]);
    let form = rig.form_of(spare);
    assert_eq!((form.step, form.rank, form.members.len()), (22, 1, 2));
    rig.ready_all();
    assert_eq!((rig.plan_of(spare).step, warm(&rig)), (23, Vec::new()));
    assert_eq!(withdrawals(&rig, ids[1]), [true, false]);
}

#[test]
fn a_second_spare_fetches_a_new_state_while_the_first_one_follows() {
    let (mut rig, ids, first) = with_a_warm_spare();
    (0..5).for_each(|_| rig.prepare_all());
    let second = rig.join("second");
    rig.prepare_all();
    assert!(matches!(rig.last_sent(second), Directive::Fetch(v1::Fetch { step: 8, .. })));
    rig.say(second, Report::Fetched { step: Step(8), result: Ok(()) });
    rig.prepare_all();
    assert_eq!(warm(&rig), ["spare", "second"]);
    ids.into_iter().for_each(|member| rig.kill(member));
    // Their members are gone, and they may have come as far.
    assert_eq!((rig.form_of(first).step, rig.members()), (9, vec![first, second]));
    lost_its_way(&mut rig, second, 8);
    assert_eq!((rig.form_of(first).step, rig.members()), (9, vec![first]));
    rig.ready_all();
    assert_eq!(rig.plan_of(first).step, 10);
    let back = rig.published.iter().any(|event| matches!(event, RunEvent::Rewound { .. }));
    assert!(!back, "no step is done again");
}

#[test]
fn the_last_spare_goes_on_from_where_it_has_come_to_when_all_members_die_at_once() {
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..20).for_each(|_| rig.prepare_all());
    ids.into_iter().for_each(|member| rig.kill(member));
    // It has nothing to report: it came to the committed step before they died.
    assert_eq!((rig.form_of(spare).step, rig.members()), (22, vec![spare]));
    rig.ready_all();
    assert_eq!(rig.plan_of(spare).step, 23);
    let back = rig.published.iter().any(|event| matches!(event, RunEvent::Rewound { .. }));
    assert!(!back, "no step is done again");
}

#[test]
fn spares_that_came_less_far_than_members_that_all_died_say_so_and_the_run_goes_back_to_the_newest()
{
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..20).for_each(|_| rig.prepare_all());
    ids.into_iter().for_each(|member| rig.kill(member));
    lost_its_way(&mut rig, spare, 21);
    assert_eq!((rig.form_of(spare).step, rig.members()), (21, vec![spare]));
    assert_eq!(rig.went_on.last(), Some(&(21, Vec::new())));
    rig.ready_all();
    assert_eq!(rig.plan_of(spare).step, 22);
}

#[test]
fn a_spare_that_cannot_catch_up_as_it_is_let_in_costs_the_others_a_generation_and_fetches_again() {
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..3).for_each(|_| rig.prepare_all());
    rig.kill(ids[0]);
    assert_eq!(rig.members(), [ids[1], spare]);
    lost_its_way(&mut rig, spare, 4);
    assert_eq!((rig.members(), rig.phase()), (vec![ids[1]], "forming"));
    rig.ready_all();
    assert!(matches!(rig.last_sent(spare), Directive::Fetch(v1::Fetch { step: 5, .. })));
    assert_eq!(rig.plan_of(ids[1]).step, 6);
}

#[test]
fn a_spare_that_lost_its_way_fetches_again() {
    let (mut rig, ids, spare) = with_a_warm_spare();
    (0..3).for_each(|_| rig.prepare_all());
    lost_its_way(&mut rig, spare, 4);
    rig.prepare_all();
    assert!(matches!(rig.last_sent(spare), Directive::Fetch(v1::Fetch { step: 6, .. })));
    assert_eq!(withdrawals(&rig, ids[0]), [true, false]);
}
