//! Who is let in.

use super::*;

fn refusal(rig: &Rig, worker: WorkerId) -> String {
    match rig.last_sent(worker) {
        Directive::Refused(refused) => refused.reason.clone(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn a_worker_is_welcomed_with_the_whole_spec() {
    let mut rig = Rig::new(&[]);
    let worker = rig.join("w0");
    let Directive::Welcome(welcome) = rig.last_sent(worker) else { panic!("no welcome") };
    assert_eq!((welcome.worker_id, welcome.incarnation), (worker.0, 1));
    assert_eq!(Spec::parse("welcome", &welcome.spec, &[]).unwrap(), spec(&[]));
    assert_eq!(rig.phase(), "waiting");
    assert_eq!(rig.core.snapshot(rig.now).reason, "waiting for 2 workers; only w0 is here");
}

#[test]
fn a_worker_of_another_protocol_is_refused_naming_both_versions() {
    let mut rig = Rig::new(&[]);
    let worker = rig.join_as(v1::Join { protocol_version: 99, ..introduction("old") });
    let own = looptrain_proto::PROTOCOL_VERSION;
    assert!(refusal(&rig, worker).contains(&format!("version 99, this coordinator {own}")));
    assert!(rig.closed.contains(&worker));
}

#[test]
fn a_worker_whose_gpu_is_not_well_is_refused_and_the_operator_hears_why() {
    let mut rig = Rig::new(&[]);
    let ailment = "GPU-1 has had 2 uncorrected memory errors".to_owned();
    let worker = rig.join_as(v1::Join { ailment, ..introduction("ill") });
    assert!(refusal(&rig, worker).contains("worker ill is not well: GPU-1 has had 2"));
    let told = rig.published.iter().any(
        |event| matches!(event, RunEvent::WorkerRefused { reason, .. } if reason.contains("GPU-1")),
    );
    assert!(told, "{:?}", rig.published);
}

#[test]
fn a_second_worker_of_the_same_name_is_refused_until_the_first_is_gone() {
    let mut rig = Rig::new(&[]);
    let first = rig.join("w0");
    let second = rig.join("w0");
    assert!(refusal(&rig, second).contains("a worker w0 already"));
    rig.kill(first);
    let third = rig.join("w0");
    assert!(matches!(rig.last_sent(third), Directive::Welcome(_)));
}

#[test]
fn the_first_worker_settles_how_the_run_computes_and_others_must_match() {
    let (mut rig, _) = Rig::training(2, &[]);
    assert_eq!(rig.pinned, ["avx2"]);
    let odd = rig.join_as(v1::Join { numerics: "neon".into(), ..introduction("w9") });
    let reason = refusal(&rig, odd);
    assert!(reason.contains("`neon`") && reason.contains("`avx2`"), "{reason}");
}

#[test]
fn a_resumed_run_remembers_how_it_computes() {
    let numerics = Some("neon".to_owned());
    let mut rig = Rig::resumed(&[], Resume { numerics, ..Resume::default() });
    let worker = rig.join("w0");
    assert!(refusal(&rig, worker).contains("`neon`"));
}

#[test]
fn a_worker_that_left_before_the_start_settles_nothing() {
    let mut rig = Rig::new(&[]);
    let first = rig.join("w0");
    rig.say(first, Report::Leave { reason: "not today".into() });
    let second = rig.join_as(v1::Join { numerics: "neon".into(), ..introduction("w1") });
    assert!(matches!(rig.last_sent(second), Directive::Welcome(_)));
}

#[test]
fn a_worker_that_joins_before_the_first_step_takes_part_in_it() {
    let mut rig = Rig::new(&[]);
    rig.join("w0");
    rig.join("w1");
    let late = rig.join("w2");
    assert!(matches!(rig.last_sent(late), Directive::Welcome(_)));
    rig.ready_all();
    assert_eq!(rig.form_of(late).members.len(), 3);
    rig.ready_all();
    assert_eq!(rig.plan_of(late).step, 1);
}

/// A run of two at step 2, and a third worker that was told to fetch.
fn with_a_guest() -> (Rig, Vec<WorkerId>, WorkerId) {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.prepare_all();
    let guest = rig.join("late");
    rig.prepare_all();
    (rig, ids, guest)
}

fn fetched(rig: &mut Rig, guest: WorkerId, step: u64, result: Result<(), &str>) {
    let result = result.map_err(str::to_owned);
    rig.say(guest, Report::Fetched { step: Step(step), result });
}

fn offers(rig: &Rig, worker: WorkerId) -> Vec<u64> {
    let offer = |message: &Directive| match message {
        Directive::Offer(offer) => Some(offer.step),
        _ => None,
    };
    rig.sent[&worker].iter().filter_map(offer).collect()
}

fn withdrawn(rig: &Rig, worker: WorkerId) -> usize {
    let withdraw = |message: &&Directive| matches!(message, Directive::Withdraw(_));
    rig.sent[&worker].iter().filter(withdraw).count()
}

#[test]
fn a_worker_that_joins_a_training_run_fetches_the_state_while_the_others_go_on() {
    let (mut rig, ids, guest) = with_a_guest();
    let Directive::Fetch(fetch) = rig.last_sent(guest).clone() else { panic!("no fetch") };
    assert_eq!((fetch.step, fetch.sources.len()), (2, 2));
    for member in &ids {
        assert_eq!(offers(&rig, *member), [2]);
        assert_eq!(rig.plan_of(*member).step, 3, "nobody waits");
    }
    fetched(&mut rig, guest, 2, Ok(()));
    assert!(rig.core.rank_of(guest).is_none(), "not before the step has ended");
    rig.prepare_all();
    let form = rig.form_of(guest);
    assert_eq!((form.step, form.rank, form.members.len()), (3, 2, 3));
    rig.ready(ids[0]);
    assert_eq!(withdrawn(&rig, ids[0]), 0, "the guest still catches up");
    rig.ready_all();
    assert_eq!(rig.plan_of(guest).step, 4);
    assert_eq!(ids.iter().map(|id| withdrawn(&rig, *id)).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn a_guest_that_fetches_slowly_keeps_nobody_waiting() {
    let (mut rig, ids, guest) = with_a_guest();
    rig.prepare_all();
    assert_eq!((rig.plan_of(ids[0]).step, offers(&rig, ids[0])), (4, vec![2]));
    fetched(&mut rig, guest, 3, Ok(()));
    rig.prepare_all();
    assert_eq!((rig.form_of(guest).step, rig.form_of(guest).rank), (4, 2));
}

#[test]
fn a_guest_that_has_fetched_takes_part_at_once_when_a_member_dies() {
    let (mut rig, ids, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Ok(()));
    rig.kill(ids[0]);
    let form = rig.form_of(guest);
    assert_eq!((form.step, form.rank, form.members.len()), (2, 1, 2));
}

#[test]
fn a_guest_that_has_fetched_goes_on_alone_when_all_members_die() {
    let (mut rig, ids, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Ok(()));
    ids.into_iter().for_each(|member| rig.kill(member));
    rig.pass(6.0);
    assert_eq!((rig.form_of(guest).step, rig.form_of(guest).members.len()), (2, 1));
}

#[test]
fn a_guest_that_was_still_catching_up_does_not_pull_the_run_down_with_the_last_member() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    let guest = rig.join("late");
    rig.prepare_all();
    fetched(&mut rig, guest, 2, Ok(()));
    rig.prepare_all();
    assert_eq!((rig.form_of(guest).step, rig.members().len()), (3, 2));
    rig.kill(ids[0]);
    assert_eq!((rig.form_of(guest).step, rig.phase()), (3, "forming"), "it may have come so far");
    fetched(&mut rig, guest, 2, Err("no peer has the update to step 3"));
    // Nobody is left that has step 3.
    assert_eq!(rig.form_of(guest).step, 2);
    rig.ready_all();
    assert_eq!(rig.plan_of(guest).step, 3);
}

#[test]
fn a_guest_that_has_caught_up_carries_on_when_the_last_member_dies() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    let guest = rig.join("late");
    rig.prepare_all();
    fetched(&mut rig, guest, 2, Ok(()));
    rig.prepare_all();
    rig.ready(guest);
    rig.kill(ids[0]);
    assert_eq!((rig.form_of(guest).step, rig.members()), (3, vec![guest]));
}

#[test]
fn a_guest_that_no_ring_forms_with_is_sent_away_with_its_address() {
    let (mut rig, ids, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Ok(()));
    rig.prepare_all();
    for _ in 0..3 {
        assert_eq!(rig.members().len(), 3);
        rig.failed(ids[1], Cause::Peer, "cannot connect to late at 127.0.0.1:9");
        rig.pass(1.5);
    }
    assert_eq!(rig.members(), ids);
    let Directive::Finish(finish) = rig.last_sent(guest) else { panic!("not sent away") };
    assert!(finish.reason.contains("late at 127.0.0.1:9"), "{}", finish.reason);
}

#[test]
fn a_guest_whose_weights_differ_is_sent_away_and_not_the_run_ended() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    let guest = rig.join("late");
    rig.prepare_all();
    fetched(&mut rig, guest, 2, Ok(()));
    rig.prepare_all();
    rig.ready(ids[0]);
    let generation = rig.core.generation;
    let weights_digest = Digest::of(b"others");
    rig.say(guest, Report::Ready { generation, step: Step(3), weights_digest });
    assert_eq!((rig.members(), rig.result.is_none()), (ids, true));
}

#[test]
fn a_guest_that_dies_costs_the_members_nothing() {
    let (mut rig, ids, guest) = with_a_guest();
    rig.kill(guest);
    assert_eq!(ids.iter().map(|id| withdrawn(&rig, *id)).collect::<Vec<_>>(), [1, 1]);
    rig.prepare_all();
    assert_eq!(rig.plan_of(ids[0]).step, 4);
}

#[test]
fn a_guest_whose_sources_are_gone_is_asked_again_by_those_that_are_left() {
    // The second guest becomes a member in place of the first source, and then it is alone.
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    let (quick, slow) = (rig.join("quick"), rig.join("slow"));
    rig.prepare_all();
    let stay = rig.join("stay");
    fetched(&mut rig, quick, 2, Ok(()));
    rig.failed(ids[0], Cause::Peer, "reset");
    rig.pass(1.5);
    rig.ready_all();
    assert_eq!(rig.members(), [ids[0], quick]);
    rig.kill(ids[0]);
    // What was fetched of the dead one leads nowhere any more.
    fetched(&mut rig, slow, 2, Ok(()));
    rig.ready_all();
    assert_eq!(rig.members(), [quick]);
    for guest in [slow, stay] {
        let Directive::Fetch(fetch) = rig.last_sent(guest).clone() else { panic!("no fetch") };
        assert_eq!(fetch.sources[0].name, "quick");
    }
}

#[test]
fn a_guest_that_cannot_fetch_takes_part_after_the_next_checkpoint() {
    let (mut rig, _, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Err("no route"));
    rig.prepare_all();
    assert!(rig.core.rank_of(guest).is_none());
    rig.prepare_all();
    assert_eq!(rig.phase(), "waiting", "for the checkpoint of step 4");
    rig.saved_all();
    rig.manifest_written();
    let form = rig.form_of(guest);
    assert_eq!((form.step, form.rank), (4, 2));
    rig.ready_all();
    assert_eq!(rig.plan_of(guest).step, 5);
}

#[test]
fn a_guest_that_the_store_fails_keeps_nobody_waiting() {
    let (mut rig, ids, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Err("no route"));
    (0..2).for_each(|_| rig.prepare_all());
    rig.saved_all();
    rig.manifest_written();
    ids.iter().for_each(|worker| rig.ready(*worker));
    let generation = Generation(rig.form_of(guest).generation);
    let wait = |detail: &str, failed| {
        let detail = format!("the checkpoint of step 4{detail}");
        Report::Waiting { generation, detail, failed }
    };
    rig.say(guest, wait(", for 10 s", false));
    assert_eq!(rig.members().len(), 3, "it may take its time");
    rig.say(guest, wait(": 503", true));
    assert_eq!(rig.members(), ids);
}

#[test]
fn a_guest_that_never_answers_is_not_kept_for_for_ever() {
    let long = ["stages.0.steps=100", "checkpoint.every_steps=90", "evaluation.every_steps=90"];
    let (mut rig, ids) = Rig::training(2, &long);
    rig.prepare_all();
    let guest = rig.join("late");
    (0..70).for_each(|_| rig.prepare_all());
    assert_eq!(rig.core.committed, Step(71));
    assert_eq!(ids.iter().map(|id| withdrawn(&rig, *id)).collect::<Vec<_>>(), [0, 0]);
    rig.pass(31.0);
    rig.prepare_all();
    assert_eq!(ids.iter().map(|id| withdrawn(&rig, *id)).collect::<Vec<_>>(), [1, 1]);
    fetched(&mut rig, guest, 70, Ok(()));
    rig.prepare_all();
    assert!(rig.core.rank_of(guest).is_none(), "it would find nothing to catch up with");
}

#[test]
fn a_guest_has_as_many_steps_as_the_members_keep_however_long_they_take() {
    let long = ["stages.0.steps=100", "checkpoint.every_steps=90", "evaluation.every_steps=90"];
    let (mut rig, _) = Rig::training(2, &long);
    rig.prepare_all();
    let guest = rig.join("late");
    for _ in 0..60 {
        rig.pass(10.0);
        rig.prepare_all();
    }
    assert!(rig.core.is_guest(guest));
}

#[test]
fn a_failed_checkpoint_does_not_keep_the_others_waiting_for_a_spare() {
    let (mut rig, ids, guest) = with_a_guest();
    fetched(&mut rig, guest, 2, Err("no route"));
    (0..2).for_each(|_| rig.prepare_all());
    let save = rig.saves(ids[0])[0];
    rig.say(
        ids[0],
        Report::PartSaved {
            step: Step(4),
            part: save.part as usize,
            parts: 2,
            result: Err("503".into()),
        },
    );
    assert_eq!(rig.plan_of(ids[0]).step, 5);
}

#[test]
fn nobody_joins_a_run_that_has_ended() {
    let (mut rig, _) = Rig::training(1, &[]);
    rig.run_to(10);
    let late = rig.join("late");
    assert!(refusal(&rig, late).contains("all 10 steps are done"));
}
