//! Checkpoints that nobody has told of.

use super::*;

fn left(step: u64) -> Left {
    let mark =
        Mark { step: Step(step), weights_digest: weights(Step(step)), record: None, trend: None };
    Left { mark, memory: None }
}

fn rewound(rig: &Rig) -> Vec<Step> {
    let to = |event: &RunEvent| match event {
        RunEvent::Rewound { to, .. } => Some(*to),
        _ => None,
    };
    rig.published.iter().filter_map(to).collect()
}

/// A run whose worker is lost at step 7, behind the checkpoint of step 4.
fn deserted() -> Rig {
    let (mut rig, ids) = Rig::training(1, &["cluster.workers=1"]);
    rig.run_to(7);
    rig.kill(ids[0]);
    rig
}

#[test]
fn what_a_worker_has_left_while_nobody_heard_of_it_is_gone_on_from() {
    let mut rig = deserted();
    rig.left = Some(left(7));
    let fresh = rig.join("fresh");
    assert_eq!((rig.searches, rig.form_of(fresh).step), (1, 7));
    assert_eq!(rewound(&rig), []);
    rig.run_to(10);
    assert_eq!(rig.outcome().weights_digest, Some(weights(Step(10))));
}

#[test]
fn of_what_was_left_the_newest_counts_and_the_rest_is_done_again() {
    for (found, from) in [(None, 4), (Some(left(6)), 6), (Some(left(2)), 4)] {
        let mut rig = deserted();
        rig.left = found;
        let fresh = rig.join("fresh");
        assert_eq!(rig.form_of(fresh).step, from);
        assert_eq!(rewound(&rig), [Step(from)]);
    }
}

#[test]
fn a_store_that_does_not_say_what_there_is_is_asked_again() {
    let mut rig = deserted();
    rig.mute = true;
    rig.join("fresh");
    assert_eq!((rig.phase(), rig.searches), ("waiting", 1));
    rig.pass(2.0);
    let searches = rig.searches;
    assert!(rig.phase() == "waiting" && searches > 1);
    (rig.mute, rig.left) = (false, Some(left(7)));
    rig.pass(1.0);
    assert_eq!((rig.phase(), rig.core.committed), ("forming", Step(7)));
}

#[test]
fn a_run_that_lost_nothing_looks_for_nothing() {
    let (mut rig, ids) = Rig::training(2, &[]);
    rig.run_to(6);
    rig.kill(ids[0]);
    rig.ready_all();
    rig.run_to(10);
    assert_eq!(rig.searches, 0);
}
