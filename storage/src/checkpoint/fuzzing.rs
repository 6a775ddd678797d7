//! Checkpoints of which a file is any bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::fuzzing::{MEMORY, Target};
use looptrain_proto::{Cursor, Digest, Generation, Step};

use super::{
    CheckpointManifest, Checkpoints, FIRST_MOMENT, PartEntry, Retention, Tensor, codec,
    weights_digest,
};
use crate::fuzzing::{store_of, wait};
use crate::{Error, Store};

pub(crate) const TARGETS: [Target; 2] = [
    Target { name: "checkpoint_manifest", run: manifest, samples: manifests, memory: MEMORY },
    Target { name: "checkpoint_part", run: part, samples: parts, memory: MEMORY },
];

const STEP: Step = Step(4);

fn tensors() -> Vec<Tensor> {
    let tensor = |name: &str, shape: &[usize]| Tensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        data: (0..shape.iter().product()).map(|value| value as f32 / 8.0).collect(),
    };
    let moment = format!("{FIRST_MOMENT}model.norm.weight");
    vec![
        tensor("lm_head.weight", &[3, 4]),
        tensor("model.norm.weight", &[4]),
        tensor(&moment, &[4]),
        tensor("scalar", &[]),
        tensor("nothing", &[0, 7]),
    ]
}

/// Two files with these tensors, as they are stored.
fn files() -> [Vec<u8>; 2] {
    let metadata = BTreeMap::from([("step".to_owned(), STEP.to_string())]);
    let all = tensors();
    let (first, second) = all.split_at(2);
    [first, second].map(|tensors| {
        let chunks = codec::encode(&tensors.to_vec().into(), &metadata).expect("shapes fit");
        chunks.concat()
    })
}

fn name(part: usize) -> String {
    format!("state-{part:04}-of-0002.safetensors")
}

fn key(file: &str) -> String {
    format!("runs/r/checkpoints/step-{:010}/{file}", STEP.0)
}

/// The manifest of these files, of which the parser says that they have so many tensors.
fn manifest_of(files: &[Vec<u8>]) -> CheckpointManifest {
    let decoded: Vec<Vec<Tensor>> =
        files.iter().map(|bytes| codec::decode(bytes).unwrap_or_default()).collect();
    let entry = |(part, bytes): (usize, &Vec<u8>)| PartEntry {
        file: name(part),
        bytes: bytes.len() as u64,
        digest: Digest::of(bytes),
        tensors: decoded[part].len() as u64,
    };
    CheckpointManifest {
        version: CheckpointManifest::VERSION,
        run: "r".into(),
        step: STEP,
        cursor: Cursor { stage: 0, sequences: 12 },
        trajectory: Digest::of(b"spec"),
        generation: Generation(2),
        weights_digest: weights_digest(decoded.iter().flatten().map(Tensor::view)),
        parts: files.iter().enumerate().map(entry).collect(),
        trend: None,
    }
}

fn stored(manifest: Vec<u8>, files: &[Vec<u8>]) -> Store {
    let parts = files.iter().cloned().enumerate().map(|(part, bytes)| (key(&name(part)), bytes));
    store_of(parts.chain([(key("manifest.json"), manifest)]))
}

/// Reads a checkpoint in every way there is; whether it is one.
fn read(store: &Store) -> bool {
    let checkpoints = Checkpoints::new(store, "r");
    let loaded = wait(checkpoints.load(STEP));
    let verified = wait(checkpoints.verify(STEP));
    assert_eq!(loaded.is_ok(), verified.is_ok());
    let inventory = wait(checkpoints.inventory()).expect("a store in memory is listed");
    assert_eq!(inventory.len(), 1);
    let newest = wait(checkpoints.newest_good());
    assert_eq!(newest.is_ok_and(|it| it.is_some()), loaded.is_ok());
    let whole = wait(checkpoints.weights(STEP));
    let weights = wait(checkpoints.stored_weights(STEP)).and_then(|(manifest, weights)| {
        let mut bytes = 0;
        let take = |_, piece: &[u8]| {
            bytes += piece.len();
            Ok(())
        };
        wait(checkpoints.read_weights::<Error>(&manifest, &weights, take)).map(|()| bytes)
    });
    assert_eq!(whole.is_ok(), weights.is_ok());
    if let Ok((_, tensors)) = &loaded {
        assert!(tensors.iter().all(|it| it.shape.iter().product::<usize>() == it.data.len()));
        let weights = weights.expect("what was loaded whole can be read in pieces");
        let all: usize = tensors.iter().map(|it| 4 * it.data.len()).sum();
        assert!(weights <= all);
    }
    if let Ok(manifest) = wait(checkpoints.manifest(STEP)) {
        let _ = wait(checkpoints.commit(&manifest));
    }
    prune(&checkpoints);
    loaded.is_ok()
}

/// Removes what is too much.
pub(crate) fn prune(checkpoints: &Checkpoints) {
    let retention = Retention { keep: 1, keep_every_steps: 0, grace: Duration::ZERO };
    let _ = wait(checkpoints.prune(&retention, &[]));
}

/// The manifest of a checkpoint whose parts are there.
fn manifest(bytes: &[u8]) -> bool {
    read(&stored(bytes.to_vec(), &files()))
}

fn manifests() -> Vec<Vec<u8>> {
    let manifest = manifest_of(&files());
    let pretty = serde_json::to_vec_pretty(&manifest).expect("it has a JSON form");
    vec![pretty, serde_json::to_vec(&manifest).expect("it has a JSON form")]
}

/// A part of a checkpoint whose manifest names it as it is.
fn part(bytes: &[u8]) -> bool {
    let [first, _] = files();
    let files = [first, bytes.to_vec()];
    let manifest = manifest_of(&files);
    let is_read = codec::decode(bytes).is_ok();
    read(&stored(serde_json::to_vec(&manifest).expect("it has a JSON form"), &files)) && is_read
}

fn parts() -> Vec<Vec<u8>> {
    let [_, second] = files();
    let other = vec![Tensor { name: "b".into(), shape: vec![2], data: vec![1.0, f32::NAN] }];
    let other = codec::encode(&other.into(), &BTreeMap::new()).expect("the shape fits");
    vec![second, other.concat()]
}
