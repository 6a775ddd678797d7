//! Runs that branch off from a checkpoint of another one, and steps that are spikes: what a team does
//! about a loss that jumps.

use serde_json::Value;

use crate::cluster::{Cluster, ENDLESS};
use crate::support::Scratch;

/// A short run with a checkpoint in the middle that stays.
const SHORT: [&str; 8] = [
    "--set",
    "stages.0.steps=30",
    "--set",
    "checkpoint.every_steps=10",
    "--set",
    "checkpoint.keep=9",
    "--set",
    "run.audit=true",
];

/// The log of a run.
fn log_of(scratch: &Scratch, run: &str) -> Vec<Value> {
    let folder = scratch.path(&format!("store/runs/{run}/metrics"));
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    let text: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Writes the spec of a branch at step 20 of run `small`, and what is said of it.
fn branch(scratch: &Scratch, name: &str, more: &[&str]) -> String {
    branch_off(scratch, "small/checkpoints/step-20", name, more)
}

/// Writes the spec of a branch, and what is said of it.
fn branch_off(scratch: &Scratch, from: &str, name: &str, more: &[&str]) -> String {
    let from = format!("file://{}/runs/{from}", scratch.path("store").display());
    let end = scratch.run(&[&["branch", &from, "--name", name], more].concat());
    assert_eq!(end.code, Some(0), "{end:?}");
    std::fs::write(scratch.path(&format!("{name}.toml")), &end.stdout).unwrap();
    end.stderr
}

fn train(scratch: &Scratch, name: &str) -> crate::support::End {
    scratch.run(&["train", &format!("{name}.toml"), "--workers", "2"])
}

#[test]
fn a_branch_goes_on_from_the_checkpoint_by_its_own_spec_and_stands_by_itself() {
    let scratch = Scratch::new();
    let whole = scratch.train(&[&["--workers", "2"], &SHORT[..]].concat()).done();

    // What changes nothing comes to the same weights, from moments and data of the checkpoint.
    let said = branch(&scratch, "same", &[]);
    assert!(said.contains("as it stands the branch ends with the weights of its run"), "{said}");
    let end = train(&scratch, "same");
    assert!(end.stderr.contains("branching off at step 20 of run `small`"), "{end:?}");
    let end = end.done();
    assert_eq!((end.field("weights"), end.field("run")), (whole.field("weights"), "same"));
    let steps: Vec<u64> =
        log_of(&scratch, "same").iter().filter_map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, Vec::from_iter(1..=whole.step()), "its log has the steps before");
    let store = format!("file://{}", scratch.path("store").display());
    let audit = scratch.run(&["audit", "--store", &store, "--run", "same", "--read"]);
    let own = whole.step() - 20;
    assert!(audit.stdout.contains(&format!("audit run=same steps={own} ")), "{audit:?}");

    // Another rate, past some data.
    let rate = ["--set", "stages.0.learning_rate.peak=1e-3", "--skip-steps", "3"];
    let given = [&rate[..], &["--set", "checkpoint.every_steps=5"]].concat();
    let said = branch(&scratch, "other", &given);
    assert!(said.contains("stages.0.learning_rate.peak was"), "{said}");
    let end = train(&scratch, "other").done();
    assert_ne!(end.field("weights"), whole.field("weights"));
    let (mine, theirs) = (log_of(&scratch, "other"), scratch.metrics());
    assert_eq!(mine[..20], theirs[..20]);
    let at = |line: &Value| line["cursor"]["sequences"].as_u64().unwrap();
    let a_step = at(&theirs[20]) - at(&theirs[19]);
    assert_eq!(at(&mine[20]), at(&theirs[20]) + 3 * a_step);
    let audit = scratch.run(&["audit", "--store", &store, "--run", "other"]);
    assert_eq!(audit.code, Some(0), "{audit:?}");

    // The first step of the branch reads what the one three steps later did.
    let read = |run: &str, step: &str| {
        let given = ["sequences", "--store", &store, "--run", run, "--step", step, "--slot", "1"];
        let shown = scratch.run(&[&given[..], &["--json"]].concat());
        let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
        assert_eq!(shown["sequences"][0]["tokens"].as_array().unwrap().len(), 25, "{shown:#}");
        let text = shown["sequences"][0]["text"].as_str().unwrap();
        let plain = scratch.run(&given);
        assert!(!text.is_empty() && plain.stdout.contains(text), "{plain:?}");
        shown["sequences"].clone()
    };
    assert_eq!(read("other", "21"), read("small", "24"));
    assert_ne!(read("other", "21"), read("small", "21"));
    let given = ["sequences", "--store", &store, "--run", "small", "--step", "5", "--slot", "6"];
    scratch.run(&given).fails(1, &["--slot: step 5 has 6 slots, from 0 to 5"]);

    // A branch of the branch stands where that one did.
    let said = branch_off(&scratch, "other/checkpoints/step-25", "third", &[]);
    assert!(said.contains("as it stands the branch ends with the weights of its run"), "{said}");
    assert_eq!(train(&scratch, "third").done().field("weights"), end.field("weights"));
    assert_eq!(read("third", "26"), read("other", "26"));

    // It goes on from its own checkpoints when the run that it comes from is gone.
    std::fs::remove_dir_all(scratch.path("store/runs/small")).unwrap();
    let again = train(&scratch, "other").done();
    assert_eq!(again.field("weights"), end.field("weights"));
    let given = ["train", "other.toml", "--workers", "1", "--fresh"];
    scratch.run(&given).fails(1, &["branch.run", "run `small` has no checkpoint"]);
    assert_eq!(train(&scratch, "other").done().field("weights"), end.field("weights"));
}

#[test]
fn a_run_under_another_spec_is_told_what_differs_and_how_to_go_on() {
    let scratch = Scratch::new();
    let end = scratch.train(&[&["--workers", "1"], &SHORT[..], &["--until", "20"]].concat());
    end.stopped();
    let other = ["--set", "optimizer.clip_norm=0.5", "--set", "run.seed=5"];
    let refused = scratch.train(&[&SHORT[..], &other].concat());
    refused
        .fails(1, &["optimizer.clip_norm was 1.0 and is 0.5", "run.seed was", "looptrain branch"]);
}

/// A strict guard that takes effect after some steps, and a rate at which the loss jumps about, whatever the
/// text; with room for the gradients that come of that.
const JUMPS: [&str; 12] = [
    "--set",
    "optimizer.spikes.deviations=1",
    "--set",
    "cluster.fraction_bits=30",
    "--set",
    "optimizer.spikes.window=8",
    "--set",
    "stages.0.learning_rate={ peak = 3.0, warmup_steps = 30 }",
    "--set",
    "checkpoint.every_steps=1000",
    "--set",
    "stages.0.steps=40",
];

#[test]
fn a_spike_ends_the_run_before_it_with_a_checkpoint_or_is_skipped_as_the_spec_says() {
    let scratch = Scratch::new();
    let stop = ["--workers", "2", "--set", "optimizer.spikes.action=stop"];
    let end = scratch.train(&[&JUMPS[..], &stop].concat());
    end.fails(1, &["is a spike and is not committed", " is above ", "looptrain branch"]);
    let last = scratch.metrics().last().unwrap()["step"].as_u64().unwrap();
    assert!(
        end.stderr.contains(&format!("The run ends at step {last}, with a checkpoint")),
        "{end:?}"
    );
    let store = format!("file://{}", scratch.path("store").display());
    let list = scratch.run(&["checkpoint", "list", "--store", &store, "--run", "small"]);
    assert!(list.stdout.starts_with(&format!("step {last} ")), "{list:?}");
    // With another number of workers, from that checkpoint alone, it ends in the same place.
    let stop = ["--workers", "1", "--set", "optimizer.spikes.action=stop"];
    let again = scratch.train(&[&JUMPS[..], &stop].concat());
    again.fails(1, &[&format!("step {} is a spike", last + 1)]);

    let scratch = Scratch::new();
    let end = scratch.train(&[&JUMPS[..], &["--workers", "2"]].concat());
    assert!(
        end.stderr.contains(&format!("step {} committed without an update: a spike: ", last + 1))
    );
    let log = scratch.metrics();
    let skipped = &log[last as usize];
    assert!(skipped["skipped"].as_str().unwrap().starts_with("a spike: "), "{skipped}");
    assert!(skipped["trend"]["steps"].as_u64() == Some(last + 1), "{skipped}");
}

#[test]
fn workers_that_are_all_told_to_leave_lose_no_step() {
    let mut cluster = Cluster::start_with(&ENDLESS);
    let workers = [cluster.worker(&[]), cluster.worker(&[])];
    cluster.coordinator.wait_for(|line| line.starts_with("step "));
    for worker in &workers {
        worker.signal("TERM");
    }
    for worker in workers {
        let end = worker.end();
        assert_eq!(end.code, Some(0), "{end:?}");
    }
    let status = cluster.wait_for(|status| status["phase"] == "waiting");
    let step = status["step"].as_u64().unwrap();
    assert!(step > 0 && status["checkpoint_step"] == step, "{status:#}");
    let _workers = [cluster.worker(&[]), cluster.worker(&[])];
    let status = cluster.wait_for(|status| status["step"].as_u64() > Some(step));
    assert!(!status.to_string().contains("is done again"), "{status:#}");
    let steps: Vec<u64> =
        cluster.scratch.metrics().iter().filter_map(|line| line["step"].as_u64()).collect();
    assert!(steps.windows(2).all(|pair| pair[1] == pair[0] + 1), "{steps:?}");
}
