//! A run that is killed a hundred times while it saves.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::checkpoints;
use crate::cluster::{ENDLESS, undisturbed_until};
use crate::support::{Running, Scratch, is_gone, signal_if_there, wait_until, workers_of};

const KILLS: usize = 100;

/// One worker that saves every step, of more steps than it gets to.
const OFTEN: [&str; 12] = [
    "--workers",
    "1",
    "--threads",
    "1",
    "--set",
    "checkpoint.every_steps=1",
    "--set",
    "checkpoint.orphan_seconds=0",
    "--set",
    "sample.tokens=0",
    "--set",
    "stages.0.steps=1000000",
];

/// The steps whose saving has begun and not come to its end.
fn unfinished(checkpoints: &Path) -> Vec<u64> {
    let steps = fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path());
    let torn = steps.filter(|step| {
        let files = fs::read_dir(step).map(|files| files.count()).unwrap_or_default();
        files > 0 && !step.join("manifest.json").exists()
    });
    let number = |step: &Path| step.to_str()?.rsplit_once("step-")?.1.parse().ok();
    torn.filter_map(|step| number(&step)).collect()
}

/// The run goes on until it has saved something, and is killed, with its worker, so many microseconds
/// later; the step that it went on from and the newest that it said to have saved.
fn killed_after(scratch: &Scratch, microseconds: u64) -> (u64, u64) {
    let mut running =
        Running::start(scratch.command(&[&["train", "spec.toml"], &OFTEN[..]].concat()));
    let mut from = 0;
    let saved = loop {
        let step = |words: &str| words.split([' ', ':']).next().unwrap().parse().unwrap();
        let line = running.wait_for(|line| line.contains("checkpoint of step "));
        match line.split_once("checkpoint of step ").unwrap() {
            ("going on from the ", words) => from = step(words),
            // Not that it is delayed.
            ("", words) if words.contains(" in ") => break step(words),
            _ => {}
        }
    };
    std::thread::sleep(Duration::from_micros(microseconds));
    let workers = workers_of(running.id());
    running.signal("KILL");
    // They end by themselves, too.
    for worker in &workers {
        signal_if_there(*worker, "KILL");
    }
    assert_eq!(running.end().code, None, "it was at work until it was killed");
    wait_until(|| workers.iter().all(|worker| is_gone(*worker)));
    (from, saved)
}

#[test]
fn after_each_of_100_kills_in_the_middle_of_saves_the_run_goes_on_from_what_was_saved() {
    let scratch = Scratch::new();
    let checkpoints = scratch.path("store/runs/small/checkpoints");
    let (mut newest, mut seed, mut torn) = (0, 20_261_125_u64, 0);
    for kill in 0..KILLS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (from, saved) = killed_after(&scratch, (seed >> 33) % 40_000);
        assert!(from >= newest && saved > from, "kill {kill}: {from} after {newest}, then {saved}");
        newest = saved;
        torn += usize::from(unfinished(&checkpoints).iter().any(|step| *step >= newest));
    }
    assert!(torn >= KILLS / 4, "only {torn} of {KILLS} kills hit a save in the middle");
    let left = unfinished(&checkpoints).len();
    assert!(left < torn / 2, "what dead saves left is collected: {left} of {torn}");

    // Beyond what was being saved: on a busy machine a save takes many steps.
    let begun = unfinished(&checkpoints).into_iter().max().unwrap_or(0);
    let later = checkpoints::newest(&scratch).max(begun) + 10;
    let end = scratch.train(&[&OFTEN[..], &["--until", &later.to_string()]].concat()).stopped();
    assert!(end.stderr.contains("going on from the checkpoint of step "), "{end:?}");
    assert!(!end.stderr.contains("passed over"), "what has a manifest is whole: {end:?}");
    assert_eq!(end.step(), later);
    assert_eq!(end.field("weights"), undisturbed_until(later, &ENDLESS));

    let prune = ["checkpoint", "prune", "--store", "file://store", "--run", "small"];
    assert_eq!(scratch.run(&prune).code, Some(0));
    assert_eq!(unfinished(&checkpoints), [0; 0], "and all of it in the end");
}
