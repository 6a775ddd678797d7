//! Workers on emulated devices that reduce over a stand-in for NCCL: the ids go through a real coordinator, and
//! whoever is killed in the middle of an all-reduce leaves the others hanging, as the real library may.

use std::sync::LazyLock;

use looptrain_worker::reduce::nccl::stand_in;
use tempfile::TempDir;

use crate::cluster::{Cluster, died_at, frozen_at};
use crate::support::{End, Running, Scratch};

/// A model that the GPU's kernels take, and that their emulator is done with in moments.
const SMALL: [&str; 16] = [
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "model.intermediate_size=40",
    "--set",
    "model.vocab_size=304",
    "--set",
    "stages.0.sequence_length=8",
    "--set",
    "stages.1.sequence_length=16",
    "--set",
    "stages.0.steps=12",
    "--set",
    "sample.tokens=0",
];

/// The last step.
const LAST: u64 = 18;

/// Where the stand-in is, under NCCL's name, and where ranks meet and kernels are kept; for the environment of
/// workers.
fn variables() -> Vec<(String, String)> {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
        let folder = TempDir::new().unwrap();
        drop(stand_in::compile(folder.path()));
        folder
    });
    let names = ["LD_LIBRARY_PATH", "LOOPTRAIN_EMULATED_KERNELS", "TMPDIR"];
    names.map(|name| (name.to_owned(), FOLDER.path().display().to_string())).into()
}

const DEVICE: [&str; 2] = ["--device", "emulated"];

/// Weights of one worker on one device, whom nobody disturbs.
fn undisturbed() -> &'static str {
    undisturbed_end().field("weights")
}

fn undisturbed_end() -> &'static End {
    static END: LazyLock<End> = LazyLock::new(|| alone(&[]));
    &END
}

/// One worker on one device, whom nobody disturbs.
fn alone(more: &[&str]) -> End {
    let scratch = Scratch::new();
    let train = ["train", "spec.toml", "--workers", "1"];
    let mut command = scratch.command(&[&train[..], &SMALL, &DEVICE, more].concat());
    command.envs(variables());
    Running::start(command).end().done()
}

fn cluster(workers: usize, more: &[&str]) -> Cluster {
    let workers = format!("cluster.workers={workers}");
    let given = [&["--set", &workers], &SMALL[..], more].concat();
    Cluster::start_in(&variables(), &given)
}

fn worker(cluster: &Cluster, more: &[&str]) -> Running {
    cluster.worker(&[&DEVICE, more].concat())
}

#[test]
fn workers_that_reduce_over_nccl_end_at_the_weights_of_one() {
    let mut three = cluster(3, &["--set", "cluster.collective=nccl"]);
    let _workers = [(); 3].map(|()| worker(&three, &[]));
    assert!(three.formed(1).contains("over NCCL"));
    let end = three.coordinator.end().done();
    assert_eq!(end.field("weights"), undisturbed(), "{end:?}");
    assert!(!end.stderr.contains("generation 2"), "{end:?}");
}

#[test]
fn sums_in_bf16_go_over_nccl_and_over_tcp_to_nearly_the_same_end() {
    let loss = |end: &End| end.field("loss").parse::<f64>().unwrap();
    let exact = loss(undisturbed_end());
    let of_two = |reduction: &str, collective: &str| {
        let reduction = format!("cluster.reduction={reduction}");
        let collected = format!("cluster.collective={collective}");
        let mut two = cluster(2, &["--set", &reduction, "--set", &collected]);
        let _workers = [(); 2].map(|()| worker(&two, &[]));
        assert_eq!(two.formed(1).contains("over NCCL"), collective == "nccl");
        let end = two.coordinator.end().done();
        assert!((loss(&end) / exact - 1.0).abs() < 0.01, "{end:?}");
        assert!(!end.stderr.contains("generation 2"), "{end:?}");
        end.field("weights").to_owned()
    };
    for collective in ["nccl", "tcp"] {
        let [fast, bf16] = ["fast", "fast-bf16"].map(|reduction| of_two(reduction, collective));
        assert_ne!(fast, bf16, "they are rounded, over {collective}");
    }
}

#[test]
fn a_worker_that_dies_in_the_middle_of_an_all_reduce_over_nccl_changes_no_bit() {
    for moment in ["reduce", "compute"] {
        let fault = format!("kill@{moment}:7");
        let mut three = cluster(3, &["--set", "cluster.collective=nccl"]);
        let victim = worker(&three, &["--fault", &fault]);
        let _others = [worker(&three, &[]), worker(&three, &[])];
        assert_eq!(died_at(victim, moment), 7);
        assert!(three.formed(2).contains("over NCCL"));
        let end = three.coordinator.end().done();
        assert_eq!(end.field("weights"), undisturbed(), "{moment}: {end:?}");
        let worlds: Vec<u64> =
            three.scratch.metrics().iter().map(|line| line["world"].as_u64().unwrap()).collect();
        let expected: Vec<u64> = (1..=LAST).map(|step| if step < 7 { 3 } else { 2 }).collect();
        assert_eq!(worlds, expected);
    }
}

#[test]
fn a_stage_that_trains_the_gate_goes_over_nccl_through_a_death_with_the_same_bits() {
    let gate = ["--set", "stages.1.objective=exit-gate"];
    let expected = alone(&gate);
    assert_ne!(expected.field("weights"), undisturbed(), "the second stage trains something else");
    let mut three = cluster(3, &[&gate[..], &["--set", "cluster.collective=nccl"]].concat());
    let victim = worker(&three, &["--fault", "kill@reduce:15"]);
    let _others = [worker(&three, &[]), worker(&three, &[])];
    assert_eq!(died_at(victim, "reduce"), 15);
    assert!(three.formed(2).contains("over NCCL"));
    let end = three.coordinator.end().done();
    assert_eq!(end.field("weights"), expected.field("weights"), "{end:?}");
}

#[test]
fn a_worker_that_freezes_in_an_all_reduce_over_nccl_is_left_behind() {
    let mut two = cluster(2, &["--set", "cluster.worker_timeout=6.0"]);
    let mut frozen = worker(&two, &["--fault", "stop@reduce:5"]);
    let _other = worker(&two, &[]);
    assert!(two.formed(1).contains("over NCCL"));
    assert_eq!(frozen_at(&mut frozen, "reduce"), 5);
    two.coordinator.wait_for(|line| line.contains("lost: "));
    let end = two.coordinator.end().done();
    assert_eq!(end.field("weights"), undisturbed(), "{end:?}");
}

#[test]
fn a_worker_that_joins_takes_part_over_nccl_with_the_same_bits() {
    let mut one = cluster(1, &[]);
    let mut first = worker(&one, &["--fault", "stop@compute:4"]);
    assert_eq!(one.pause_at(&mut first, "compute"), 4);
    let _second = worker(&one, &[]);
    one.all_ready(2);
    one.resume();
    assert!(one.formed(2).contains("over NCCL"));
    let end = one.coordinator.end().done();
    assert_eq!(end.field("weights"), undisturbed(), "{end:?}");
}

#[test]
fn a_worker_without_nccl_brings_the_ring_back_and_no_other_bits() {
    let mut two = cluster(2, &[]);
    let _with = worker(&two, &[]);
    // A release that is known to hang.
    let bad = [("LOOPTRAIN_STAND_IN_NCCL_VERSION".to_owned(), "22805".to_owned())];
    let mut without = two.worker_exporting(&bad, &DEVICE);
    without.wait_for(|line| line.contains("2.28.5") && line.contains("2.28.3 to 2.28.8"));
    assert!(two.formed(1).contains("over TCP, since"));
    let end = two.coordinator.end().done();
    assert_eq!(end.field("weights"), undisturbed(), "{end:?}");
}

#[test]
fn a_run_that_demands_nccl_names_who_cannot() {
    let two = cluster(2, &["--set", "cluster.collective=nccl"]);
    let on_the_cpu = two.worker(&[]).end();
    on_the_cpu.fails(1, &["cannot reduce over NCCL", "cluster.collective"]);
}
