//! Uneven machines: shares that follow their speed, and words about who is slow.

use super::*;
use crate::records::Section;

/// What a worker takes: seconds of data wait, of each slot, of sending, of a commit.
#[derive(Clone, Copy, Default)]
struct Pace {
    data: f64,
    slot: f64,
    send: f64,
    commit: f64,
}

const EVEN: Pace = Pace { data: 0.001, slot: 0.1, send: 0.01, commit: 0.02 };

const LONG: [&str; 4] = [
    "stages.0.steps=100",
    "stages.0.slots=12",
    "checkpoint.every_steps=90",
    "evaluation.every_steps=90",
];

/// One step in which each worker takes what its pace says.
fn step(rig: &mut Rig, paces: &[Pace]) {
    let (generation, step) = (rig.core.generation, rig.core.committed.next());
    let mut votes = Vec::new();
    for (worker, pace) in rig.members().into_iter().zip(paces) {
        let plan = rig.plan_of(worker);
        let computed = plan.slot_end - plan.slot_begin;
        let Report::Prepared { digest, statistics, detail, .. } = rig.vote(generation, step) else {
            panic!("a vote is a vote")
        };
        let sections = v1::Sections {
            data_wait: pace.data,
            compute: pace.slot * f64::from(computed),
            reduce: 0.1,
            optimizer: pace.commit,
            send: pace.send,
        };
        votes.push((
            worker,
            Report::Prepared {
                generation,
                step,
                digest,
                statistics,
                sections,
                computed_slots: computed,
                detail,
            },
        ));
    }
    rig.now += Duration::from_millis(1000);
    votes.into_iter().for_each(|(worker, vote)| rig.say(worker, vote));
}

fn counts(rig: &Rig) -> Vec<u32> {
    let slots = |worker| {
        let plan = rig.plan_of(worker);
        plan.slot_end - plan.slot_begin
    };
    rig.members().into_iter().map(slots).collect()
}

fn straggling(rig: &Rig) -> Vec<(String, Section)> {
    let said = |event: &RunEvent| match event {
        RunEvent::Straggles { name, section, .. } => Some((name.clone(), *section)),
        _ => None,
    };
    rig.published.iter().filter_map(said).collect()
}

#[test]
fn a_worker_of_half_the_speed_gets_half_the_slots_and_is_named() {
    let (mut rig, _) = Rig::training(2, &LONG);
    assert_eq!(counts(&rig), [6, 6], "nothing is known yet");
    let paces = [EVEN, Pace { slot: 0.2, ..EVEN }];
    (0..8).for_each(|_| step(&mut rig, &paces));
    assert_eq!(counts(&rig), [8, 4]);
    // 0.8 s a step instead of 1.2, as the fast one alone would take for its share of an even split.
    assert_eq!(straggling(&rig), [], "twice is the bound, not beyond it");
    let paces = [EVEN, Pace { slot: 0.35, ..EVEN }];
    (0..8).for_each(|_| step(&mut rig, &paces));
    assert_eq!(counts(&rig), [10, 2]);
    assert_eq!(straggling(&rig), [("w1".to_owned(), Section::Compute)]);
    let view = rig.core.snapshot(rig.now).workers;
    assert_eq!(view[1].straggles_in, Some(Section::Compute));
    assert!((view[1].slots_per_second.unwrap() - 1.0 / 0.35).abs() < 1e-9);
}

#[test]
fn one_slow_step_moves_no_slot_and_names_nobody() {
    let (mut rig, _) = Rig::training(3, &LONG);
    (0..5).for_each(|_| step(&mut rig, &[EVEN; 3]));
    step(&mut rig, &[EVEN, Pace { slot: 5.0, data: 9.0, ..EVEN }, EVEN]);
    assert_eq!(counts(&rig), [4, 4, 4]);
    (0..5).for_each(|_| step(&mut rig, &[EVEN; 3]));
    assert_eq!(straggling(&rig), []);
}

#[test]
fn a_straggler_is_named_with_the_section_and_again_when_it_has_caught_up() {
    for (section, slow) in [
        (Section::Data, Pace { data: 0.5, ..EVEN }),
        (Section::Reduce, Pace { send: 0.5, ..EVEN }),
        (Section::Commit, Pace { commit: 0.5, ..EVEN }),
    ] {
        let (mut rig, _) = Rig::training(3, &LONG);
        (0..4).for_each(|_| step(&mut rig, &[EVEN, slow, EVEN]));
        assert_eq!(straggling(&rig), [("w1".to_owned(), section)]);
        (0..8).for_each(|_| step(&mut rig, &[EVEN; 3]));
        assert_eq!(straggling(&rig).len(), 1, "said once");
        let caught_up = |event: &RunEvent| match event {
            RunEvent::CaughtUp { name, section, .. } => Some((name.clone(), *section)),
            _ => None,
        };
        let caught_up: Vec<_> = rig.published.iter().filter_map(caught_up).collect();
        assert_eq!(caught_up, [("w1".to_owned(), section)]);
        assert_eq!(rig.core.snapshot(rig.now).workers[1].straggles_in, None);
    }
}

#[test]
fn a_rank_that_waits_for_a_late_neighbour_is_no_straggler_itself() {
    let (mut rig, _) = Rig::training(3, &LONG);
    // The second is late, so that the connection from the first to it is full for as long.
    let late = Pace { data: 0.5, ..EVEN };
    (0..8).for_each(|_| step(&mut rig, &[Pace { send: 0.5, ..EVEN }, late, EVEN]));
    assert_eq!(straggling(&rig), [("w1".to_owned(), Section::Data)]);
}

#[test]
fn slots_that_were_kept_from_an_earlier_try_say_nothing_about_speed() {
    let (mut rig, ids) = Rig::training(2, &LONG);
    (0..4).for_each(|_| step(&mut rig, &[EVEN; 2]));
    for worker in ids.clone() {
        // Nothing computed, and next to no time.
        let vote = rig.vote(rig.core.generation, rig.core.committed.next());
        rig.say(worker, vote);
    }
    (0..3).for_each(|_| step(&mut rig, &[EVEN; 2]));
    assert_eq!(counts(&rig), [6, 6]);
    assert!((rig.core.snapshot(rig.now).workers[0].slots_per_second.unwrap() - 10.0).abs() < 1e-9);
}

#[test]
fn a_newcomer_is_taken_for_as_fast_as_the_others_until_it_is_known() {
    let (mut rig, _) = Rig::training(2, &[&LONG[..], &["stages.0.slots=15"]].concat());
    (0..6).for_each(|_| step(&mut rig, &[EVEN, Pace { slot: 0.2, ..EVEN }]));
    let late = rig.join("late");
    step(&mut rig, &[EVEN, Pace { slot: 0.2, ..EVEN }]);
    let at = rig.core.committed;
    rig.say(late, Report::Fetched { step: at, result: Ok(()) });
    step(&mut rig, &[EVEN, Pace { slot: 0.2, ..EVEN }]);
    rig.ready_all();
    let counts = counts(&rig);
    assert_eq!(counts.iter().sum::<u32>(), 15);
    assert!(counts[2] >= counts[1] && counts[0] >= counts[1], "{counts:?}");
}

#[test]
fn a_worker_below_the_share_of_the_spec_is_told_to_leave_and_the_last_ones_are_not() {
    let given = [&LONG[..], &["cluster.drain_below=0.3"]].concat();
    let (mut rig, ids) = Rig::training(3, &given);
    (0..20).for_each(|_| step(&mut rig, &[EVEN, Pace { slot: 0.5, ..EVEN }, EVEN]));
    let drained = |rig: &Rig, id| {
        rig.sent[&id].iter().filter(|message| matches!(message, Directive::Drain(_))).count()
    };
    assert_eq!(ids.iter().map(|id| drained(&rig, *id)).collect::<Vec<_>>(), [0, 1, 0]);
    let (mut rig, ids) = Rig::training(2, &given);
    (0..20).for_each(|_| step(&mut rig, &[EVEN, Pace { slot: 0.5, ..EVEN }]));
    assert_eq!(ids.iter().map(|id| drained(&rig, *id)).collect::<Vec<_>>(), [0, 1]);
    rig.say(ids[1], Report::Leave { reason: "told to".into() });
    rig.ready_all();
    (0..20).for_each(|_| step(&mut rig, &[Pace { slot: 9.0, ..EVEN }]));
    assert_eq!(drained(&rig, ids[0]), 0);
}

/// What this thread has had of the processor, whoever else wanted it; where the system does not
/// tell, the time since `begin`.
fn processor_time(begin: std::time::Instant) -> Duration {
    // The account is made up when a thread gives way.
    std::thread::yield_now();
    let told = std::fs::read_to_string("/proc/thread-self/schedstat");
    let spent = told.ok().and_then(|text| text.split_whitespace().next()?.parse().ok());
    spent.map_or_else(|| begin.elapsed(), Duration::from_nanos)
}

/// The least time that a step's votes and what follows from them take the core.
fn cost(workers: usize) -> Duration {
    let (mut rig, _) = Rig::training(workers, &LONG);
    let paces = vec![EVEN; workers];
    let begin = std::time::Instant::now();
    let timed = |rig: &mut Rig| {
        let before = processor_time(begin);
        step(rig, &paces);
        processor_time(begin).saturating_sub(before)
    };
    (0..10).map(|_| timed(&mut rig)).skip(5).min().unwrap()
}

#[test]
fn ten_times_as_many_workers_cost_nowhere_near_a_hundred_times_as_much() {
    let (few, many) = (cost(300), cost(3000));
    assert!(many < 35 * few, "{few:?} for 300 workers, {many:?} for 3000");
}
