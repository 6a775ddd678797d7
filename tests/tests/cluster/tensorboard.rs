//! Event files, read by TensorBoard's own reader.

use std::process::Command;

use serde_json::Value;

use crate::others;
use crate::support::Scratch;

/// Prints what the reader makes of a folder: of each tag, its steps and its last value.
const READ: &str = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0}).Reload()
tags = events.Tags()['scalars']
print(json.dumps({tag: [[it.step for it in events.Scalars(tag)], events.Scalars(tag)[-1].value] for tag in tags}))
";

#[test]
fn tensorboard_reads_a_run_that_was_stopped_in_the_middle_and_went_on() {
    let Some(packages) = others::given("LOOPTRAIN_TEST_TENSORBOARD", "TensorBoard") else { return };
    let scratch = Scratch::new();
    let arguments = ["--workers", "1", "--threads", "1", "--tensorboard", "events"];
    scratch.train(&[&arguments[..], &["--until", "6"]].concat()).stopped();
    // What it has of later steps than the one that the run goes on from is undone.
    scratch.train(&arguments).done();
    let read = Command::new("python3")
        .args(["-c", READ, scratch.path("events/small").to_str().unwrap()])
        .env("PYTHONPATH", packages)
        .output()
        .unwrap();
    assert!(read.status.success(), "{read:?}");
    let tags: Value = serde_json::from_slice(&read.stdout).unwrap();
    let log = scratch.metrics();
    let steps: Vec<u64> = log.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(tags["train/loss"][0], serde_json::json!(steps), "every step once: {tags}");
    let last = log.last().unwrap();
    for (tag, value) in [
        ("train/loss", &last["loss"]),
        ("train_loss/loop_2", &last["loss_per_loop"][1]),
        ("exit_probability/loop_1", &last["exit_pdf"][0]),
        ("run/tokens", &last["tokens"]),
    ] {
        let read = tags[tag][1].as_f64().unwrap();
        let expected = value.as_f64().unwrap();
        assert!((read - expected).abs() <= expected.abs() * 1e-6, "{tag}: {read}, not {expected}");
    }
    assert_eq!(tags["validation/loss"][0], serde_json::json!([7, 14]));
}
