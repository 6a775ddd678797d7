//! Whole runs on a real S3 server, and on a store that misbehaves.

use std::process::Command;

use looptrain_storage::Faults;

use crate::cluster::{Cluster, ENDLESS};
use crate::seaweed::{ACCESS_KEY, SECRET_KEY, Seaweed};
use crate::support::{End, Running, Scratch, repository, signal, text, wait_until, workers_of};

/// The quickstart's path in seconds, on text that does not change meanwhile.
fn tiny(scratch: &Scratch, more: &[&str]) -> Command {
    let spec = repository().join("examples/tiny.toml");
    let paths = format!("datasets.0.source.paths={}", text());
    let arguments = ["train", spec.to_str().unwrap(), "--set", &paths, "--workers", "2"];
    scratch.command(&[&arguments[..], more].concat())
}

/// Nothing that a process says holds the credentials it was given.
#[track_caller]
fn says_no_secret(end: &End) {
    for secret in [ACCESS_KEY, SECRET_KEY] {
        let told = end.stdout.contains(secret) || end.stderr.contains(secret);
        assert!(!told, "a credential is in what was printed");
    }
}

#[test]
fn a_run_on_a_real_s3_server_whose_workers_are_killed_ends_with_the_weights_of_one_in_a_directory()
{
    let Some(seaweed) = Seaweed::start() else { return };
    let scratch = Scratch::new();
    // Until it is told to stop, so that nobody is killed behind its end.
    let endless = ["--set", "stages.0.steps=1000000", "--set", "cluster.worker_timeout=60"];
    let mut command =
        tiny(&scratch, &[&endless[..], &["--set", "run.store=s3://lab/here"]].concat());
    command.envs(seaweed.variables());
    let mut running = Running::start(command);
    for kill in 0..2 {
        running.wait_for(|line| line.starts_with("checkpoint of step "));
        wait_until(|| workers_of(running.id()).len() == 2);
        let worker = workers_of(running.id())[kill];
        signal(worker, "KILL");
        running.wait_for(|line| line.starts_with("worker worker-") && line.contains(" lost: "));
    }
    running.skip();
    running.wait_for(|line| line.starts_with("step "));
    running.signal("TERM");
    let end = running.end().stopped();
    let until = ["--until", end.field("step")];
    let elsewhere = Scratch::new();
    let calm = Running::start(tiny(&elsewhere, &[&endless[..], &until].concat())).end().stopped();
    assert_eq!(end.field("weights"), calm.field("weights"), "{end:?}");
    says_no_secret(&end);

    let ask = |arguments: &[&str]| {
        let run = ["--store", "s3://lab/here", "--run", "tiny"];
        let mut command = scratch.command(&[arguments, &run].concat());
        command.envs(seaweed.variables()).env("RUST_LOG", "trace");
        Running::start(command).end()
    };
    let verified = ask(&["checkpoint", "verify"]);
    assert_eq!(verified.code, Some(0), "{verified:?}");
    assert!(verified.stdout.contains("good: "), "{verified:?}");
    assert!(verified.stderr.contains("TRACE"), "everything is said");
    says_no_secret(&verified);
    assert_eq!(ask(&["checkpoint", "prune", "--keep", "1"]).code, Some(0));
    let list = ask(&["checkpoint", "list"]);
    assert_eq!(list.stdout.lines().count(), 1, "{list:?}");

    // With another key the server is not to be had, and says why.
    let mut command = tiny(&scratch, &["--set", "run.store=s3://lab/here"]);
    command.envs(seaweed.variables()).env("AWS_SECRET_ACCESS_KEY", format!("{SECRET_KEY}-not"));
    let refused = Running::start(command).end();
    refused.fails(1, &["cannot write to the store s3://lab/here", "AWS_ENDPOINT_URL"]);
    says_no_secret(&refused);
}

#[test]
fn a_server_that_does_not_answer_is_tried_for_a_while_and_named() {
    let scratch = Scratch::new();
    let mut command = tiny(&scratch, &["--set", "run.store=s3://lab"]);
    command.envs([
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
    ]);
    let end = Running::start(command).end();
    end.fails(1, &["s3://lab", "http://127.0.0.1:9", "(10 attempts in ", "AWS_ENDPOINT_URL"]);
    assert!(end.stderr.contains("attempt 3, in "), "it says that it tries: {end:?}");
    says_no_secret(&end);
}

#[test]
fn a_run_through_a_storm_in_the_store_ends_with_the_same_weights() {
    let scratch = Scratch::new();
    let mut command = tiny(&scratch, &["--set", "checkpoint.every_steps=25"]);
    command.env("LOOPTRAIN_STORE_FAULTS", "seed=4,share=0.2");
    let end = Running::start(command).end().done();
    let calm = Running::start(tiny(&Scratch::new(), &[])).end().done();
    assert_eq!(end.field("weights"), calm.field("weights"), "{end:?}");
    for name in Faults::NAMES {
        let fired =
            end.stderr.lines().filter(|line| line.contains(&format!("store fault: {name} on")));
        assert!(fired.count() >= 1, "no {name} in: {}", end.stderr);
    }
    let list =
        scratch.run(&["checkpoint", "verify", "--store", "file://.looptrain", "--run", "tiny"]);
    assert_eq!(list.code, Some(0), "{list:?}");

    let mut command = tiny(&scratch, &[]);
    command.env("LOOPTRAIN_STORE_FAULTS", "often");
    let wrong = Running::start(command).end();
    wrong.fails(2, &["LOOPTRAIN_STORE_FAULTS", "seed=NUMBER", "often"]);
}

#[test]
fn a_store_that_is_away_costs_its_time_and_no_worker() {
    let elsewhere = Scratch::new();
    let away = elsewhere.path("away");
    let faults = ("LOOPTRAIN_STORE_FAULTS".to_owned(), format!("away={}", away.display()));
    let two = ["--set", "cluster.workers=2"];
    let mut cluster = Cluster::start_in(&[faults], &[&ENDLESS[..], &two].concat());
    // Until the store is away, nobody has read any tokens.
    cluster.order(&["pause"]);
    let workers = ["one", "other"].map(|name| cluster.worker(&["--name", name]));
    cluster.wait_for(|status| status["phase"] == "paused");
    std::fs::write(&away, "").unwrap();
    assert!(cluster.order(&["resume"]).starts_with("the run goes on"));
    let line = cluster.coordinator.wait_for(|line| line.starts_with("the store is away, "));
    assert!(line.contains("the tokens of step 1") && line.contains("503"), "{line}");
    let reason = cluster.status()["reason"].as_str().unwrap().to_owned();
    assert!(reason.starts_with("waiting for the store: the tokens of step 1"), "{reason}");
    // A call has been given up by then.
    wait_until(|| cluster.status()["reason"].as_str().unwrap().contains("(10 attempts in "));
    let status = cluster.status();
    assert_eq!((status["step"].as_u64(), status["generation"].as_u64()), (Some(0), Some(1)));
    std::fs::remove_file(&away).unwrap();
    cluster.coordinator.wait_for(|line| line.starts_with("the store is back, "));
    cluster.wait_for(|status| status["step"].as_u64() > Some(10));
    let status = cluster.status();
    assert_eq!(status["generation"], 1, "nobody was sent away: {status:#}");
    cluster.stop(&ENDLESS);
    for worker in workers {
        assert_eq!(worker.end().code, Some(0));
    }
}
