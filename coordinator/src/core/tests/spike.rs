//! Steps whose loss or gradient norm is far above those before.

use looptrain_proto::v1::Trend;

use super::*;

/// A trend like any other.
fn trend(steps: u64) -> Trend {
    Trend { steps, loss_mean: 3.0, grad_norm_mean: 0.5, ..Trend::default() }
}

/// All vote on a step with this trend; with a spike, rank 1 has the slot that is at fault.
fn vote(rig: &mut Rig, steps: u64, spike: &str) {
    for (rank, worker) in rig.members().into_iter().enumerate() {
        let mut vote = rig.vote(rig.core.generation, rig.core.committed.next());
        if let Report::Prepared { statistics, detail, .. } = &mut vote {
            statistics.trend = Some(trend(steps));
            statistics.spike = spike.to_owned();
            if !spike.is_empty() && rank == 1 {
                detail.push_str("slot 3 has the loss 99");
            }
        }
        rig.say(worker, vote);
    }
}

const STOP: &str = "optimizer.spikes.action=stop";

#[test]
fn a_plan_brings_the_trend_of_the_steps_before() {
    let (mut rig, ids) = Rig::training(2, &["optimizer.spikes={}"]);
    assert_eq!(rig.plan_of(ids[0]).trend, None);
    for steps in 1..=3 {
        vote(&mut rig, steps, "");
        assert!(ids.iter().all(|id| rig.plan_of(*id).trend == Some(trend(steps))));
    }
    // A step that is done again is judged by the same.
    rig.kill(ids[0]);
    rig.ready_all();
    assert_eq!(rig.plan_of(ids[1]).trend, Some(trend(3)));
    let record = rig.core.snapshot(rig.now).last.unwrap();
    let line = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<StepRecord>(&line).unwrap().trend, Some(trend(3)));
}

#[test]
fn a_trend_outlives_all_processes_in_the_manifest_and_a_coordinator_with_its_workers() {
    let (mut rig, _) = Rig::training(1, &["optimizer.spikes={}"]);
    (1..=4).for_each(|steps| vote(&mut rig, steps, ""));
    rig.saved_all();
    assert_eq!(rig.manifests[0].trend, Some(trend(4)));

    // The log has no line.
    let saved = |trend| Resume {
        checkpoint: Some(Mark {
            step: Step(4),
            weights_digest: weights(Step(4)),
            record: None,
            trend,
        }),
        ..Resume::default()
    };
    let given = ["optimizer.spikes={}", "cluster.workers=1"];
    let mut rig = Rig::resumed(&given, saved(Some(trend(4))));
    let fresh = rig.join("w0");
    rig.ready_all();
    assert_eq!((rig.plan_of(fresh).step, rig.plan_of(fresh).trend), (5, Some(trend(4))));

    let mut rig = Rig::resumed(&given, saved(Some(trend(4))));
    let statistics = Some(v1::StepStatistics { trend: Some(trend(6)), ..Default::default() });
    let digest = gradient(Step(6)).to_vec();
    let voted = v1::Prepared { generation: 1, step: 6, digest, statistics, ..Default::default() };
    let held =
        v1::Held { generation: 1, world: 1, step: 6, recent: vec![voted], ..Default::default() };
    let held = Some(held);
    let back = rig.join_as(v1::Join { held, ..introduction("w0") });
    rig.ready_all();
    assert_eq!((rig.plan_of(back).step, rig.plan_of(back).trend), (7, Some(trend(6))));
}

#[test]
fn a_run_that_goes_back_to_what_a_spare_holds_knows_the_trend_of_that_step() {
    let given = ["optimizer.spikes={}", "cluster.max_workers=1", "checkpoint.every_steps=90"];
    let (mut rig, ids) = Rig::training(1, &given);
    let spare = rig.join("spare");
    vote(&mut rig, 1, "");
    rig.say(spare, Report::Fetched { step: Step(1), result: Ok(()) });
    (2..=5).for_each(|steps| vote(&mut rig, steps, ""));
    rig.kill(ids[0]);
    // It came to step 4 before the member died.
    rig.say(spare, Report::Fetched { step: Step(4), result: Err("nobody has it".into()) });
    rig.ready_all();
    assert_eq!((rig.plan_of(spare).step, rig.plan_of(spare).trend), (5, Some(trend(4))));
}

#[test]
fn a_spike_is_forgotten_when_its_step_is_to_be_done_again() {
    let given = [STOP, "cluster.workers=1", "evaluation.every_steps=0"];
    let (mut rig, ids) = Rig::training(1, &given);
    (1..=4).for_each(|steps| vote(&mut rig, steps, ""));
    rig.saved_all();
    rig.manifest_written();
    vote(&mut rig, 5, "");
    vote(&mut rig, 6, "loss 99 is above 4");
    rig.kill(ids[0]);
    assert!(rig.result.is_none(), "step 5 is nowhere: it is done again, and step 6 with it");
    rig.join("fresh");
    rig.ready_all();
    assert_eq!(rig.core.committed, Step(4));
    vote(&mut rig, 5, "");
    vote(&mut rig, 6, "loss 99 is above 4");
    rig.saved_all();
    rig.manifest_written();
    assert!(rig.failure().contains("ends at step 5"), "{}", rig.failure());
}

#[test]
fn a_spike_behind_a_checkpoint_ends_a_run_whose_workers_die() {
    let (mut rig, ids) = Rig::training(1, &[STOP, "cluster.workers=1"]);
    (1..=4).for_each(|steps| vote(&mut rig, steps, ""));
    // The checkpoint of step 4 is still being written.
    vote(&mut rig, 5, "loss 99 is above 4");
    rig.saved_all();
    rig.kill(ids[0]);
    rig.manifest_written();
    assert!(rig.failure().contains("ends at step 4"), "{}", rig.failure());
}

#[test]
fn a_spike_that_is_skipped_is_told_with_the_slot_at_fault() {
    let (mut rig, ids) = Rig::training(2, &["optimizer.spikes={}"]);
    vote(&mut rig, 1, "loss 99 is above 4");
    assert_eq!((rig.core.committed, rig.commits(ids[0])), (Step(1), vec![1]));
    let record = rig.core.snapshot(rig.now).last.unwrap();
    let told = "a spike: loss 99 is above 4; slot 3 has the loss 99";
    assert_eq!((record.skipped.as_deref(), record.bad_slots), (Some(told), 0));
}

#[test]
fn a_run_that_stops_at_spikes_ends_before_one_with_a_checkpoint() {
    let (mut rig, ids) = Rig::training(2, &[STOP]);
    vote(&mut rig, 1, "");
    vote(&mut rig, 2, "loss 99 is above 4");
    assert_eq!((rig.core.committed, rig.commits(ids[0])), (Step(1), vec![1]));
    assert!(matches!(rig.last_sent(ids[0]), Directive::Save(v1::Save { step: 1, .. })));
    assert!(rig.result.is_none(), "the checkpoint is not there yet");
    // Also when a member is lost meanwhile.
    rig.kill(ids[0]);
    rig.ready_all();
    rig.saved_all();
    rig.manifest_written();
    let failure = rig.failure();
    for part in ["step 2 is a spike", "slot 3 has the loss 99", "ends at step 1", "branch"] {
        assert!(failure.contains(part), "{failure}");
    }
    assert!(!rig.published.iter().any(|event| matches!(event, RunEvent::Finished { .. })));
}

#[test]
fn a_spike_in_the_first_step_needs_no_checkpoint() {
    let (mut rig, _) = Rig::training(2, &[STOP]);
    vote(&mut rig, 1, "loss 99 is above 4");
    assert!(rig.failure().contains("ends at step 0"), "{}", rig.failure());
}
