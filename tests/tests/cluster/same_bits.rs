//! The promise: the same weights, bit for bit, whatever the machines do.

use crate::checkpoints::newest;
use crate::support::{End, Running, Scratch, is_gone, signal, state, wait_until, workers_of};

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
    // Fewer slots than threads, so that threads share the blocks of one slot's tokens.
    let (hidden, inner, sequences, lengths) = (64, 512, 4, [24, 40]);
    assert!(lengths.iter().all(|length| sequences * length > 72), "more than one block");
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

/// A run that lasts until it is told to stop, so that a signal arrives in the middle.
const LONG: [&str; 4] = ["--set", "stages.0.steps=1000000", "--set", "checkpoint.every_steps=50"];

/// Starts one with two workers.
fn long_run(scratch: &Scratch) -> Running {
    let train = ["train", "spec.toml", "--workers", "2"];
    Running::start(scratch.command(&[&train[..], &LONG].concat()))
}

/// Goes on with one as far as a step.
#[track_caller]
fn gone_on(scratch: &Scratch, workers: &str, until: u64) -> End {
    let until = until.to_string();
    let given = ["--workers", workers, "--until", &until];
    scratch.train(&[&given[..], &LONG].concat()).stopped()
}

#[test]
fn a_run_that_is_stopped_and_resumed_gives_the_same_weights() {
    for name in ["INT", "TERM"] {
        let scratch = Scratch::new();
        let mut running = long_run(&scratch);
        running.wait_for(|line| line.starts_with("step "));
        running.signal(name);
        let step = running.end().stopped().step();
        assert!(step >= 1, "the stop came in the middle");
        let resumed = gone_on(&scratch, "3", step + 20);
        assert!(
            resumed.stderr.contains(&format!("going on from the checkpoint of step {step}\n")),
            "{resumed:?}"
        );
        let straight = gone_on(&Scratch::new(), "2", step + 20);
        assert_eq!(resumed.field("weights"), straight.field("weights"), "stopped by SIG{name}");
        assert_eq!(resumed.field("tokens"), straight.field("tokens"));
    }
}

#[test]
fn everything_killed_at_once_resumes_from_the_newest_checkpoint() {
    let scratch = Scratch::new();
    let mut running = long_run(&scratch);
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
    let newest = newest(&scratch);
    let resumed = gone_on(&scratch, "2", newest + 20);
    let from = format!("going on from the checkpoint of step {newest}\n");
    assert!(newest >= 50 && resumed.stderr.contains(&from), "{resumed:?}");
    let straight = gone_on(&Scratch::new(), "2", newest + 20);
    assert_eq!(resumed.field("weights"), straight.field("weights"));
}

#[test]
fn a_killed_worker_changes_no_bit() {
    let scratch = Scratch::new();
    let mut running = long_run(&scratch);
    running.wait_for(|line| line.starts_with("step "));
    signal(workers_of(running.id())[0], "KILL");
    running.wait_for(|line| line.contains(" lost: "));
    running.skip();
    running.wait_for(|line| line.starts_with("step "));
    running.signal("TERM");
    let end = running.end().stopped();
    let straight = gone_on(&Scratch::new(), "2", end.step());
    assert_eq!(end.field("weights"), straight.field("weights"));
}
