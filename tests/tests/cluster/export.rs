//! `looptrain export`: a trained model as the folder that others load.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::support::Scratch;

/// Name, shape, kind and bytes of every tensor of a file.
fn tensors(file: &Path) -> BTreeMap<String, (Vec<usize>, Dtype, Vec<u8>)> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        (name.to_owned(), (view.shape().to_vec(), view.dtype(), view.data().to_vec()))
    });
    tensors.collect()
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

#[test]
fn a_checkpoint_becomes_a_folder_with_the_same_weights_to_the_bit_or_rounded() {
    let scratch = Scratch::new();
    let end = scratch.train(&["--workers", "2"]).done();
    let export = |more: &[&str]| {
        let checkpoint = ["export", "--checkpoint", "file://store/runs/small"];
        scratch.run(&[&checkpoint[..], more].concat())
    };
    let exact = export(&["--to", "exact", "--dtype", "f32"]);
    assert_eq!(exact.code, Some(0), "{exact:?}");
    assert_eq!((exact.field("weights"), exact.field("step")), (end.field("weights"), "14"));

    // What the checkpoint's parts hold, moments aside.
    let saved = scratch.path("store/runs/small/checkpoints/step-0000000014");
    let mut expected = BTreeMap::new();
    for part in ["state-0000-of-0002.safetensors", "state-0001-of-0002.safetensors"] {
        expected.extend(tensors(&saved.join(part)));
    }
    expected.retain(|name, _| !name.starts_with("optim."));
    let written = tensors(&scratch.path("exact/model.safetensors"));
    assert!(written == expected, "{:?}", written.keys());
    assert!(written.contains_key("model.early_exit_gate.bias") && written.len() == 11 * 2 + 5);

    let rounded = export(&["--to", "rounded"]);
    assert_eq!(rounded.code, Some(0), "{rounded:?}");
    for (name, (shape, dtype, bytes)) in tensors(&scratch.path("rounded/model.safetensors")) {
        assert_eq!((&shape, dtype), (&expected[&name].0, Dtype::BF16), "{name}");
        let exact =
            expected[&name].2.chunks_exact(4).map(|it| f32::from_le_bytes(it.try_into().unwrap()));
        for (word, exact) in bytes.chunks_exact(2).zip(exact) {
            let rounded = f32::from_bits(u32::from(u16::from_le_bytes([word[0], word[1]])) << 16);
            // Half of the last of eight bits.
            assert!((rounded - exact).abs() <= exact.abs() / 256.0, "{name}: {exact} to {rounded}");
        }
    }

    let config = json(&scratch.path("rounded/config.json"));
    assert_eq!(
        (&config["model_type"], &config["torch_dtype"]),
        (&"ouro".into(), &"bfloat16".into())
    );
    assert_eq!(json(&scratch.path("exact/config.json"))["torch_dtype"], "float32");
    let tokenizer = json(&scratch.path("rounded/tokenizer.json"));
    let end_of_text = json(&scratch.path("rounded/tokenizer_config.json"))["eos_token"].clone();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let entry = added.iter().find(|token| token["content"] == end_of_text).unwrap();
    assert_eq!(entry["id"], config["eos_token_id"]);
    for file in ["generation_config.json", "special_tokens_map.json"] {
        assert!(json(&scratch.path("rounded").join(file)).is_object());
    }
}

#[test]
fn what_cannot_be_exported_leaves_no_folder_and_says_why() {
    let scratch = Scratch::new();
    scratch.train(&["--workers", "1"]).done();
    let export =
        |checkpoint: &str| scratch.run(&["export", "--checkpoint", checkpoint, "--to", "out"]);
    export("file://store").fails(2, &["STORE/runs/NAME"]);
    export("file://store/runs/none").fails(1, &["`none`", "file://store"]);
    export("file://store/runs/small/checkpoints/step-0000000099").fails(1, &["step-0000000099"]);

    let part = scratch.path("store/runs/small/checkpoints/step-0000000014");
    let part = part.join("state-0000-of-0001.safetensors");
    let whole = fs::read(&part).unwrap();
    // The embedding comes late by its name; its values are in the middle of the file.
    let mut bytes = whole.clone();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + length + 4] ^= 1;
    fs::write(&part, &bytes).unwrap();
    export("file://store/runs/small").fails(1, &["step-0000000014", "weights of its parts"]);
    fs::write(&part, &whole[..whole.len() / 4]).unwrap();
    export("file://store/runs/small").fails(1, &["state-0000-of-0001.safetensors"]);
    let left: Vec<_> =
        fs::read_dir(scratch.path("")).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("out")), "{left:?}");

    fs::write(&part, &whole).unwrap();
    fs::create_dir(scratch.path("out")).unwrap();
    fs::write(scratch.path("out/mine"), "").unwrap();
    export("file://store/runs/small").fails(1, &["out is there already", "--to"]);
}
