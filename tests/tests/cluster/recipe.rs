//! A recipe of many stages, as the paper's: what is planned is what is done, through kills and stops.

use std::fs;

use serde_json::Value;

use crate::support::{Running, Scratch, repository, signal_if_there, text, workers_of};

/// The spec of the examples, on the tests' text.
fn recipe() -> Scratch {
    let scratch = Scratch::new();
    let spec = fs::read_to_string(repository().join("examples/recipe.toml")).unwrap();
    let spec = spec
        .replace("[\"cargo-registry\"]", &text())
        .replace("file://.looptrain", "file://store")
        .replace("name = \"recipe\"", "name = \"small\"");
    fs::write(scratch.path("spec.toml"), spec).unwrap();
    scratch
}

/// Nobody is dead for being silent on a busy machine, but who is killed.
const PATIENT: [&str; 2] = ["--set", "cluster.worker_timeout=60"];

#[test]
fn all_stages_of_a_recipe_come_to_the_same_weights_through_a_kill_and_a_stop() {
    let peaceful = recipe();
    let plan = peaceful.run(&["train", "spec.toml", "--dry-run", "--json"]);
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
    assert!(!peaceful.path("store").exists(), "a plan does nothing");
    let end = peaceful.train(&[&["--workers", "1"][..], &PATIENT].concat()).done();
    assert_eq!(end.field("tokens"), plan["tokens"].to_string());
    assert_eq!(end.field("step"), plan["steps"].to_string());

    // The log has what the plan says of each stage.
    let lines = peaceful.metrics();
    let mut lines = lines.iter().filter(|line| line["digest"].is_string());
    for stage in plan["stages"].as_array().unwrap() {
        let steps = stage["steps"].as_u64().unwrap() as usize;
        let of_stage: Vec<&Value> = lines.by_ref().take(steps).collect();
        assert_eq!(of_stage.len(), steps, "{stage}");
        let (first, last) = (of_stage[0], of_stage[steps - 1]);
        let loops = stage["loops"].as_u64().unwrap() as usize;
        assert_eq!(first["loss_per_loop"].as_array().unwrap().len(), loops, "{first}");
        for (line, batch) in [(first, 0), (last, 1)] {
            assert_eq!(line["step_tokens"], stage["batch_tokens"][batch], "{line}");
        }
        assert_eq!(last["lr"], stage["learning_rate"]["last"], "{last}");
    }
    assert!(lines.next().is_none());

    // One stage is left by a stop, another by a worker that is killed.
    let rough = recipe();
    rough.train(&[&["--workers", "1", "--until", "100"][..], &PATIENT].concat()).stopped();
    let again = [&["train", "spec.toml", "--workers", "3"][..], &PATIENT].concat();
    let mut running = Running::start(rough.command(&again));
    running.wait_for(|line| line.contains("checkpoint of step ") && line.contains(" in "));
    let killed = workers_of(running.id())[1];
    assert!(signal_if_there(killed, "KILL"), "it was at work");
    let other = running.end().done();
    assert!(other.stderr.contains(": 2 workers at step "), "{other:?}");
    assert_eq!(other.field("weights"), end.field("weights"));
}
