//! Workers that outlive their coordinator, or their session.

use super::*;

/// What a worker of a world of two brings back.
fn held(step: u64, prepared: Option<u64>) -> v1::Held {
    v1::Held { generation: 7, world: 2, step, prepared, recent: Vec::new(), lineage: Vec::new() }
}

fn back(rig: &mut Rig, name: &str, held: v1::Held) -> WorkerId {
    rig.join_as(v1::Join { held: Some(held), ..introduction(name) })
}

fn voted(step: u64) -> v1::Prepared {
    v1::Prepared {
        generation: 7,
        step,
        digest: gradient(Step(step)).to_vec(),
        statistics: Some(v1::StepStatistics { loss: step as f64, ..Default::default() }),
        sections: Some(v1::Sections { compute: 0.5, reduce: 0.25, ..Default::default() }),
        ..Default::default()
    }
}

/// What a coordinator has logged that dies so many steps behind the checkpoint of step 4.
fn logged(steps: u64) -> Vec<StepRecord> {
    let mut before = Rig::training(2, &[]).0;
    before.run_to(4 + steps);
    (before.published.into_iter())
        .filter_map(|event| match event {
            RunEvent::Committed(record) if record.step > Step(4) => Some(*record),
            _ => None,
        })
        .collect()
}

/// A coordinator that finds the checkpoint of step 4, and so many steps behind it in the log.
fn successor(steps: u64) -> Rig {
    succeeding(logged(steps))
}

/// A coordinator that finds the checkpoint of step 4, and this behind it in the log.
fn succeeding(tail: Vec<StepRecord>) -> Rig {
    let checkpoint =
        Mark { step: Step(4), weights_digest: weights(Step(4)), record: None, trend: None };
    let numerics = Some("avx2".to_owned());
    let incarnation = Incarnation(2);
    let resume = Resume {
        workers_may_return: true,
        incarnation,
        checkpoint: Some(checkpoint),
        numerics,
        tail,
        ..Resume::default()
    };
    Rig::resumed(&[], resume)
}

#[test]
fn a_worker_that_says_it_holds_what_no_run_comes_to_is_refused() {
    let generation = v1::Held { generation: u64::MAX, ..held(4, None) };
    for wrong in [held(u64::MAX, None), held(4, Some(11)), generation] {
        let mut rig = successor(0);
        back(&mut rig, "w0", wrong);
        assert_eq!(rig.core.roster.len(), 0);
        let refused = rig.published.iter().any(|event| {
            matches!(event, RunEvent::WorkerRefused { reason, .. } if reason.contains("start it anew"))
        });
        assert!(refused, "{:?}", rig.published);
    }
}

#[test]
fn a_step_that_took_for_ever_by_the_log_or_by_a_worker_is_not_waited_for_past_all_time() {
    let mut tail = logged(1);
    tail[0].seconds = 1.8e19;
    let mut rig = succeeding(tail);
    let slow = v1::Sections { compute: 1.8e19, ..Default::default() };
    let vote = v1::Prepared { sections: Some(slow), ..voted(5) };
    let brought = v1::Held { recent: vec![vote], ..held(5, None) };
    back(&mut rig, "w0", brought);
    rig.feed(Event::Tick);
    assert!(rig.result.is_none());
}

#[test]
fn workers_that_outlive_their_coordinator_go_on_where_they_were() {
    let mut rig = successor(2);
    let ids = ["w0", "w1"].map(|name| back(&mut rig, name, held(6, None)));
    assert_eq!(rig.went_on, [(6, vec![])]);
    assert_eq!((rig.form_of(ids[0]).step, rig.form_of(ids[1]).members.len()), (6, 2));
    assert!(rig.form_of(ids[0]).generation > 7);
    rig.run_to(10);
    assert_eq!(rig.outcome().weights_digest, Some(weights(Step(10))));
    let rewound = |event: &RunEvent| matches!(event, RunEvent::Rewound { .. });
    assert!(!rig.published.iter().any(rewound));
}

#[test]
fn a_step_that_one_committed_and_the_other_prepared_is_committed_by_both() {
    let mut rig = successor(1);
    back(&mut rig, "w0", held(5, Some(6)));
    let second = back(&mut rig, "w1", held(6, None));
    assert_eq!((rig.form_of(second).step, rig.members().len()), (6, 2));
    rig.ready_all();
    assert_eq!(rig.plan_of(second).step, 7);
}

#[test]
fn a_step_that_all_prepared_and_nobody_committed_is_tried_again() {
    let mut rig = successor(1);
    let ids = ["w0", "w1"].map(|name| back(&mut rig, name, held(5, Some(6))));
    assert_eq!(rig.form_of(ids[0]).step, 5);
}

#[test]
fn who_may_have_died_with_the_coordinator_is_waited_for_as_long_as_a_step_takes_and_a_moment() {
    let mut tail = logged(2);
    tail.iter_mut().for_each(|record| record.seconds = 3.0);
    let mut rig = succeeding(tail);
    let survivor = back(&mut rig, "w0", held(6, None));
    rig.pass(4.5);
    assert_eq!(rig.phase(), "waiting", "the other one may still compute a slot");
    rig.pass(1.0);
    assert_eq!((rig.form_of(survivor).step, rig.members().len()), (6, 1));
}

#[test]
fn steps_that_died_with_the_log_of_the_coordinator_are_known_from_the_votes() {
    let mut rig = successor(1);
    let recent = vec![voted(5), voted(6), voted(7)];
    back(&mut rig, "w0", v1::Held { recent: recent.clone(), ..held(6, Some(7)) });
    back(&mut rig, "w1", v1::Held { recent, ..held(7, None) });
    assert_eq!(rig.went_on, [(7, vec![6, 7])]);
    let last = rig.core.snapshot(rig.now).last.unwrap();
    assert_eq!((last.step, last.loss, last.seconds, last.world), (Step(7), 7.0, 0.75, 2));
    assert_eq!((last.generation, last.tokens), (Generation(7), 7 * 160));
}

#[test]
fn a_checkpoint_that_a_worker_left_alone_adds_to_the_log_what_the_coordinator_could_not() {
    let recent = vec![voted(4), voted(5), voted(6), voted(7)];
    let mut rig = Rig::resumed(
        &[],
        Resume {
            checkpoint: Some(Mark {
                step: Step(6),
                weights_digest: weights(Step(6)),
                record: None,
                trend: None,
            }),
            logged: Step(4),
            bequest: Some(v1::Held { recent, ..held(6, Some(7)) }),
            ..Resume::default()
        },
    );
    rig.join("fresh");
    let second = rig.join("fresher");
    // Step 7 was prepared, and nobody knows whether it was committed: it is done again.
    assert_eq!((rig.form_of(second).step, rig.went_on.clone()), (6, vec![(6, vec![5, 6])]));
    assert_eq!(rig.core.snapshot(rig.now).last.map(|last| last.loss), Some(6.0));
}

#[test]
fn without_a_worker_that_holds_it_a_logged_step_is_done_again() {
    let mut rig = successor(2);
    rig.join("fresh");
    let second = rig.join("fresher");
    rig.pass(4.0);
    assert_eq!(rig.phase(), "waiting", "those that hold it may be on their way");
    rig.pass(2.0);
    assert_eq!(rig.went_on, [(4, vec![])]);
    assert_eq!(rig.form_of(second).step, 4);
    let told = |event: &RunEvent| matches!(event, RunEvent::Rewound { to: Step(4), .. });
    assert!(rig.published.iter().any(told), "steps 5 and 6 are done again");
}

#[test]
fn those_that_hold_what_took_long_are_waited_for_until_they_can_have_noticed() {
    // What is at stake, and how long that is waited for.
    for (seconds, wait) in [(1.0, 5.0), (6.0, 12.0), (20.0, 40.0), (100.0, 125.5)] {
        let mut tail = logged(2);
        tail.iter_mut().for_each(|record| record.seconds = seconds);
        let mut rig = succeeding(tail);
        rig.join("fresh");
        rig.join("fresher");
        rig.pass(wait - 1.0);
        assert_eq!(rig.phase(), "waiting", "{seconds}");
        let late = back(&mut rig, "w0", held(6, None));
        rig.pass(seconds + 2.5);
        assert_eq!((rig.form_of(late).step, rig.members()), (6, vec![late]), "{seconds}");

        let mut tail = logged(2);
        tail.iter_mut().for_each(|record| record.seconds = seconds);
        let mut rig = succeeding(tail);
        rig.join("fresh");
        rig.join("fresher");
        rig.pass(wait + 1.0);
        assert_eq!((rig.phase(), rig.core.committed), ("forming", Step(4)), "{seconds}");
    }
}

#[test]
fn who_fell_silent_may_come_back_and_who_died_does_not() {
    for silent in [true, false] {
        let (mut rig, ids) = Rig::training(2, &[]);
        rig.run_to(4);
        for _ in 0..3 {
            // Long steps, with everybody alive.
            rig.pass(10.0);
            rig.prepare_all();
        }
        match silent {
            true => (0..4).for_each(|_| {
                rig.now += Duration::from_secs(1);
                rig.feed(Event::Tick);
            }),
            false => ids.into_iter().for_each(|worker| rig.kill(worker)),
        }
        assert_eq!(rig.core.roster.len(), 0);
        rig.join("fresh");
        rig.pass(10.0);
        let phase = if silent { "waiting" } else { "forming" };
        assert_eq!(rig.phase(), phase);
        if silent {
            let back = back(&mut rig, "w0", held(7, None));
            rig.pass(40.0);
            assert_eq!((rig.form_of(back).step, rig.members()), (7, vec![back]));
        }
    }
}

#[test]
fn a_fresh_worker_beside_those_that_came_back_fetches_from_them() {
    let mut rig = successor(2);
    let fresh = rig.join("fresh");
    let one = back(&mut rig, "w0", held(6, None));
    rig.pass(6.0);
    assert_eq!(rig.members(), [one], "the fresh one has no way to step 6 yet");
    rig.ready_all();
    let Directive::Fetch(fetch) = rig.last_sent(fresh).clone() else { panic!("no fetch") };
    assert_eq!((fetch.step, fetch.sources[0].name.as_str()), (6, "w0"));
}

#[test]
fn those_that_came_back_wait_a_moment_for_the_others() {
    let mut rig = successor(2);
    let one = back(&mut rig, "w0", held(6, None));
    rig.pass(2.0);
    assert_eq!(rig.phase(), "waiting");
    rig.pass(0.5);
    assert_eq!((rig.form_of(one).step, rig.members().len()), (6, 1));
}

#[test]
fn workers_that_all_lost_their_sessions_at_once_lose_no_step() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    ids.into_iter().for_each(|worker| rig.kill(worker));
    // The commit of step 6 reached one of them.
    back(&mut rig, "w0", held(5, Some(6)));
    let second = back(&mut rig, "w1", held(6, None));
    assert_eq!(rig.form_of(second).step, 6);
    let rewound = |event: &RunEvent| matches!(event, RunEvent::Rewound { .. });
    assert!(!rig.published.iter().any(rewound));
}

#[test]
fn a_step_that_this_coordinator_committed_needs_nobody_who_heard_of_it() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    ids.into_iter().for_each(|worker| rig.kill(worker));
    let ids = ["w0", "w1"].map(|name| back(&mut rig, name, held(5, Some(6))));
    assert_eq!(rig.form_of(ids[0]).step, 6);
}

#[test]
fn a_worker_with_the_state_of_another_run_is_refused() {
    let mut rig = successor(1);
    let odd = v1::Held { lineage: vec![1], ..held(6, None) };
    let worker = back(&mut rig, "odd", odd);
    let Directive::Refused(refused) = rig.last_sent(worker) else { panic!("not refused") };
    assert!(refused.reason.contains("another run") && !refused.for_now);
}

#[test]
fn a_worker_that_is_still_on_the_roster_is_told_to_try_again() {
    let mut rig = successor(1);
    rig.join("w0");
    let again = rig.join("w0");
    let Directive::Refused(refused) = rig.last_sent(again) else { panic!("not refused") };
    assert!(refused.for_now);
}

#[test]
fn a_worker_that_comes_back_while_fresh_ones_are_forming_does_not_disturb_them() {
    let mut rig = successor(2);
    let ids = ["fresh", "fresher"].map(|name| rig.join(name));
    rig.pass(6.0);
    let late = back(&mut rig, "w0", held(6, None));
    ids.into_iter().for_each(|worker| rig.ready(worker));
    assert_eq!(rig.core.committed, Step(4));
    rig.ready_all();
    assert_eq!((rig.plan_of(late).step, rig.members().len()), (5, 3));
}

#[test]
fn a_step_that_the_log_has_is_committed_by_those_that_only_prepared_it() {
    let mut rig = successor(2);
    let ids = ["w0", "w1"].map(|name| back(&mut rig, name, held(5, Some(6))));
    assert_eq!((rig.form_of(ids[0]).step, rig.went_on.last()), (6, Some(&(6, vec![]))));
}

#[test]
fn a_successor_that_is_stopped_before_anybody_came_leaves_the_log_alone() {
    let mut rig = successor(2);
    rig.feed(Event::StopRequested { reason: "SIGTERM".into() });
    assert_eq!((rig.outcome().step, rig.went_on.len()), (Step(4), 0));
}

#[test]
fn a_successor_that_is_stopped_saves_what_workers_hold_first() {
    let mut rig = successor(2);
    back(&mut rig, "w0", held(6, None));
    rig.feed(Event::StopRequested { reason: "SIGTERM".into() });
    rig.pass(6.0);
    rig.ready_all();
    rig.saved_all();
    rig.manifest_written();
    assert_eq!((rig.outcome().step, rig.outcome().stopped), (Step(6), true));
}

#[test]
fn a_worker_that_lags_behind_the_log_does_not_pull_the_others_back() {
    let mut rig = successor(2);
    back(&mut rig, "lagging", held(5, None));
    rig.pass(4.0);
    let two = ["w0", "w1"].map(|name| back(&mut rig, name, held(6, None)));
    assert_eq!((rig.form_of(two[0]).step, rig.members()), (6, two.to_vec()));
}
