//! `looptrain tokenizer`: one tokenizer, trained on several inputs, for all their datasets.

use std::fs;

use serde_json::Value;

use crate::data::{json_of, texts, write_lines_gz};
use crate::support::{End, Scratch};

/// Lines in a file, and text files in a folder.
fn corpora() -> Scratch {
    let scratch = Scratch::new();
    let texts = texts();
    let (lines, files) = texts.split_at(texts.len() / 2);
    write_lines_gz(&scratch.path("lines.jsonl.gz"), lines);
    fs::create_dir(scratch.path("files")).unwrap();
    for (number, text) in files.iter().enumerate() {
        fs::write(scratch.path(&format!("files/{number:03}.txt")), text).unwrap();
    }
    scratch
}

fn train(scratch: &Scratch, more: &[&str]) -> End {
    let inputs = ["tokenizer", "train", "--input", "lines.jsonl.gz", "--input", "files"];
    let options = ["--bytes", "80000", "--output", "made/tokenizer.json"];
    scratch.run(&[&inputs[..], &options, more].concat())
}

#[test]
fn datasets_of_several_inputs_share_the_tokenizer_that_was_trained_on_all_of_them() {
    let scratch = corpora();
    let options = ["--field", "body", "--vocabulary", "300"];
    let end = train(&scratch, &options).done();
    assert_eq!((end.field("tokenizer"), end.field("entries")), ("made/tokenizer.json", "300"));
    let digest = end.field("digest");
    let per_token: f64 = end.field("bytes_per_token").parse().unwrap();
    assert!((1.0..3.0).contains(&per_token), "{end:?}");

    // The same again gives the same, whatever the threads, and tells what each input gave.
    let again = json_of(&train(&scratch, &[&options[..], &["--threads", "1", "--json"]].concat()));
    assert_eq!(again["digest"], digest);
    let gave: Vec<u64> = again["inputs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|input| input["bytes"].as_u64().unwrap())
        .collect();
    assert!(gave.len() == 2 && gave.iter().all(|bytes| *bytes > 30_000), "{again}");

    let text = "fn main() { /* ä */ }";
    let inspect = ["tokenizer", "inspect", "made/tokenizer.json"];
    let seen = json_of(&scratch.run(&[&inspect[..], &["--text", text, "--json"]].concat()));
    assert_eq!((&seen["digest"], &seen["entries"]), (&digest.into(), &300.into()));
    assert_eq!(seen["end_of_text"]["token"], "<|endoftext|>");
    let tokens = seen["text"]["tokens"].as_array().unwrap();
    assert_eq!(seen["text"]["count"], tokens.len());
    assert_eq!(seen["text"]["bytes"], text.len());
    for key in ["/byte_level", "/short_way", "/text/round_trip"] {
        assert_eq!(seen.pointer(key), Some(&true.into()), "{key}: {seen}");
    }
    let end = scratch.run(&[&inspect[..], &["--file", "files/000.txt"]].concat());
    assert!(end.code == Some(0) && end.stdout.contains("decoding gives it back"), "{end:?}");

    let prepare = |input: &str, name: &str| {
        let output = format!("file://store/datasets/{name}");
        let data = ["data", "prepare", "--input", input, "--field", "body", "--output", &output];
        let with = ["--tokenizer", "made/tokenizer.json", "--json"];
        json_of(&scratch.run(&[&data[..], &with].concat()))
    };
    for (input, name) in [("lines.jsonl.gz", "lines"), ("files", "files")] {
        assert_eq!(prepare(input, name)["tokenizer"], digest, "{name}");
        let manifest = scratch.path(&format!("store/datasets/{name}/manifest.json"));
        let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        assert_eq!(manifest["tokenizer_digest"], digest, "{name}");
    }
}

#[test]
fn what_no_tokenizer_can_be_made_of_is_said_with_its_place_and_leaves_none() {
    let scratch = corpora();
    let made = scratch.path("made");
    train(&scratch, &[]).fails(1, &["lines.jsonl.gz:1", "no field `text`", "--field"]);
    train(&scratch, &["--field", "body", "--input", "nowhere"]).fails(1, &["nowhere", "No such"]);
    train(&scratch, &["--field", "body", "--validation", "2"]).fails(1, &["validation_fraction"]);
    train(&scratch, &["--field", "body", "--vocabulary", "9"]).fails(2, &["--vocabulary", "260"]);
    assert!(!made.exists());

    // What is there stays, and nothing lies beside it.
    train(&scratch, &["--field", "body", "--vocabulary", "300"]).done();
    let written = fs::read(made.join("tokenizer.json")).unwrap();
    train(&scratch, &["--field", "body", "--vocabulary", "280"])
        .fails(1, &["made/tokenizer.json", "is there already", "--output"]);
    assert!(fs::read(made.join("tokenizer.json")).unwrap() == written);
    assert_eq!(fs::read_dir(&made).unwrap().count(), 1);

    let inspect = |more: &[&str]| scratch.run(&[&["tokenizer", "inspect"], more].concat());
    inspect(&["nowhere.json"]).fails(1, &["nowhere.json", "No such file"]);
    inspect(&["spec.toml"]).fails(1, &["spec.toml", "tokenizer"]);
    inspect(&["made/tokenizer.json", "--end-of-text", "<stop>"])
        .fails(1, &["made/tokenizer.json", "<stop>", "<|im_end|>"]);
    inspect(&["made/tokenizer.json", "--file", "nowhere.txt"]).fails(1, &["nowhere.txt"]);
}
