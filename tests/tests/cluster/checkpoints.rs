//! `looptrain checkpoint`.

use std::fs;

use serde_json::Value;

use crate::support::{End, Scratch};

const RUN: [&str; 4] = ["--store", "file://store", "--run", "small"];

/// `looptrain checkpoint ACTION` on the run.
fn checkpoint(scratch: &Scratch, action: &str, more: &[&str]) -> End {
    scratch.run(&[&["checkpoint", action], &RUN[..], more].concat())
}

#[track_caller]
fn json(end: &End) -> Value {
    serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"))
}

/// The step of the newest checkpoint.
pub(crate) fn newest(scratch: &Scratch) -> u64 {
    json(&checkpoint(scratch, "list", &["--json"]))["newest"].as_u64().unwrap()
}

fn steps(list: &Value) -> Vec<u64> {
    let stored = list["stored"].as_array().unwrap();
    stored.iter().map(|entry| entry["step"].as_u64().unwrap()).collect()
}

#[test]
fn checkpoints_are_listed_verified_and_pruned() {
    let scratch = Scratch::new();
    let often = ["--workers", "2", "--set", "checkpoint.every_steps=1"];
    // So many are kept that none goes.
    let often = [&often[..], &["--set", "checkpoint.keep=100"]].concat();
    // Saves may be slower than steps; where a run is stopped there is one in any case.
    for until in ["5", "10"] {
        scratch.train(&[&often[..], &["--until", until]].concat()).stopped();
    }
    let end = scratch.train(&often).done();

    let list = json(&checkpoint(&scratch, "list", &["--json"]));
    assert_eq!((&list["run"], &list["newest"]), (&"small".into(), &14.into()));
    let all = steps(&list);
    assert!(all.len() >= 3 && all.is_sorted() && all.last() == Some(&14), "{list:#}");
    let last = list["stored"].as_array().unwrap().last().unwrap();
    assert_eq!(last["weights"], end.field("weights"));
    assert_eq!((&last["complete"], &last["problem"]), (&true.into(), &Value::Null));
    assert!(last["bytes"].as_u64().unwrap() > 100_000 && last["parts"] == 2, "{last}");
    let text = checkpoint(&scratch, "list", &[]);
    assert_eq!(text.stdout.lines().count(), all.len(), "{text:?}");
    assert!(text.last_line().starts_with("step 14 ") && text.stdout.contains("blake3:"));

    let verified = json(&checkpoint(&scratch, "verify", &["--json"]));
    let checks = verified["checkpoints"].as_array().unwrap();
    assert!(checks.len() == all.len() && checks.iter().all(|it| it["good"] == true), "{verified}");

    // The newest does not verify any more: the one before it is what the run would go back to.
    let part = scratch.path("store/runs/small/checkpoints/step-0000000014");
    let part = part.join("state-0001-of-0002.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&part, bytes).unwrap();
    let bad = checkpoint(&scratch, "verify", &["--step", "14"]);
    bad.fails(1, &["step 14"]);
    assert!(bad.stdout.contains("bad: ") && bad.stdout.contains("state-0001-of-0002"), "{bad:?}");
    assert_eq!(checkpoint(&scratch, "verify", &["--step", &all[0].to_string()]).code, Some(0));

    let dry = json(&checkpoint(&scratch, "prune", &["--keep", "1", "--dry-run", "--json"]));
    assert_eq!(dry["removed"].as_array().unwrap().len(), all.len() - 2, "{dry}");
    assert_eq!(steps(&json(&checkpoint(&scratch, "list", &["--json"]))), all, "nothing went");
    let pruned = checkpoint(&scratch, "prune", &["--keep", "1"]);
    assert_eq!(pruned.code, Some(0), "{pruned:?}");
    assert!(pruned.stdout.contains("removed the checkpoint of step"), "{pruned:?}");
    let left = steps(&json(&checkpoint(&scratch, "list", &["--json"])));
    assert_eq!(left, all[all.len() - 2..]);

    let none = scratch.run(&["checkpoint", "list", "--store", "file://store", "--run", "none"]);
    none.fails(1, &["`none`", "file://store"]);
}

#[test]
fn every_mth_checkpoint_of_a_run_stays() {
    let scratch = Scratch::new();
    let retention = [
        "--set",
        "checkpoint.every_steps=2",
        "--set",
        "checkpoint.keep=1",
        "--set",
        "checkpoint.keep_every_steps=5",
    ];
    scratch.train(&[&["--workers", "1", "--until", "10"], &retention[..]].concat());
    scratch.train(&[&["--workers", "1"], &retention[..]].concat()).done();
    // Of a step in between, too, if the one before it was slow.
    let left = steps(&json(&checkpoint(&scratch, "list", &["--json"])));
    assert!(left.contains(&10) && left.last() == Some(&14), "{left:?}");
    assert!(left.iter().all(|step| *step == 14 || step.is_multiple_of(5)), "{left:?}");
}
