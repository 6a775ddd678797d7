//! Text and datasets on a real S3 server.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use looptrain_storage::Store;

use crate::data::{json_of, spec_for, texts, write_lines_gz, write_parquet};
use crate::seaweed::Seaweed;
use crate::support::{End, Running, SOON, Scratch};

#[test]
fn text_on_a_server_becomes_a_dataset_there_through_a_kill_and_trains_to_the_same_weights() {
    let Some(seaweed) = Seaweed::start() else { return };
    let scratch = Scratch::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = Store::open_with("s3://lab", seaweed.variables()).unwrap();

    // Large enough that a process can be killed in the middle of it.
    let texts = texts();
    let lines: Vec<String> = (0..8)
        .flat_map(|round| texts.iter().map(move |text| format!("// {round}\n{text}")))
        .collect();
    fs::create_dir(scratch.path("corpus")).unwrap();
    write_lines_gz(&scratch.path("corpus/0.jsonl.gz"), &lines);
    write_parquet(&scratch.path("corpus/1.parquet"), &texts);
    for file in ["0.jsonl.gz", "1.parquet"] {
        let bytes = fs::read(scratch.path("corpus").join(file)).unwrap();
        runtime.block_on(store.put(&format!("corpus/{file}"), bytes)).unwrap();
    }
    let on_server = |mut command: Command| {
        command.envs(seaweed.variables());
        command
    };
    let prepare = |by: &[&str], input: &str, output: &str| {
        let data = ["data", "prepare", "--input", input, "--field", "body", "--output", output];
        let options =
            ["--vocabulary", "300", "--shard-tokens", "50000", "--threads", "1", "--json"];
        scratch.command_by(by, &[&data[..], &options].concat())
    };
    let keys = |part: &str| -> Vec<String> {
        let objects = runtime.block_on(store.list("store/datasets/web")).unwrap();
        let keys = objects.into_iter().map(|object| object.key);
        keys.filter(|key| key.contains(part)).collect()
    };
    let remote = ["s3://lab/corpus", "s3://lab/store/datasets/web"];

    let killed = Running::start(on_server(prepare(&["nice", "-n", "19"], remote[0], remote[1])));
    let begin = Instant::now();
    while keys("/tokens-00002-").is_empty() {
        assert!(begin.elapsed() < SOON, "no third shard");
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.signal("KILL");
    assert_eq!(killed.end().code, None);
    assert!(keys("manifest.json").is_empty(), "it was killed before its end");
    let end = Running::start(on_server(prepare(&[], remote[0], remote[1]))).end();
    assert!(end.stderr.contains("going on behind "), "{end:?}");
    let made = json_of(&end);
    assert!(made["train"]["shards"].as_u64().unwrap() > 10, "{made}");
    assert!(keys("progress").is_empty(), "what was for a later start is gone");

    let data = |arguments: &[&str]| -> End {
        Running::start(on_server(scratch.command(&[&["data"], arguments, &remote[1..]].concat())))
            .end()
    };
    assert_eq!(data(&["verify"]).code, Some(0));
    let seen = json_of(&data(&["inspect", "--json"]));
    assert_eq!(seen["train"]["samples"].as_array().unwrap().len(), 3, "{seen}");

    // The same text in a directory gives the same tokens, and they the same weights.
    let here = json_of(&Running::start(prepare(&[], "corpus", "file://store/datasets/web")).end());
    assert_eq!((&here["train"], &here["validation"]), (&made["train"], &made["validation"]));
    spec_for(&scratch, "web", 300);
    let local = scratch.train(&["--workers", "1"]).done();
    let arguments = ["train", "spec.toml", "--workers", "2", "--set", "run.store=s3://lab/store"];
    let there = Running::start(on_server(scratch.command(&arguments))).end().done();
    assert_eq!(there.field("weights"), local.field("weights"));

    let shard = keys("/tokens-00001-").pop().unwrap();
    let mut bytes = runtime.block_on(store.get(&shard)).unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    runtime.block_on(store.put(&shard, bytes)).unwrap();
    data(&["verify"]).fails(1, &["1 of ", shard.rsplit('/').next().unwrap(), "its digest is"]);
}
