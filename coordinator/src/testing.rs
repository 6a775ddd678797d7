//! What the tests of several tasks need of a run's durable state.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use looptrain_proto::{Cursor, Digest, Generation, Spec, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Register, Retention, RunRecord, Store, Tensor, weights_digest,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::pruner::Pruner;

/// Takes over run `r`.
pub(crate) async fn claim(store: &Store) -> Register {
    let fresh = || RunRecord::new(Digest::of(b"spec"), String::new(), &[]);
    Register::claim(store, "r", |newest| Ok(newest.cloned().unwrap_or_else(fresh))).await.unwrap()
}

/// Ten steps of five slots, a checkpoint every four, an evaluation every five.
pub(crate) fn spec(overrides: &[&str]) -> Spec {
    let text = r#"
        [run]
        name = "rig"
        store = "memory://"
        [cluster]
        workers = 2
        worker_timeout = 3.0
        [model]
        hidden_size = 8
        num_hidden_layers = 1
        num_attention_heads = 2
        intermediate_size = 16
        vocab_size = 512
        [[datasets]]
        name = "text"
        [[stages]]
        name = "only"
        steps = 10
        sequence_length = 16
        slots = 5
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-3 }
        [checkpoint]
        every_steps = 4
        [evaluation]
        every_steps = 5
        sequences = 7
    "#;
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    Spec::parse("rig", text, &overrides).unwrap()
}

/// One that keeps the newest checkpoint.
pub(crate) fn pruner(
    checkpoints: &Checkpoints,
    register: &Register,
    newest: watch::Receiver<Option<Step>>,
) -> Pruner {
    let retention = Retention { keep: 1, keep_every_steps: 0, grace: Duration::ZERO };
    Pruner {
        checkpoints: checkpoints.clone(),
        retention,
        witness: register.witness(),
        newest,
        leave: CancellationToken::new(),
        board: std::sync::Arc::default(),
    }
}

/// The manifest of a checkpoint whose one part is in the store.
pub(crate) async fn saved(checkpoints: &Checkpoints, step: u64) -> CheckpointManifest {
    let tensor = Tensor { name: "w".into(), shape: vec![1], data: vec![step as f32] };
    let weights_digest = weights_digest([tensor.view()]);
    let step = Step(step);
    let part = checkpoints.save_part(step, 0, 1, vec![tensor], Default::default()).await.unwrap();
    CheckpointManifest {
        version: CheckpointManifest::VERSION,
        run: "r".into(),
        step,
        cursor: Cursor::default(),
        trajectory: Digest::of(b"spec"),
        generation: Generation(1),
        weights_digest,
        parts: vec![part],
        trend: None,
    }
}
