//! The promise: the same weights, bit for bit, whatever the machines do.

use looptrain_model::ops::is_threaded;

use crate::support::{Running, Scratch, is_gone, signal, state, wait_until, workers_of};

/// The weights of an undisturbed run.
fn undisturbed(scratch: &Scratch) -> String {
    scratch.train(&["--workers", "2", "--fresh"]).done().field("weights").to_owned()
}

#[test]
fn any_number_of_workers_gives_the_same_weights() {
    let scratch = Scratch::new();
    let weights = undisturbed(&scratch);
    for workers in ["1", "3"] {
        let end = scratch.train(&["--workers", workers, "--fresh"]).done();
        assert_eq!(end.field("weights"), weights, "{workers} workers");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_weights() {
    let scratch = Scratch::new();
    // Products so large that threads share them, and fewer slots than threads, so that they do.
    let (hidden, inner, sequences, lengths) = (64, 512, 4, [24, 40]);
    for length in lengths {
        let rows = sequences * length;
        assert!(is_threaded(rows, inner, hidden) && is_threaded(rows, hidden, inner));
        assert!(is_threaded(inner, hidden, rows));
    }
    let mut wide = vec![
        format!("model.hidden_size={hidden}"),
        format!("model.intermediate_size={inner}"),
        "stages.0.slots=2".to_owned(),
        "stages.1.slots=1".to_owned(),
    ];
    for (stage, length) in lengths.iter().enumerate() {
        wide.push(format!("stages.{stage}.sequence_length={length}"));
        wide.push(format!("stages.{stage}.slot_sequences={sequences}"));
    }
    let wide: Vec<&str> = wide.iter().flat_map(|given| ["--set", given]).collect();
    let train = |arguments: &[&str]| {
        let end = scratch.train(&[arguments, &["--fresh"], &wide].concat()).done();
        end.field("weights").to_owned()
    };
    let weights = train(&["--workers", "2"]);
    for threads in ["1", "3", "8"] {
        let found = train(&["--workers", "1", "--threads", threads]);
        assert_eq!(found, weights, "{threads} threads");
    }
}

/// Long enough that a signal arrives in the middle.
const LONGER: [&str; 4] = ["--set", "stages.0.steps=300", "--set", "checkpoint.every_steps=50"];

#[test]
fn a_run_that_is_stopped_and_resumed_gives_the_same_weights() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    for name in ["INT", "TERM"] {
        let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
        let mut running = Running::start(scratch.command(&fresh));
        running.wait_for(|line| line.starts_with("step "));
        running.signal(name);
        let stopped = running.end();
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
        assert!(stopped.last_line().starts_with("stopped "), "{stopped:?}");
        let step: u64 = stopped.field("step").parse().unwrap();
        assert!((1..306).contains(&step), "the stop came in the middle, not at step {step}");
        let resumed = scratch.train(&[&["--workers", "3"][..], &LONGER].concat()).done();
        assert!(
            resumed.stderr.contains(&format!("going on from the checkpoint of step {step}")),
            "{resumed:?}"
        );
        assert_eq!(resumed.field("weights"), straight.field("weights"), "stopped by SIG{name}");
        assert_eq!(resumed.field("tokens"), straight.field("tokens"));
    }
}

#[test]
fn everything_killed_at_once_resumes_from_the_newest_checkpoint() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
    let mut running = Running::start(scratch.command(&fresh));
    running.wait_for(|line| line.starts_with("checkpoint of step 50:"));
    let workers = workers_of(running.id());
    assert_eq!(workers.len(), 2);
    let all = [&[running.id()][..], &workers].concat();
    // Frozen first, so that nobody sees another die, and all are known to be alive when hit.
    for process in &all {
        signal(*process, "STOP");
    }
    wait_until(|| all.iter().all(|process| state(*process) == Some('T')));
    for process in &all {
        signal(*process, "KILL");
    }
    assert_eq!(running.end().code, None, "it died by the signal");
    wait_until(|| workers.iter().all(|worker| is_gone(*worker)));
    let resumed = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    assert!(resumed.stderr.contains("going on from the checkpoint of step"), "{resumed:?}");
    assert_eq!(resumed.field("weights"), straight.field("weights"));
}

#[test]
fn a_killed_worker_changes_no_bit() {
    let scratch = Scratch::new();
    let straight = scratch.train(&[&["--workers", "2"][..], &LONGER].concat()).done();
    let fresh = [&["train", "spec.toml", "--workers", "2", "--fresh"][..], &LONGER].concat();
    let mut running = Running::start(scratch.command(&fresh));
    running.wait_for(|line| line.starts_with("step "));
    signal(workers_of(running.id())[0], "KILL");
    let end = running.end().done();
    assert!(end.stderr.contains(" lost: "), "the fault was noticed: {end:?}");
    assert_eq!(end.field("weights"), straight.field("weights"));
}
