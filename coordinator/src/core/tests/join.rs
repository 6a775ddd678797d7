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
    assert!(refusal(&rig, worker).contains("version 99, this coordinator 1"));
    assert!(rig.closed.contains(&worker));
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

#[test]
fn a_worker_that_joins_a_training_run_takes_part_after_the_next_checkpoint() {
    let (mut rig, _) = Rig::training(2, &[]);
    rig.prepare_all();
    let late = rig.join("late");
    rig.prepare_all();
    rig.prepare_all();
    assert!(rig.core.rank_of(late).is_none());
    rig.prepare_all();
    assert_eq!(rig.phase(), "waiting", "for the checkpoint of step 4");
    rig.saved_all();
    rig.manifest_written();
    let form = rig.form_of(late);
    assert_eq!((form.step, form.from_checkpoint, form.rank), (4, true, 2));
    rig.ready_all();
    assert_eq!(rig.plan_of(late).step, 5);
}

#[test]
fn a_failed_checkpoint_does_not_keep_the_others_waiting_for_a_spare() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.join("late");
    (0..4).for_each(|_| rig.prepare_all());
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
