//! What operators' commands read that others wrote, for fuzzing; see `looptrain_proto::fuzzing`.

use std::path::PathBuf;

use looptrain_model::Layout;
use looptrain_proto::fuzzing::{MEMORY, Target};
use looptrain_proto::spec::Model;
use looptrain_proto::v1::StatusReply;
use prost::Message;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::commands;
use crate::folder::{ModelFolder, Tokens};
use crate::{npy, preemption};

/// The targets of this crate.
pub const TARGETS: [Target; 7] = [
    Target { name: "model_config", run: model_config, samples: configs, memory: MEMORY },
    Target { name: "model_tensors", run: model_tensors, samples: tensors, memory: 2 * MEMORY },
    Target { name: "model_index", run: model_index, samples: indices, memory: MEMORY },
    Target { name: "npy", run: npy, samples: tables, memory: MEMORY },
    Target { name: "preemption", run: preemption, samples: notices, memory: MEMORY },
    Target { name: "status", run: status, samples: replies, memory: MEMORY },
    Target { name: "plot", run: plot, samples: logs, memory: 2 * MEMORY },
];

/// A directory of this thread.
fn directory() -> PathBuf {
    thread_local! {
        static DIRECTORY: TempDir = tempfile::tempdir().expect("a temporary directory");
    }
    DIRECTORY.with(|directory| directory.path().to_owned())
}

// ---- folders of the Hugging Face kind ----------------------------------------------------------

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn config() -> Value {
    json!({
        "model_type": "ouro", "hidden_act": "silu", "tie_word_embeddings": false,
        "rope_scaling": null, "use_sliding_window": false, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        "intermediate_size": 12, "vocab_size": 16, "rms_norm_eps": 1e-6,
        "initializer_range": 0.02, "total_ut_steps": 4, "rope_theta": 1_000_000.0,
        "max_position_embeddings": 64, "layer_types": ["full_attention"], "eos_token_id": [0, 2],
    })
}

/// Its tensors as they lie in a file, in every kind of number.
fn file() -> Vec<u8> {
    let model = Model {
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        intermediate_size: 12,
        vocab_size: 16,
        rms_norm_eps: 1e-6,
        initializer_range: 0.02,
    };
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (tensor, dtype) in
        Layout::new(&model).tensors().iter().zip(["F32", "BF16", "F16"].iter().cycle())
    {
        let (begin, width) = (data.len(), if *dtype == "F32" { 4 } else { 2 });
        data.resize(begin + width * tensor.len, 0);
        let offsets = [begin, data.len()];
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": offsets });
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

/// Opens a folder of these files and reads all of it; whether it is a model.
fn folder(name: &str, files: &[(&str, &[u8])]) -> bool {
    let path = directory().join(name);
    std::fs::create_dir_all(&path).expect("a temporary directory is writable");
    for (file, bytes) in files {
        std::fs::write(path.join(file), bytes).expect("a temporary directory is writable");
    }
    let Ok(folder) = ModelFolder::open(&path) else { return false };
    let mut whole = true;
    for index in 0.. {
        // As many as there are.
        let Some(read) = folder.try_read(index) else { break };
        whole &= read.is_ok();
    }
    let _ = folder.tokenizer();
    whole
}

/// `config.json` beside the weights of a model.
fn model_config(bytes: &[u8]) -> bool {
    let _ = Tokens::find(bytes, 0);
    folder("config", &[("config.json", bytes), (ONE, &file())])
}

fn configs() -> Vec<Vec<u8>> {
    vec![config().to_string().into_bytes()]
}

/// Weights beside the `config.json` of a model.
fn model_tensors(bytes: &[u8]) -> bool {
    folder("tensors", &[("config.json", config().to_string().as_bytes()), (ONE, bytes)])
}

fn tensors() -> Vec<Vec<u8>> {
    vec![file()]
}

/// The index of weights that lie in several files.
fn model_index(bytes: &[u8]) -> bool {
    let config = config().to_string();
    let files = [("config.json", config.as_bytes()), ("a.safetensors", &file()), (INDEX, bytes)];
    folder("index", &files)
}

fn indices() -> Vec<Vec<u8>> {
    let map = json!({ "lm_head.weight": "a.safetensors", "model.norm.weight": "a.safetensors" });
    vec![json!({ "metadata": { "total_size": 7 }, "weight_map": map }).to_string().into_bytes()]
}

// ---- the rest ----------------------------------------------------------------------------------

/// A table of NumPy's.
fn npy(bytes: &[u8]) -> bool {
    let Ok(table) = npy::Table::parse(bytes) else { return false };
    assert_eq!(table.rows.checked_mul(table.columns), Some(table.values.len()));
    true
}

fn tables() -> Vec<Vec<u8>> {
    let table = |descr: &str, shape: &str, data: &[u8]| {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = u16::try_from(header.len()).expect("it is short").to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    };
    vec![table("<i8", "(2, 2)", &[1; 32]), table("|u1", "(3,)", &[1; 3])]
}

/// What metadata services say of a machine that is to go.
fn preemption(bytes: &[u8]) -> bool {
    let answer = String::from_utf8_lossy(bytes);
    preemption::any_notice(&answer)
}

fn notices() -> Vec<Vec<u8>> {
    let azure = r#"{"DocumentIncarnation":1,"Events":[{"EventId":"1","EventType":"Preempt",
        "ResourceType":"VirtualMachine","Resources":["machine"],"EventStatus":"Scheduled",
        "NotBefore":"Mon, 19 Sep 2016 18:29:47 GMT"}]}"#;
    vec![azure.as_bytes().to_vec(), b"TRUE\n".to_vec()]
}

/// What a coordinator answers, as `looptrain status` shows it.
fn status(bytes: &[u8]) -> bool {
    let Ok(reply) = StatusReply::decode(bytes) else { return false };
    assert!(commands::status::shown(reply).contains("phase"));
    true
}

fn replies() -> Vec<Vec<u8>> {
    let status = looptrain_proto::fuzzing::TARGETS.iter().find(|it| it.name == "status_reply");
    status.map_or_else(Vec::new, |target| (target.samples)())
}

/// The step log of a run, as `looptrain plot` draws it.
fn plot(bytes: &[u8]) -> bool {
    let lines = bytes.split(|&byte| byte == b'\n');
    let steps: Vec<Value> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    commands::plot::drawn(&directory().join("chart.svg"), &steps)
}

fn logs() -> Vec<Vec<u8>> {
    let line = |step: u64| {
        let (loss, exits) = ([4.0 / step as f64, 3.0], [0.25, 0.75]);
        json!({ "step": step, "loss_per_loop": loss, "exit_pdf": exits, "agreement_per_loop": exits })
            .to_string()
    };
    let lines: Vec<String> = (1..=6).map(line).collect();
    vec![lines.join("\n").into_bytes()]
}
