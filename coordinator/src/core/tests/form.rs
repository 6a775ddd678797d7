//! From joined workers to a generation that holds one state.

use super::*;

#[test]
fn a_generation_forms_when_enough_workers_are_here() {
    let mut rig = Rig::new(&[]);
    let first = rig.join("w0");
    let second = rig.join("w1");
    let form = rig.form_of(second);
    assert_eq!((form.generation, form.rank, form.step), (1, 1, 0));
    let names: Vec<&str> = form.members.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names, ["w0", "w1"]);
    assert_eq!(form.members[0].peer_address, "w0:1");
    assert_eq!(rig.form_of(first).rank, 0);
}

#[test]
fn the_members_of_a_generation_are_one_list_for_all_of_them() {
    let mut rig = Rig::new(&["cluster.workers=3"]);
    let ids = ["w0", "w1", "w2"].map(|name| rig.join(name));
    let lists = ids.map(|worker| rig.form_of(worker).members.as_ptr());
    assert_eq!(lists, [lists[0]; 3], "thousands of copies of thousands of members take gigabytes");
}

#[test]
fn training_starts_when_all_are_ready_and_not_before() {
    let mut rig = Rig::new(&[]);
    let (first, second) = (rig.join("w0"), rig.join("w1"));
    rig.ready(first);
    rig.ready(first);
    assert_eq!(rig.phase(), "forming");
    rig.ready(second);
    assert_eq!(rig.phase(), "training");
    assert!(rig.published.iter().any(|event| matches!(
        event,
        RunEvent::Formed { generation: Generation(1), world: 2, step: Step(0), .. }
    )));
}

#[test]
fn a_resumed_run_forms_from_its_checkpoint_with_a_new_generation() {
    let mark = Mark { step: Step(4), weights_digest: weights(Step(4)), record: None, trend: None };
    let generation = Generation(7);
    let resume = Resume { checkpoint: Some(mark), generation, ..Resume::default() };
    let mut rig = Rig::resumed(&["cluster.workers=1"], resume);
    let worker = rig.join("w0");
    let form = rig.form_of(worker);
    assert_eq!((form.generation, form.step), (8, 4));
    rig.ready_all();
    assert_eq!(rig.plan_of(worker).step, 5);
}

#[test]
fn a_ready_of_an_older_generation_is_not_acted_on() {
    let mut rig = Rig::new(&["cluster.workers=3"]);
    let ids: Vec<WorkerId> = ["w0", "w1", "w2"].map(|name| rig.join(name)).into();
    rig.kill(ids[2]);
    assert_eq!(rig.core.generation, Generation(2));
    for worker in &ids[..2] {
        let (generation, step) = (Generation(1), Step(0));
        rig.say(*worker, Report::Ready { generation, step, weights_digest: weights(step) });
    }
    assert_eq!(rig.phase(), "forming");
    assert_eq!(rig.ignored.len(), 2);
}

#[test]
fn the_odd_state_of_three_is_sent_away_and_the_others_go_on() {
    let mut rig = Rig::new(&["cluster.workers=3"]);
    let ids: Vec<WorkerId> = ["w0", "w1", "w2"].map(|name| rig.join(name)).into();
    let odd = Digest::of(b"flipped bit");
    let generation = Generation(1);
    rig.say(ids[1], Report::Ready { generation, step: Step(0), weights_digest: odd });
    rig.ready(ids[0]);
    rig.ready(ids[2]);
    assert!(matches!(rig.last_sent(ids[1]), Directive::Finish(_)));
    assert!(rig.closed.contains(&ids[1]));
    assert_eq!(rig.members(), [ids[0], ids[2]]);
    assert_eq!(rig.form_of(ids[2]).rank, 1);
}

#[test]
fn two_unequal_states_end_the_run_naming_both_workers() {
    let mut rig = Rig::new(&[]);
    let (first, second) = (rig.join("w0"), rig.join("w1"));
    rig.ready(first);
    let weights_digest = Digest::of(b"other");
    rig.say(second, Report::Ready { generation: Generation(1), step: Step(0), weights_digest });
    assert!(rig.failure().contains("w0 holds") && rig.failure().contains("w1 holds"));
}

#[test]
fn of_two_unequal_states_the_checkpoints_is_right() {
    let mark = Mark { step: Step(4), weights_digest: weights(Step(4)), record: None, trend: None };
    let mut rig = Rig::resumed(&[], Resume { checkpoint: Some(mark), ..Resume::default() });
    let (first, second) = (rig.join("w0"), rig.join("w1"));
    let weights_digest = Digest::of(b"other");
    rig.say(first, Report::Ready { generation: Generation(1), step: Step(4), weights_digest });
    rig.ready(second);
    assert_eq!(rig.members(), [second]);
}

#[test]
fn states_that_agree_with_each_other_but_not_with_the_checkpoint_end_the_run() {
    let mark =
        Mark { step: Step(4), weights_digest: Digest::of(b"saved"), record: None, trend: None };
    let resume = Resume { checkpoint: Some(mark), ..Resume::default() };
    let mut rig = Rig::resumed(&["cluster.workers=1"], resume);
    rig.join("w0");
    rig.ready_all();
    assert!(rig.failure().contains("step 4"));
}

#[test]
fn a_worker_with_the_state_of_another_step_is_sent_away() {
    let mut rig = Rig::new(&[]);
    let (first, second) = (rig.join("w0"), rig.join("w1"));
    let step = Step(3);
    let generation = Generation(1);
    rig.say(second, Report::Ready { generation, step, weights_digest: weights(step) });
    assert_eq!(rig.members(), [first]);
}
