//! `looptrain chaos` itself.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Running, Scratch, is_gone, wait_until, workers_of};

const CHAOS: [&str; 6] =
    ["chaos", "spec.toml", "--workers", "3", "--set", "cluster.worker_timeout=1"];

#[test]
fn a_short_chaos_ends_with_the_weights_of_an_undisturbed_run_and_tells_how_long_it_took() {
    let scratch = Scratch::new();
    let short = ["--seed", "4", "--minutes", "0.3", "--json"];
    let end = scratch.run(&[&CHAOS[..], &short].concat());
    assert_eq!(end.code, Some(0), "{end:?}");
    let report: Value = serde_json::from_str(end.last_line()).unwrap();
    assert_eq!((&report["seed"], &report["equal"]), (&4.into(), &true.into()), "{report}");
    assert!(report["weights"].as_str().unwrap().starts_with("blake3:"));
    assert!(report["steps"].as_u64().unwrap() > 10, "{report}");
    let events = report["events"].as_array().unwrap();
    assert!(events.len() >= 3, "{report}");
    for event in events {
        let recovery = event["recovery_seconds"].as_f64().unwrap();
        assert!((0.0..60.0).contains(&recovery), "{event}");
        let spread = &report["recovery_seconds"][event["kind"].as_str().unwrap()];
        assert!(spread["min"].as_f64().unwrap() <= recovery, "{report}");
        assert!(spread["max"].as_f64().unwrap() >= recovery, "{report}");
    }
    assert_eq!(files_below(&scratch.path("store/runs")), Vec::<PathBuf>::new());
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// A chaos in full course, and its processes.
fn under_way(scratch: &Scratch) -> (Running, Vec<u32>) {
    let mut running = Running::start(scratch.command(&[&CHAOS[..], &["--seed", "4"]].concat()));
    running.wait_for(|line| line.contains("(step "));
    let processes = workers_of(running.id());
    assert!(processes.len() >= 2, "a coordinator and a worker: {processes:?}");
    (running, processes)
}

#[test]
fn an_interrupted_chaos_leaves_no_process() {
    let scratch = Scratch::new();
    let (running, processes) = under_way(&scratch);
    running.signal("INT");
    let end = running.end();
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("error: interrupted"), "{end:?}");
    assert!(processes.iter().all(|process| is_gone(*process)), "they are gone before it is");
}

#[test]
fn a_killed_chaos_leaves_no_process() {
    let scratch = Scratch::new();
    let (running, processes) = under_way(&scratch);
    running.signal("KILL");
    assert_eq!(running.end().code, None);
    wait_until(|| processes.iter().all(|process| is_gone(*process)));
}
