//! Evaluations.

use super::*;

fn to_the_evaluation(workers: usize) -> (Rig, Vec<WorkerId>) {
    let (mut rig, ids) = Rig::training(workers, &[]);
    rig.run_to(4);
    rig.prepare_all();
    (rig, ids)
}

fn shares(rig: &Rig, ids: &[WorkerId]) -> Vec<(u64, u64)> {
    let share = |worker: &WorkerId| match rig.last_sent(*worker) {
        Directive::Evaluate(share) => (share.begin, share.end),
        other => panic!("expected an evaluation, found {other:?}"),
    };
    ids.iter().map(share).collect()
}

#[test]
fn the_validation_sequences_are_shared_out_before_the_next_plan() {
    let (mut rig, ids) = to_the_evaluation(3);
    assert_eq!(rig.phase(), "evaluating");
    assert_eq!(shares(&rig, &ids), [(0, 3), (3, 5), (5, 7)]);
    rig.evaluate_all();
    assert_eq!(rig.plan_of(ids[0]).step, 6);
}

#[test]
fn sums_of_the_shares_become_means_over_tokens() {
    for workers in 1..=3 {
        let (mut rig, _) = to_the_evaluation(workers);
        rig.evaluate_all();
        let found = rig.published.iter().rev().find_map(|event| match event {
            RunEvent::Evaluated(record) => Some(record.clone()),
            _ => None,
        });
        let record = found.unwrap();
        assert_eq!((record.step, record.sequences, record.tokens), (Step(5), 7, 112));
        assert_eq!((record.loss, record.entropy, record.mean_depth), (5.0, 0.5, 1.75));
        assert_eq!((record.loss_per_loop, record.exit_pdf), (vec![6.0, 4.0], vec![0.25, 0.75]));
        assert!((record.perplexity - 4f64.exp()).abs() < 1e-12);
    }
}

#[test]
fn ranks_beyond_the_sequences_are_not_asked() {
    let (mut rig, ids) = Rig::training(8, &[]);
    rig.run_to(4);
    rig.prepare_all();
    assert!(matches!(rig.last_sent(ids[7]), Directive::Commit(_)));
    rig.evaluate_all();
    assert_eq!(rig.plan_of(ids[7]).step, 6);
}

#[test]
fn an_evaluation_cut_short_by_a_death_is_done_again_by_the_survivors() {
    let (mut rig, ids) = to_the_evaluation(2);
    rig.kill(ids[0]);
    rig.ready_all();
    assert_eq!(shares(&rig, &ids[1..]), [(0, 7)]);
}

#[test]
fn an_evaluation_of_the_wrong_shape_sends_its_worker_away() {
    let (mut rig, ids) = to_the_evaluation(2);
    let (generation, step) = (rig.core.generation, Step(5));
    rig.say(ids[0], Report::Evaluated { generation, step, sums: vec![1], tokens: 3 });
    assert_eq!(rig.members(), [ids[1]]);
}

#[test]
fn a_resumed_run_does_not_repeat_the_evaluation_it_has() {
    let (mut rig, _) = to_the_evaluation(1);
    rig.evaluate_all();
    let evaluations = rig.core.evaluations.clone();
    let mark = Mark { step: Step(5), weights_digest: weights(Step(5)), record: None, trend: None };
    let resume = Resume { checkpoint: Some(mark), evaluations, ..Resume::default() };
    let mut again = Rig::resumed(&["cluster.workers=1"], resume);
    let worker = again.join("w0");
    again.ready_all();
    assert_eq!(again.plan_of(worker).step, 6);
}
