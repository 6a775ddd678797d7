//! What a run was computed from: a whole data epoch and more, by workers and coordinators that come
//! and go, uses every sequence once and in the order that the pure function draws.

use std::collections::HashSet;

use looptrain_proto::Step;
use looptrain_storage::{Dataset, Order, Split, StepUse, Store, read_audit};

use crate::cluster::{Cluster, died_at, frozen_at};
use crate::support::{Scratch, is_gone, wait_until};

/// Steps of the first stage: more than an epoch of its dataset.
const STEPS: u64 = 700;

/// A run that is audited, over little text.
const AUDITED: [&str; 9] = [
    "--audit",
    "--set",
    "stages.0.steps=700",
    "--set",
    "datasets.0.source.max_bytes=100_000",
    "--set",
    "checkpoint.every_steps=140",
    "--set",
    "cluster.workers=3",
];

/// What the store says that the steps used.
fn used(scratch: &Scratch) -> (Dataset, Vec<StepUse>) {
    let store = Store::open(&format!("file://{}", scratch.path("store").display())).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dataset = Dataset::open(&store, "sources").await.unwrap().unwrap();
        (dataset, read_audit(&store, "small", Step(0)).await.unwrap())
    })
}

fn audit(scratch: &Scratch) -> crate::support::End {
    scratch.run(&["audit", "--store", "file://store", "--run", "small", "--read"])
}

#[test]
fn every_sequence_of_an_epoch_is_used_once_and_in_order_whoever_dies_or_joins() {
    let faulty = [&AUDITED[..], &["--fault", "kill@decided:100"]].concat();
    let mut cluster = Cluster::start_with(&faulty);
    let first = cluster.worker(&["--fault", "kill@reduce:30"]);
    let second = cluster.worker(&["--fault", "kill@prepared:60"]);
    let mut third = cluster.worker(&["--fault", "stop@compute:110"]);
    // One dies in the middle of an all-reduce: the others do its slots, and keep what they had. One
    // dies when its vote is on its way, and counts.
    assert_eq!(died_at(first, "reduce"), 30);
    assert_eq!(died_at(second, "prepared"), 60);
    // The coordinator dies with all votes on a step, which is done again.
    cluster.coordinator.wait_for(|line| line.starts_with("fault: kill at decided of step 100"));
    cluster.restart();
    let mut fourth = cluster.worker(&["--fault", "stop@compute:200"]);
    assert_eq!(cluster.pause_at(&mut third, "compute"), 110);
    cluster.all_ready(2);
    cluster.resume();
    // One leaves in good order in the middle of a step, and another comes.
    let step = frozen_at(&mut fourth, "compute");
    third.signal("TERM");
    cluster.pause_behind(&fourth, step);
    assert_eq!(third.end().code, Some(0));
    cluster.all_ready(1);
    let mut fifth = cluster.worker(&["--fault", "stop@compute:300"]);
    cluster.all_ready(2);
    cluster.wait_for(|status| status["checkpoint_step"].as_u64() >= Some(140));
    cluster.resume();
    // All die at once, and what is left is a checkpoint: steps are undone and done again.
    let lost = frozen_at(&mut fifth, "compute");
    for process in [&fourth, &fifth, &cluster.coordinator] {
        process.signal("KILL");
    }
    for process in [&fourth, &fifth, &cluster.coordinator] {
        wait_until(|| is_gone(process.id()));
    }
    cluster.restart();
    let workers = [(); 3].map(|()| cluster.worker(&[]));
    let line =
        cluster.coordinator.wait_for(|line| line.starts_with("going on from the checkpoint"));
    let from: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(from + 1 < lost, "steps behind {from} are done again, up to {lost}");
    let Cluster { scratch, coordinator, .. } = cluster;
    coordinator.end().done();
    for worker in workers {
        assert_eq!(worker.end().code, Some(0));
    }

    let log = scratch.metrics();
    let worlds: HashSet<u64> = log.iter().map(|line| line["world"].as_u64().unwrap()).collect();
    assert_eq!(worlds, HashSet::from([1, 2, 3]), "it was resized");
    let (dataset, steps) = used(&scratch);
    assert_eq!(steps.len() as u64, STEPS + 6);
    let sequences = dataset.sequences(Split::Train, 24);
    assert!(6 * 300 < sequences && sequences < 6 * STEPS, "{sequences} are an epoch");
    let drawn: Vec<u64> = steps[..STEPS as usize]
        .iter()
        .flat_map(|step| &step.slots)
        .flat_map(|slot| &slot.sequences)
        .map(|(dataset, sequence)| {
            assert_eq!(dataset, "sources");
            *sequence
        })
        .collect();
    assert_eq!(drawn.len() as u64, 6 * STEPS);
    for epoch in drawn.chunks_exact(sequences as usize) {
        let once: HashSet<u64> = epoch.iter().copied().collect();
        assert_eq!(once.len() as u64, sequences, "every sequence once");
        assert!(once.iter().all(|&sequence| sequence < sequences));
    }
    let order = Order::new(3, 0, &[(1, sequences)]);
    let ordered: Vec<u64> = (0..6 * STEPS).map(|index| order.at(index).sequence).collect();
    assert!(drawn == ordered, "as the pure function draws them");

    // And so says the tool, which has also read the tokens again.
    let end = audit(&scratch);
    assert_eq!(end.code, Some(0), "{end:?}");
    let slots = 6 * STEPS + 5 * 6;
    assert!(end.stdout.contains(&format!("slots_read={slots}")), "{end:?}");
}

#[test]
fn an_audit_that_does_not_hold_names_the_step_and_the_slot() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "2", "--audit"]).done();
    let end = audit(&scratch);
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.stdout.contains("steps=14 sequences=108 slots_read=78"), "{end:?}");

    let step = scratch.path("store/runs/small/audit/step-0000000005");
    let file = std::fs::read_dir(&step).unwrap().map(|entry| entry.unwrap().path()).min().unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} in {text}");
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
    };
    // A sequence that was not drawn, tokens that are not the sequence's, a slot that is not there.
    change("\"sources\",", "\"sources\",1");
    audit(&scratch).fails(1, &["step 5", "slot 0 used", "not [(\"sources\", "]);
    let digest = &text.split("blake3:").nth(1).unwrap()[..64];
    change(digest, &"0".repeat(64));
    audit(&scratch).fails(1, &["step 5", "slot 0 used tokens blake3:000"]);
    std::fs::remove_file(&file).unwrap();
    audit(&scratch).fails(1, &["runs/small/audit", "step 5", "--audit"]);
}
