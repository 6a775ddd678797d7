//! Checkpoints.

use super::*;

fn to_the_save(workers: usize) -> (Rig, Vec<WorkerId>) {
    let (mut rig, ids) = Rig::training(workers, &[]);
    (0..4).for_each(|_| rig.prepare_all());
    (rig, ids)
}

fn failed(rig: &Rig) -> Vec<Step> {
    let step = |event: &RunEvent| match event {
        RunEvent::CheckpointFailed { step, .. } => Some(*step),
        _ => None,
    };
    rig.published.iter().filter_map(step).collect()
}

#[test]
fn every_rank_saves_a_part_and_training_goes_on_meanwhile() {
    let (rig, ids) = to_the_save(2);
    for (part, worker) in ids.iter().enumerate() {
        let sent = &rig.sent[worker];
        let [Directive::Commit(_), Directive::Save(save), Directive::Plan(plan)] =
            &sent[sent.len() - 3..]
        else {
            panic!("{sent:?}")
        };
        assert_eq!((save.step, save.part, save.parts), (4, part as u32, 2));
        assert_eq!(plan.step, 5);
    }
}

#[test]
fn the_manifest_is_written_when_all_parts_are_in() {
    let (mut rig, ids) = to_the_save(2);
    rig.saved(ids[1]);
    assert!(rig.manifests.is_empty());
    rig.prepare_all();
    rig.saved(ids[0]);
    let draft = &rig.manifests[0];
    assert_eq!((draft.step, draft.weights_digest), (Step(4), weights(Step(4))));
    assert_eq!(draft.cursor.sequences, 40);
    let files: Vec<&str> = draft.parts.iter().map(|part| part.file.as_str()).collect();
    assert_eq!(files, ["state-0-of-2", "state-1-of-2"]);
    assert!(rig.core.checkpoint.is_none(), "a checkpoint exists once its manifest does");
    rig.manifest_written();
    let saved = RunEvent::CheckpointSaved { step: Step(4), seconds: 0.1, bytes: 200, stall: 0.0 };
    assert_eq!(rig.published.last(), Some(&saved));
}

#[test]
fn a_save_slower_than_the_interval_delays_the_next_one_and_says_so_once() {
    let long = ["stages.0.steps=20", "evaluation.every_steps=0"];
    let (mut rig, ids) = Rig::training(2, &long);
    (0..12).for_each(|_| rig.prepare_all());
    let delayed: Vec<(Step, Step)> = (rig.published.iter())
        .filter_map(|event| match event {
            RunEvent::CheckpointDelayed { step, saving, .. } => Some((*step, *saving)),
            _ => None,
        })
        .collect();
    assert_eq!(delayed, [(Step(8), Step(4))], "and not again at step 12");
    assert!(failed(&rig).is_empty());
    ids.iter().for_each(|worker| rig.saved(*worker));
    rig.manifest_written();
    rig.prepare_all();
    let Some(Directive::Save(save)) =
        rig.sent[&ids[0]].iter().rfind(|sent| matches!(sent, Directive::Save(_)))
    else {
        panic!("the delayed one is made")
    };
    assert_eq!(save.step, 13, "of the state that is committed by then");
}

fn steps_saved(rig: &Rig, worker: WorkerId) -> Vec<u64> {
    rig.saves(worker).iter().map(|save| save.step).collect()
}

#[test]
fn an_operator_has_a_checkpoint_made_at_the_next_boundary() {
    let (mut rig, ids) = Rig::training(1, &[]);
    rig.prepare_all();
    rig.feed(Event::SaveRequested);
    assert!(steps_saved(&rig, ids[0]).is_empty(), "not in the middle of a step");
    rig.prepare_all();
    assert_eq!(steps_saved(&rig, ids[0]), [2]);
    rig.saved(ids[0]);
    rig.manifest_written();
    // In a pause at once, unless there is one.
    rig.feed(Event::PauseRequested { reason: "new disks".into() });
    rig.prepare_all();
    rig.feed(Event::SaveRequested);
    assert_eq!(steps_saved(&rig, ids[0]), [2, 3]);
    rig.saved(ids[0]);
    rig.manifest_written();
    rig.feed(Event::SaveRequested);
    assert_eq!((rig.phase(), steps_saved(&rig, ids[0])), ("paused", vec![2, 3]));
    rig.feed(Event::ResumeRequested);
    rig.prepare_all();
    assert_eq!(steps_saved(&rig, ids[0]), [2, 3, 4], "as it is due");
}

#[test]
fn a_checkpoint_is_also_made_when_the_last_one_is_old() {
    let rarely = ["checkpoint.every_steps=1000", "checkpoint.every_seconds=100"];
    let more = ["stages.0.steps=20", "evaluation.every_steps=0"];
    let (mut rig, ids) = Rig::training(1, &[rarely, more].concat());
    let mut saved = Vec::new();
    for _ in 1..=5 {
        rig.pass(60.0);
        rig.prepare_all();
        saved.push(steps_saved(&rig, ids[0]));
        if rig.core.saving.is_some() {
            rig.saved(ids[0]);
            rig.manifest_written();
        }
    }
    assert_eq!(saved, [vec![], vec![2], vec![2], vec![2, 4], vec![2, 4]]);
}

#[test]
fn parts_of_an_older_generation_still_count() {
    let (mut rig, ids) = to_the_save(3);
    rig.saved(ids[0]);
    rig.kill(ids[0]);
    rig.ready_all();
    rig.saved(ids[1]);
    rig.saved(ids[2]);
    assert_eq!(rig.manifests.len(), 1);
    assert_eq!(rig.manifests[0].parts.len(), 3);
}

#[test]
fn a_writer_lost_before_its_part_is_in_means_a_new_checkpoint_at_the_next_boundary() {
    let (mut rig, ids) = to_the_save(3);
    rig.saved(ids[0]);
    rig.kill(ids[1]);
    assert_eq!(failed(&rig), [Step(4)]);
    rig.ready_all();
    let save = *rig.saves(ids[2]).last().unwrap();
    assert_eq!((save.step, save.part, save.parts), (4, 1, 2));
    rig.say(ids[2], Rig::part(v1::Save { part: 1, parts: 3, ..save }));
    rig.saved(ids[0]);
    assert!(rig.manifests.is_empty(), "a part of the old split is no part of the new one");
    rig.saved(ids[2]);
    assert_eq!(rig.manifests[0].parts.len(), 2);
}

#[test]
fn a_checkpoint_due_while_another_is_in_the_making_waits_for_it() {
    let (mut rig, ids) = to_the_save(1);
    (0..1).for_each(|_| rig.prepare_all());
    rig.evaluate_all();
    (0..3).for_each(|_| rig.prepare_all());
    assert_eq!(rig.core.committed, Step(8));
    assert_eq!(rig.saves(ids[0]).len(), 1);
    rig.saved_all();
    rig.manifest_written();
    assert_eq!(rig.saves(ids[0]).len(), 1, "step 9 is being computed");
    rig.prepare_all();
    assert_eq!(rig.saves(ids[0]).last().unwrap().step, 9);
}

#[test]
fn a_refused_part_is_reported_and_the_save_is_tried_again_later() {
    let (mut rig, ids) = to_the_save(1);
    let refused = Report::PartSaved { step: Step(4), part: 0, parts: 1, result: Err("503".into()) };
    rig.say(ids[0], refused);
    assert_eq!(failed(&rig), [Step(4)]);
    rig.prepare_all();
    rig.evaluate_all();
    assert_eq!(rig.saves(ids[0]).len(), 1, "patience first");
    rig.pass(3.0);
    rig.prepare_all();
    assert_eq!(rig.saves(ids[0]).last().unwrap().step, 6);
}

#[test]
fn a_manifest_that_cannot_be_written_is_no_checkpoint() {
    let (mut rig, ids) = to_the_save(1);
    rig.saved(ids[0]);
    rig.feed(Event::CheckpointRefused { step: Step(4), reason: "denied".into() });
    assert_eq!(failed(&rig), [Step(4)]);
    assert!(rig.core.checkpoint.is_none());
}

#[test]
fn a_rank_that_saved_other_weights_is_sent_away() {
    let (mut rig, ids) = to_the_save(3);
    rig.saved(ids[0]);
    rig.saved(ids[2]);
    let Report::PartSaved { step, part, parts, result } = Rig::part(rig.saves(ids[1])[0]) else {
        unreachable!()
    };
    let odd = SavedPart { weights_digest: Digest::of(b"rot"), ..result.unwrap() };
    rig.say(ids[1], Report::PartSaved { step, part, parts, result: Ok(odd) });
    assert!(rig.manifests.is_empty());
    assert_eq!(failed(&rig), [Step(4)]);
    assert_eq!(rig.members(), [ids[0], ids[2]]);
}

#[test]
fn an_answer_that_comes_twice_does_not_undo_a_checkpoint_whose_manifest_is_on_its_way() {
    let (mut rig, ids) = Rig::training(1, &[]);
    (0..4).for_each(|_| rig.prepare_all());
    rig.saved_all();
    let again = Report::PartSaved { step: Step(4), part: 0, parts: 1, result: Err("503".into()) };
    rig.say(ids[0], again);
    rig.manifest_written();
    assert_eq!(rig.core.checkpoint.as_ref().map(|mark| mark.step), Some(Step(4)));
}
