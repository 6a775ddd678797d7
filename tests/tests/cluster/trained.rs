//! What is done with a trained model: measured, made to write, brought into other runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::data::{json_of, spec_for};
use crate::support::{End, Scratch, repository};

/// Tensors of a file as bytes.
fn tensors(file: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
}

/// A NumPy file of `[rows, columns]` 64-bit integers.
fn write_npy(path: &Path, rows: usize, values: &[i64]) {
    let columns = values.len() / rows;
    let header =
        format!("{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}, {columns}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

/// A folder of the Hugging Face kind of a golden case: its weights, as 32-bit floats.
fn golden_folder(scratch: &Scratch, case: &str) -> Value {
    let golden = repository().join("tests/golden").join(case);
    let case: Value = serde_json::from_slice(&fs::read(golden.join("case.json")).unwrap()).unwrap();
    let to = scratch.path("model");
    fs::create_dir(&to).unwrap();
    let config = json!({
        "model_type": "ouro", "hidden_size": case["d"], "num_hidden_layers": case["layers"],
        "num_attention_heads": case["heads"], "intermediate_size": case["ffn"],
        "vocab_size": case["vocab"], "rms_norm_eps": 1e-6, "rope_theta": case["theta"],
        "total_ut_steps": case["loops"], "max_position_embeddings": 128, "eos_token_id": 0,
    });
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(golden.join("weights.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    for (name, view) in weights.iter() {
        let begin = data.len();
        let wide = view.data().chunks_exact(8).map(|it| f64::from_le_bytes(it.try_into().unwrap()));
        data.extend(wide.flat_map(|value| (value as f32).to_le_bytes()));
        let offsets = [begin, data.len()];
        let entry = json!({ "dtype": "F32", "shape": view.shape(), "data_offsets": offsets });
        header.insert(name.to_owned(), entry);
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(to.join("model.safetensors"), file).unwrap();

    let ids = |name: &str| {
        let bytes = fs::read(golden.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(8).map(|it| i64::from_le_bytes(it.try_into().unwrap())).collect()
    };
    let rows = case["batch"].as_u64().unwrap() as usize;
    let [inputs, targets]: [Vec<i64>; 2] = ["tokens", "targets"].map(ids);
    write_npy(&scratch.path("tokens.npy"), rows, &inputs);
    write_npy(&scratch.path("targets.npy"), rows, &targets);
    case
}

fn expected(case: &str, name: &str) -> Vec<f64> {
    let path = repository().join("tests/golden").join(case).join("expected.safetensors");
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(name).unwrap().data().to_vec();
    let number = |it: &[u8]| -> f64 {
        let it = it.try_into().unwrap();
        if name.starts_with("qexit") {
            i64::from_le_bytes(it) as f64
        } else {
            f64::from_le_bytes(it)
        }
    };
    data.chunks_exact(8).map(number).collect()
}

#[track_caller]
fn near(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap();
    assert!((found - expected).abs() < 1e-5, "{found} against {expected}");
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn an_evaluation_of_ids_has_the_numbers_of_an_independent_implementation() {
    for case in ["plain", "many-loops", "long"] {
        let scratch = Scratch::new();
        let settings = golden_folder(&scratch, case);
        let beta = settings["beta"].to_string();
        let files = ["--tokens", "tokens.npy", "--targets", "targets.npy", "--json"];
        let eval = ["eval", "--from", "model", "--entropy-weight", &beta, "--plot", "depth.svg"];
        let found = json_of(&scratch.run(&[&eval[..], &files].concat()));
        near(&found["loss"], expected(case, "loss")[0]);
        let loops = settings["loops"].as_u64().unwrap() as usize;
        let (losses, pdf) = (expected(case, "ce"), expected(case, "exit_pdf"));
        let tokens = losses.len() / loops;
        assert_eq!(found["tokens"], tokens);
        for r in 0..loops {
            let of_loop = r * tokens..(r + 1) * tokens;
            near(&found["loss_per_loop"][r], mean(&losses[of_loop.clone()]));
            near(&found["exit_pdf"][r], mean(&pdf[of_loop]));
        }
        near(&found["entropy"], -pdf.iter().map(|p| p * p.ln()).sum::<f64>() / tokens as f64);
        let depth = |(at, p): (usize, &f64)| (at / tokens + 1) as f64 * p;
        near(&found["mean_depth"], pdf.iter().enumerate().map(depth).sum::<f64>() / tokens as f64);
        for threshold in [0.5, 0.9] {
            let exits = expected(case, &format!("qexit.{threshold}"));
            let curve = found["quality"].as_array().unwrap();
            let at = curve.iter().find(|it| it["threshold"] == threshold).unwrap();
            near(&at["mean_depth"], mean(&exits));
            let loss = |(token, exit): (usize, &f64)| losses[(*exit as usize - 1) * tokens + token];
            let losses: Vec<f64> = exits.iter().enumerate().map(loss).collect();
            near(&at["loss"], mean(&losses));
        }
        let svg = fs::read_to_string(scratch.path("depth.svg")).unwrap();
        assert!(svg.contains("loss by loop") && svg.contains("Q-exit"), "{svg}");
    }
}

#[test]
fn what_cannot_be_evaluated_is_named() {
    let scratch = Scratch::new();
    golden_folder(&scratch, "plain");
    let eval = |more: &[&str]| scratch.run(&[&["eval", "--from", "model"][..], more].concat());
    eval(&[]).fails(1, &["--data", "--tokens"]);
    let none = ["--tokens", "none.npy", "--targets", "targets.npy"];
    eval(&none).fails(1, &["none.npy"]);
    write_npy(&scratch.path("targets.npy"), 2, &[41; 26]);
    let files = ["--tokens", "tokens.npy", "--targets", "targets.npy"];
    eval(&files).fails(1, &["--targets [0, 0]", "41", "vocabulary of 41"]);
    write_npy(&scratch.path("targets.npy"), 2, &[-100; 26]);
    eval(&files).fails(1, &["no target", "tokens.npy"]);

    let path = scratch.path("model/model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 4]).unwrap();
    eval(&files).fails(1, &["model.safetensors", "cut off"]);
    let mut bytes = whole;
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    eval(&files).fails(1, &["model.safetensors", "tensor `", "is inf"]);
    let twice = ["eval", "--from", "model", "--checkpoint", "file://store/runs/small"];
    assert_eq!(scratch.run(&twice).code, Some(2));
}

/// The value of `key` in the line that ends an import.
fn field(end: &End, key: &str) -> String {
    assert_eq!(end.code, Some(0), "{end:?}");
    end.field(key).to_owned()
}

/// What the import printed for specs.
fn add_to_spec(scratch: &Scratch, printed: &End, run: &str) {
    let (sections, _) = printed.stdout.split_once("\n# Trained").unwrap();
    let spec = fs::read_to_string(scratch.path("spec.toml")).unwrap();
    let (before, rest) = spec.split_once("[model]").unwrap();
    let (_, behind) = rest.split_once("[[datasets]]").unwrap();
    let spec = format!("{before}{sections}\n[[datasets]]{behind}");
    fs::write(scratch.path("spec.toml"), spec.replace("\"small\"", &format!("{run:?}"))).unwrap();
}

#[test]
fn a_model_is_measured_written_with_and_begun_from_again_to_the_bit() {
    let scratch = Scratch::new();
    let end = scratch.train(&["--workers", "2"]).done();
    let exported = ["export", "--checkpoint", "file://store/runs/small", "--to", "out"];
    assert_eq!(scratch.run(&[&exported[..], &["--dtype", "f32"]].concat()).code, Some(0));

    // As the run itself has evaluated it, out of the checkpoint and out of the folder.
    let of_run = ["eval", "--checkpoint", "file://store/runs/small", "--sequences", "10", "--json"];
    let found = json_of(&scratch.run(&of_run));
    let line = end.stdout.lines().find(|line| line.starts_with("validation at step 14"));
    let line = line.unwrap_or_else(|| panic!("{end:?}"));
    for loss in found["loss_per_loop"].as_array().unwrap() {
        let loss = format!("{:.3}", loss.as_f64().unwrap());
        assert!(line.contains(&loss), "{loss} is not in {line}");
    }
    let of_folder = ["eval", "--from", "out", "--data", "file://store/datasets/sources"];
    let more = ["--sequences", "10", "--entropy-weight", "0.05", "--json"];
    let mut again = json_of(&scratch.run(&[&of_folder[..], &more].concat()));
    again["model"] = found["model"].clone();
    assert_eq!(again, found, "one model, one result");
    assert!(found["bits_per_byte_per_loop"][1].as_f64().unwrap() < 8.0, "{found}");
    let deeper = json_of(&scratch.run(&[&of_run[..], &["--loops", "4"]].concat()));
    assert_eq!(deeper["loss_per_loop"].as_array().unwrap().len(), 4);
    assert_eq!(deeper["loss_per_loop"][1], found["loss_per_loop"][1]);

    let generate = |more: &[&str]| {
        let model = ["generate", "--from", "out", "--prompt", "fn ", "--tokens", "30", "--json"];
        json_of(&scratch.run(&[&model[..], more].concat()))
    };
    let full = generate(&["--seed", "3"]);
    assert_eq!(generate(&["--seed", "3"])["tokens"], full["tokens"]);
    assert_ne!(generate(&["--seed", "4"])["tokens"], full["tokens"]);
    // Two loops, two layers, keys and values, 24 floats.
    let cached = |it: &Value| it["cache_bytes"].as_u64().unwrap();
    assert!(cached(&full) > 0 && cached(&full).is_multiple_of(2 * 2 * 2 * 24 * 4), "{full}");
    for cache in ["last", "averaged"] {
        let shared = generate(&["--seed", "3", "--cache", cache, "--exit", "0.5", "--top-k", "9"]);
        // All but the prompt's last token stop where they exit.
        let [exit, loops] = ["mean_exit", "mean_loops"].map(|key| shared[key].as_f64().unwrap());
        let tokens = shared["tokens"].as_array().unwrap().len() as f64;
        assert!(loops >= exit && loops - exit <= 1.0 / tokens && cached(&shared) > 0, "{shared}");
    }
    let early = generate(&["--exit", "0"]);
    assert_eq!((&early["mean_exit"], &early["mean_loops"]), (&1.0.into(), &2.0.into()));
    // Where no special token comes, the text is the same whether it is streamed or not.
    let stream = ["generate", "--checkpoint", "file://store/runs/small", "--prompt", "fn "];
    let stream = scratch.run(&[&stream[..], &["--tokens", "30", "--seed", "3"]].concat());
    assert_eq!(stream.stdout, format!("fn {}\n", full["text"].as_str().unwrap()), "{stream:?}");
    assert!(stream.stderr.contains("bytes of keys and values"), "{stream:?}");
    let answer = generate(&["--chat", "--system", "Be brief.", "--stop", "a"]);
    assert!(answer["prompt_tokens"].as_u64().unwrap() > 12, "{answer}");
    let stop = ["generate", "--from", "out", "--prompt", "x", "--stop", "no such token"];
    scratch.run(&stop).fails(1, &["no such token"]);

    let import = ["import", "--from", "out", "--to", "file://store/models/begin"];
    let imported = scratch.run(&import);
    assert_eq!(field(&imported, "weights"), end.field("weights"), "to the bit");
    scratch.run(&import).fails(1, &["a model `begin`", "another name"]);

    // From there on any number of workers comes to the same weights.
    add_to_spec(&scratch, &imported, "second");
    let second = scratch.train(&["--workers", "1"]).done();
    let lines = |run: &str| {
        let log = fs::read_to_string(
            fs::read_dir(scratch.path(&format!("store/runs/{run}/metrics")))
                .unwrap()
                .next()
                .unwrap()
                .unwrap()
                .path(),
        );
        let first = log.unwrap().lines().next().unwrap().to_owned();
        serde_json::from_str::<Value>(&first).unwrap()
    };
    let loss = |run: &str| lines(run)["loss_per_loop"][0].as_f64().unwrap();
    assert!(loss("second") < loss("small") - 0.5, "it goes on from what was learnt");
    let third = scratch.train(&["--workers", "3", "--set", "run.name=third"]).done();
    assert_eq!(third.field("weights"), second.field("weights"));
    assert_ne!(second.field("weights"), end.field("weights"));

    let refused = |key: &str| scratch.train(&["--set", "run.name=fourth", "--set", key]);
    let other = format!("initial.weights=blake3:{}", "0".repeat(64));
    refused(&other).fails(1, &["initial.weights", "models/begin", "import printed"]);
    refused("initial.model=none").fails(1, &["initial.model", "models/none", "looptrain import"]);
    refused("model.intermediate_size=32").fails(1, &["[64, 24]", "[32, 24]", "[model]"]);
    refused("model.num_hidden_layers=1").fails(1, &["[model]", "models/begin"]);
    // A run that is under way needs it no more.
    fs::remove_dir_all(scratch.path("store/models")).unwrap();
    scratch.train(&["--set", "run.name=third"]).done();
}

#[test]
fn layers_are_repeated_in_both_orders_and_trained_on() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1", "--until", "5"]).stopped();
    let from = "file://store/runs/small";
    let saved = scratch.path("store/runs/small/checkpoints/step-0000000005");
    let old = tensors(&saved.join("state-0000-of-0001.safetensors"));
    let mut digests = Vec::new();
    for (order, layers) in [("block", [0, 1, 0, 1]), ("interleave", [0, 0, 1, 1])] {
        let to = format!("file://store/models/{order}");
        let upcycle = ["upcycle", "--from", from, "--layers", "4", "--order", order, "--to", &to];
        let end = scratch.run(&upcycle);
        digests.push(field(&end, "weights"));
        let path = format!("store/models/{order}/checkpoints/step-0000000000");
        let new = tensors(&scratch.path(&path).join("state-0000-of-0001.safetensors"));
        assert_eq!(new.len(), 11 * 4 + 5);
        for (name, bytes) in &new {
            let source = match name.strip_prefix("model.layers.") {
                None => name.clone(),
                Some(rest) => {
                    let (layer, rest) = rest.split_once('.').unwrap();
                    format!("model.layers.{}.{rest}", layers[layer.parse::<usize>().unwrap()])
                }
            };
            assert!(*bytes == old[&source], "{order}: {name} is not {source}");
        }
        if order == "interleave" {
            add_to_spec(&scratch, &end, "deeper");
        }
    }
    assert_ne!(digests[0], digests[1]);
    scratch.train(&["--workers", "2"]).done();
    let odd = ["upcycle", "--from", from, "--layers", "3", "--order", "block"];
    let odd = scratch.run(&[&odd[..], &["--to", "file://store/models/odd"]].concat());
    odd.fails(1, &["--layers 3", "2 layers"]);
}

#[test]
fn exercises_of_each_length_are_answered_that_training_has_not_seen() {
    let scratch = Scratch::new();
    let mano = ["data", "mano", "--max-operators", "2", "--exercises", "3000", "--validation"];
    let output = ["200", "--modulus", "7", "--output", "file://store/datasets/mano"];
    assert_eq!(scratch.run(&[&mano[..], &output].concat()).code, Some(0));
    // Two lengths, seven numbers, three operators and three words of their own.
    spec_for(&scratch, "mano", 15);
    let masked = ["--set", "stages.0.document_masking=true"];
    let train = ["--workers", "1", "--set", "sample.tokens=0"];
    let end = scratch.train(&[&train[..], &masked].concat()).done();
    let seeing = scratch.train(&[&train[..], &["--set", "run.name=seeing"]].concat()).done();
    assert_ne!(end.field("weights"), seeing.field("weights"), "documents saw each other");
    let eval = ["eval", "--checkpoint", "file://store/runs/small", "--mano", "25", "--json"];
    let found = json_of(&scratch.run(&eval));
    let mano = found["mano"].as_array().unwrap();
    let lengths: Vec<_> = mano.iter().map(|it| (&it["operators"], &it["exercises"])).collect();
    assert_eq!(lengths, [(&1.into(), &25.into()), (&2.into(), &25.into())]);
    let rate = |it: &Value| it["exact_match_per_loop"][1].as_f64().unwrap();
    assert!(mano.iter().all(|it| (0.0..=1.0).contains(&rate(it))), "{found}");

    let other = Scratch::new();
    other.train(&["--workers", "1", "--until", "1"]).stopped();
    other.run(&eval).fails(1, &["Mano"]);
}

#[test]
fn a_gate_is_trained_alone_by_any_number_of_workers_and_compared_at_equal_depth() {
    let scratch = Scratch::new();
    // A stage of three loops.
    scratch.train(&["--workers", "1", "--until", "8"]).stopped();
    let from = "file://store/runs/small/checkpoints/step-0000000008";
    let gate = ["gate", "--from", from, "--steps", "30", "--learning-rate", "0.05"];
    let gate = |more: &[&str]| scratch.run(&[&gate[..], &["--sequences", "20"], more].concat());
    let one = gate(&["--workers", "1", "--plot", "gate.svg"]).done();
    assert_eq!(one.field("run"), "small-gate");
    assert_eq!(one.stdout.lines().filter(|line| line.starts_with(' ')).count(), 9);
    assert!(fs::read_to_string(scratch.path("gate.svg")).unwrap().contains("after"));
    let two = gate(&["--workers", "2", "--run", "other"]).done();
    assert_eq!(two.field("weights"), one.field("weights"));

    let read = |run: &str, step: u64, parts: u64| {
        let place = format!("store/runs/{run}/checkpoints/step-{step:010}");
        let parts = (0..parts).map(|part| format!("state-{part:04}-of-{parts:04}.safetensors"));
        let parts = parts.map(|part| tensors(&scratch.path(&place).join(part)));
        parts.flatten().collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (read("small", 8, 1), read("other", 30, 2));
    for (name, bytes) in before.iter().filter(|(name, _)| !name.starts_with("optim.")) {
        let is_gate = name.starts_with("model.early_exit_gate.");
        assert_eq!(after[name] != *bytes, is_gate, "{name}");
    }
    let log =
        fs::read_to_string(scratch.path("store/runs/small-gate/metrics/steps-0000000001.jsonl"));
    let lines: Vec<Value> =
        log.unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert!(loss(lines.last().unwrap()) < loss(&lines[0]), "the gate learns");

    let again = gate(&["--json"]);
    let curves: Value = serde_json::from_str(&again.stdout).unwrap();
    let rows = curves["at_equal_depth"].as_array().unwrap();
    // All tokens at the same depth: no gate can differ there.
    for row in [&rows[0], rows.last().unwrap()] {
        assert_eq!(row["before"], row["after"], "{curves}");
    }
    scratch.train(&["--workers", "1"]).done();
    let newer = ["gate", "--from", "file://store/runs/small", "--steps", "30"];
    scratch.run(&newer).fails(1, &["small-gate", "other weights", "--fresh"]);
}
