//! Every kind of bad input gets one line that names the place and the remedy, and leaves nothing
//! half-written.

use std::fs;
use std::net::TcpListener;

use crate::support::{End, Running, Scratch};

/// `looptrain train` with one override.
fn with(scratch: &Scratch, key_value: &str) -> End {
    scratch.train(&["--workers", "1", "--set", key_value])
}

/// Failures before any worker is started.
trait AtOnce {
    /// As [`End::fails`], and the error is all that is said, but for the making of a dataset.
    #[track_caller]
    fn fails_at_once(&self, code: i32, words: &[&str]);
}

impl AtOnce for End {
    #[track_caller]
    fn fails_at_once(&self, code: i32, words: &[&str]) {
        self.fails(code, words);
        let said = self.stderr.lines().filter(|line| !line.starts_with("data "));
        assert_eq!(said.count(), 1, "said once: {self:?}");
    }
}

#[test]
fn a_spec_that_is_missing_or_no_toml() {
    let scratch = Scratch::new();
    scratch.run(&["train", "nowhere.toml"]).fails_at_once(2, &["nowhere.toml", "No such file"]);
    fs::write(scratch.path("bad.toml"), "[run]\nname = \n").unwrap();
    scratch.run(&["train", "bad.toml"]).fails_at_once(2, &["bad.toml:2"]);
}

#[test]
fn unknown_and_mistyped_keys() {
    let scratch = Scratch::new();
    let text = fs::read_to_string(scratch.path("spec.toml")).unwrap();
    fs::write(scratch.path("typo.toml"), text.replace("hidden_size", "hiden_size")).unwrap();
    scratch.run(&["train", "typo.toml"]).fails_at_once(2, &["typo.toml:", "hiden_size"]);
    with(&scratch, "model.layers=3").fails_at_once(2, &["--set model.layers=3", "layers"]);
    with(&scratch, "stages.7.steps=3").fails_at_once(2, &["stages.7.steps", "`7`"]);
    with(&scratch, "run.seed=none").fails_at_once(2, &["run.seed=none"]);
    assert!(!scratch.path("store").exists(), "nothing was written");
}

#[test]
fn contradictory_values() {
    let scratch = Scratch::new();
    with(&scratch, "model.num_attention_heads=5").fails_at_once(2, &["num_attention_heads", "24"]);
    with(&scratch, "datasets.0.source.tokenizer_vocabulary=400")
        .fails_at_once(2, &["tokenizer_vocabulary", "model.vocab_size = 300"]);
    with(&scratch, "stages.0.learning_rate.warmup_steps=99")
        .fails_at_once(2, &["warmup_steps", "8 steps"]);
    with(&scratch, "stages.0.mixture=[{dataset=\"prose\",weight=1}]")
        .fails_at_once(2, &["`prose`"]);
    with(&scratch, "run.store=somewhere").fails_at_once(2, &["run.store", "file://"]);
    assert!(!scratch.path("store").exists(), "nothing was written");
}

#[test]
fn a_vocabulary_larger_than_the_models() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1"]).done();
    let smaller = [
        "--set",
        "model.vocab_size=280",
        "--set",
        "datasets.0.source.tokenizer_vocabulary=280",
        "--fresh",
    ];
    scratch.train(&smaller).fails_at_once(1, &["`sources`", "300", "model.vocab_size = 280"]);
}

#[test]
fn a_sequence_longer_than_the_data() {
    let scratch = Scratch::new();
    with(&scratch, "stages.1.sequence_length=50000000")
        .fails_at_once(1, &["stages.1.sequence_length", "`sources`"]);
    assert!(!scratch.path("store/runs/small/record").exists(), "no run was begun");
}

#[test]
fn text_that_is_not_there() {
    let scratch = Scratch::new();
    with(&scratch, "datasets.0.source.paths=[\"/no/such/text\"]")
        .fails_at_once(1, &["`sources`", "/no/such/text"]);
    assert!(!scratch.path("store/datasets/sources/manifest.json").exists());
}

#[test]
fn a_damaged_shard() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1"]).done();
    let shard = scratch.file_of("sources", "tokens-00000-").unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let end = scratch.train(&["--workers", "1", "--fresh"]);
    end.fails(1, &[name, "blake3:"]);
    let told = end.stderr.lines().filter(|line| !line.starts_with("worker-0: "));
    let told = told.filter(|line| line.contains(name));
    assert_eq!(told.count(), 1, "the coordinator says it once: {end:?}");
}

#[test]
fn a_store_that_cannot_be_written() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "in the way").unwrap();
    with(&scratch, "run.store=file://file/store").fails_at_once(1, &["file/store"]);
    with(&scratch, "run.store=ftp://host/store").fails_at_once(1, &["ftp://host/store"]);
}

#[test]
fn a_port_in_use() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dashboard = scratch.train(&["--workers", "1", "--dashboard", &address]);
    dashboard.fails_at_once(1, &["dashboard", &address, "choose another port"]);
    let listen = scratch.run(&["coordinator", "spec.toml", "--listen", &address]);
    listen.fails_at_once(1, &["workers", &address, "choose another port"]);
}

#[test]
fn a_port_in_use_does_not_cost_the_run_that_was_to_begin_anew() {
    let scratch = Scratch::new();
    let first = scratch.train(&["--workers", "1"]).done();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let fresh = ["--workers", "1", "--set", "run.seed=4", "--fresh", "--dashboard", &address];
    scratch.train(&fresh).fails_at_once(1, &["dashboard", &address]);
    let again = scratch.train(&["--workers", "1"]).done();
    assert_eq!(again.last_line(), first.last_line());
    assert!(!again.stderr.contains("worker"), "the run is still finished: {again:?}");
}

#[test]
fn a_coordinator_stopped_before_anybody_came_says_where_it_ended() {
    let scratch = Scratch::new();
    let listen = ["coordinator", "spec.toml", "--listen", "127.0.0.1:0"];
    let mut running = Running::start(scratch.command(&listen));
    running.wait_for(|line| line.starts_with("listening for workers on http://"));
    running.signal("TERM");
    let end = running.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    assert_eq!(end.last_line(), "stopped run=small step=0 tokens=0 loss=none weights=none");
}

#[test]
fn a_checkpoint_of_another_model() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1"]).done();
    let other = ["--workers", "1", "--set", "run.name=\"other\"", "--set", "model.hidden_size=32"];
    scratch.train(&other).done();
    let runs = scratch.path("store/runs");
    fs::remove_dir_all(runs.join("small/checkpoints")).unwrap();
    fs::remove_dir_all(runs.join("small/record")).unwrap();
    fs::rename(runs.join("other/checkpoints"), runs.join("small/checkpoints")).unwrap();
    scratch.train(&["--workers", "1"]).fails_at_once(1, &["checkpoint", "--fresh"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let scratch = Scratch::new();
    let whole = scratch.train(&["--workers", "1"]).done();
    let checkpoints = scratch.path("store/runs/small/checkpoints");
    // Usually of step 10; earlier when the store is so slow that one save is still under way there.
    let older = (fs::read_dir(&checkpoints).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.trim_start_matches("step-").parse::<u64>().ok())
        .filter(|step| *step < 14)
        .max()
        .unwrap();
    let part = fs::read_dir(checkpoints.join("step-0000000014"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .unwrap();
    let mut bytes = fs::read(&part).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&part, bytes).unwrap();
    // Without the record's word that the run is finished, it has to look at its checkpoints.
    fs::remove_dir_all(scratch.path("store/runs/small/record")).unwrap();
    let resumed = scratch.train(&["--workers", "1"]).done();
    assert!(resumed.stderr.contains("checkpoint of step 14 passed over"), "{resumed:?}");
    let told = resumed.stderr.lines().filter(|line| line.contains("step-0000000014"));
    assert_eq!(told.count(), 1, "it is said once: {resumed:?}");
    let from = format!("going on from the checkpoint of step {older}\n");
    assert!(resumed.stderr.contains(&from), "{resumed:?}");
    assert_eq!(resumed.field("weights"), whole.field("weights"));
}

#[test]
fn a_worker_without_a_coordinator() {
    let scratch = Scratch::new();
    let nobody = "http://127.0.0.1:9";
    scratch
        .run(&["worker", "--coordinator", "nonsense"])
        .fails(2, &["nonsense", "http://HOST:PORT"]);
    scratch.run(&["status", "--coordinator", nobody]).fails_at_once(1, &[nobody]);
    scratch
        .run(&["status", "--store", "file://store", "--run", "none"])
        .fails_at_once(1, &["file://store", "no such directory"]);
    assert!(!scratch.path("store").exists(), "asking makes no store");
    fs::create_dir(scratch.path("store")).unwrap();
    scratch
        .run(&["status", "--store", "file://store", "--run", "none"])
        .fails_at_once(1, &["`none`"]);
}
