//! `looptrain doctor`: what is well, and what is not with its remedy.

use std::net::TcpListener;

use serde_json::Value;

use crate::cluster::{Cluster, RUN};
use crate::support::{End, Scratch, repository};

/// The report of `looptrain doctor` about `examples/tiny.toml` with its store in the scratch folder.
fn report(scratch: &Scratch, more: &[&str]) -> (End, Value) {
    let tiny = repository().join("examples/tiny.toml");
    let doctor = ["doctor", tiny.to_str().unwrap(), "--set", "run.store=file://store", "--json"];
    let end = scratch.run(&[&doctor[..], more].concat());
    let report =
        serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"));
    (end, report)
}

#[track_caller]
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|check| check["check"] == name);
    found.unwrap_or_else(|| panic!("no check `{name}` in {report:#}"))
}

/// Asserts that this check says so, and that it is the reason for the exit status.
#[track_caller]
fn fails(told: &(End, Value), name: &str, found: &str, remedy: &str) {
    let (end, report) = told;
    assert_eq!(end.code, Some(1), "{end:?}");
    assert_eq!(report["well"], false, "{report:#}");
    let check = check(report, name);
    assert_eq!(check["result"], "problem", "{check:#}");
    let words = format!("{} {}", check["found"], check["remedy"]);
    for wanted in [found, remedy] {
        assert!(words.contains(wanted), "`{wanted}` is missing in {check:#}");
    }
    assert!(end.stderr.lines().all(|line| !line.contains("panicked")), "{end:?}");
}

#[test]
fn a_well_machine_and_spec_are_found_well_and_the_store_is_as_before() {
    let scratch = Scratch::new();
    let (end, told) = report(&scratch, &["--listen", "127.0.0.1:0"]);
    assert_eq!(end.code, Some(0), "{end:?}\n{told:#}");
    assert_eq!((&told["well"], end.stderr.as_str()), (&true.into(), ""));
    for name in [
        "spec",
        "reached",
        "conditional writes",
        "speed",
        "memory",
        "disk",
        "kernels",
        "sequences",
        "run",
    ] {
        let result = check(&told, name)["result"].as_str().unwrap();
        assert!(matches!(result, "ok" | "warning" | "not checked"), "{name}: {told:#}");
    }
    assert_eq!(check(&told, "conditional writes")["result"], "ok");
    assert_eq!(check(&told, "listen on 127.0.0.1:0")["result"], "ok");
    assert!(check(&told, "dataset tiny-text")["found"].as_str().unwrap().contains("first start"));
    assert!(!scratch.path("store").exists(), "there was no store, and there is none");
}

#[test]
fn a_run_that_is_there_is_looked_at_and_left_as_it_is() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1", "--until", "2"]).stopped();
    let files = || {
        let end = std::process::Command::new("find").arg(scratch.path("store")).output().unwrap();
        String::from_utf8(end.stdout).unwrap()
    };
    let before = files();
    let end = scratch.run(&["doctor", "spec.toml"]);
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.stdout.contains("run `small` is there, with a checkpoint of step 2"), "{end:?}");
    assert!(end.last_line().ends_with(" not checked"), "{end:?}");
    assert_eq!(files(), before);
    let other = scratch.run(&["doctor", "spec.toml", "--set", "run.seed=4"]);
    assert_eq!(other.code, Some(1), "{other:?}");
    assert!(other.stdout.contains("--fresh"), "{other:?}");
    let small = ["--set", "model.vocab_size=280", "--set", "run.name=smaller"];
    let source = ["--set", "datasets.0.source.tokenizer_vocabulary=280"];
    let smaller = scratch.run(&[&["doctor", "spec.toml"], &small[..], &source[..]].concat());
    smaller.fails(1, &["one thing is to be mended"]);
    assert!(smaller.stdout.contains("raise model.vocab_size to at least 300"), "{smaller:?}");
    assert_eq!(files(), before);
}

#[test]
fn stores_that_cannot_be_used_are_told_and_nothing_waits_for_them() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("file"), "in the way").unwrap();
    let missing = report(&scratch, &["--set", "run.store=file://file/store"]);
    fails(&missing, "opened", "file/store", "set run.store");
    assert_eq!(check(&missing.1, "datasets")["result"], "not checked");
    // Root, too, can make no files there.
    let full = report(&scratch, &["--set", "run.store=file:///sys"]);
    fails(&full, "conditional writes", "/sys", "choose another run.store");
}

#[test]
fn a_server_that_is_not_there_is_found_out_at_once() {
    let scratch = Scratch::new();
    let mut command = scratch.command(&["doctor", "spec.toml", "--set", "run.store=s3://nowhere"]);
    command.env("AWS_ENDPOINT_URL", "http://127.0.0.1:9").env("AWS_REGION", "here");
    command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "topsecret");
    let end = crate::support::Running::start(command).end();
    end.fails(1, &["one thing is to be mended"]);
    assert!(end.stdout.contains("check the endpoint"), "{end:?}");
    assert!(!end.stdout.contains("topsecret"), "{end:?}");
}

#[test]
fn a_spec_that_is_none_is_a_problem_and_the_machine_is_looked_at_all_the_same() {
    let scratch = Scratch::new();
    let told = report(&scratch, &["--set", "model.num_attention_heads=5"]);
    fails(&told, "spec", "5 heads do not divide", "mend the spec");
    assert_eq!(check(&told.1, "open files")["result"], "ok");
    assert_eq!(check(&told.1, "memory")["result"], "not checked");
}

#[test]
fn an_occupied_port_is_told_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let told = report(&Scratch::new(), &["--listen", &address]);
    fails(&told, &format!("listen on {address}"), "in use", "choose another port");
}

#[test]
fn a_coordinator_is_asked_what_it_trains_and_one_that_is_not_there_is_missed() {
    let nobody = report(&Scratch::new(), &["--coordinator", "http://127.0.0.1:9"]);
    fails(&nobody, "coordinator", "127.0.0.1:9", "start `looptrain coordinator`");

    let cluster = Cluster::start(1, &[]);
    let there = ["doctor", "spec.toml", "--coordinator", &cluster.url, "--json"];
    let end = cluster.scratch.run(&[&there[..], &RUN].concat());
    assert_eq!(end.code, Some(0), "{end:?}");
    let told: Value = serde_json::from_str(&end.stdout).unwrap();
    assert_eq!(check(&told, "protocol")["result"], "ok", "{told:#}");
    assert_eq!(check(&told, "clock of the coordinator")["result"], "ok", "{told:#}");
    let other = report(&cluster.scratch, &["--coordinator", &cluster.url]);
    fails(&other, "run", "the spec is of `tiny`", "spec of this one");
}

#[test]
fn certificates_are_looked_at_and_shown_to_the_coordinator() {
    let cluster = Cluster::start_secured(1, &[]);
    let ask = |certificate: &str| {
        let tls = format!("tls/{certificate}");
        let words = ["doctor", "spec.toml", "--coordinator", &cluster.url, "--tls", &tls, "--json"];
        let end = cluster.scratch.run(&[&words[..], &RUN].concat());
        let told: Value = serde_json::from_str(&end.stdout).unwrap();
        (end, told)
    };
    let (end, told) = ask("operator");
    assert_eq!(end.code, Some(0), "{told:#}");
    assert_eq!(check(&told, "protocol")["result"], "ok", "{told:#}");
    let (end, told) = ask("worker");
    assert_eq!(end.code, Some(0), "{told:#}");
    let found = &check(&told, "coordinator")["found"];
    assert!(found.as_str().unwrap().contains("not for this certificate's role"), "{told:#}");
    assert!(check(&told, "certificate")["found"].as_str().unwrap().contains("worker/test"));
    std::fs::write(cluster.scratch.path("tls/worker/tls.crt"), "nothing").unwrap();
    fails(&ask("worker"), "certificate", "tls/worker/tls.crt", "looptrain certs issue");
}

#[test]
fn data_that_is_not_there_and_cannot_be_made_is_missed() {
    let scratch = Scratch::new();
    let text = std::fs::read_to_string(repository().join("examples/mano/base-1x1.toml")).unwrap();
    std::fs::write(scratch.path("mano.toml"), text).unwrap();
    let end = scratch.run(&["doctor", "mano.toml"]);
    end.fails(1, &["one thing is to be mended"]);
    assert!(end.stdout.contains("datasets/mano-5-3"), "{end:?}");
}

#[test]
fn a_gpu_that_is_not_there_is_named_with_what_is_missing() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    let told = report(&Scratch::new(), &["--device", "cuda:0"]);
    fails(&told, "library", "NVIDIA's driver", "--device cpu");
}
