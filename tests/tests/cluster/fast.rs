//! Runs whose gradients are summed as floats: the workers agree on every step, whatever happens, and
//! learn what those of an exact run do.

use crate::checkpoints::newest;
use crate::support::{Running, Scratch, signal, workers_of};

const FAST: [&str; 2] = ["--set", "cluster.reduction=fast"];

#[test]
fn workers_that_sum_floats_agree_on_every_step_and_learn_as_in_an_exact_run() {
    let exact = Scratch::new().train(&["--workers", "2"]).done();
    let fast = Scratch::new().train(&[&["--workers", "2"], &FAST[..]].concat()).done();
    assert_eq!(
        (fast.field("step"), fast.field("tokens")),
        (exact.field("step"), exact.field("tokens"))
    );
    let loss = |end: &crate::support::End| end.field("loss").parse::<f64>().unwrap();
    assert!((loss(&fast) / loss(&exact) - 1.0).abs() < 1e-2, "{fast:?}");
    assert_ne!(fast.field("weights"), exact.field("weights"), "it is another arithmetic");
}

#[test]
fn a_run_that_sums_floats_outlives_a_killed_worker_and_goes_on_from_its_checkpoint() {
    let scratch = Scratch::new();
    let long = ["--set", "stages.0.steps=1000000", "--set", "checkpoint.every_steps=50"];
    let train = ["train", "spec.toml", "--workers", "3"];
    let mut running = Running::start(scratch.command(&[&train[..], &long, &FAST].concat()));
    running.wait_for(|line| line.starts_with("step "));
    signal(workers_of(running.id())[1], "KILL");
    running.wait_for(|line| line.contains(" lost: "));
    running.skip();
    running.wait_for(|line| line.starts_with("step "));
    running.signal("TERM");
    let end = running.end().stopped();
    assert_eq!(newest(&scratch), end.step());

    let until = (end.step() + 20).to_string();
    let on = ["--workers", "2", "--until", &until];
    let resumed = scratch.train(&[&on[..], &long, &FAST].concat()).stopped();
    let from = format!("going on from the checkpoint of step {}\n", end.step());
    assert!(resumed.stderr.contains(&from), "{resumed:?}");
    assert_eq!(resumed.step(), end.step() + 20);
}

#[test]
fn a_run_does_not_change_its_arithmetic_half_way() {
    let scratch = Scratch::new();
    let some = ["--workers", "1", "--until", "2"];
    scratch.train(&some).stopped();
    let other = scratch.train(&FAST);
    assert_eq!(other.code, Some(1), "{other:?}");
    let chaos = scratch.run(&[&["chaos", "spec.toml"], &FAST[..]].concat());
    assert_eq!(chaos.code, Some(1), "{chaos:?}");
    assert!(chaos.stderr.contains("--set cluster.reduction=exact"), "{chaos:?}");
}
