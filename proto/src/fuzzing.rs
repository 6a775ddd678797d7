//! What fuzzing and the tests with damaged bytes call: every parser of bytes that come from outside,
//! behind one signature. Each crate lists its own; `tests/fuzz/README.md` tells how to run them.

use std::fmt::Debug;

use prost::Message;

use crate::spec::operations_per_token;
use crate::{Spec, Step, v1};

/// A parser of bytes from outside.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called, in every list.
    pub name: &'static str,
    /// Takes any bytes, and says whether they were what it reads. Panics when it finds a fault.
    pub run: fn(&[u8]) -> bool,
    /// Bytes that it reads.
    pub samples: fn() -> Vec<Vec<u8>>,
    /// Bytes of memory that inputs of some KiB may take at most.
    pub memory: usize,
}

/// What most targets need at most.
pub const MEMORY: usize = 16 << 20;

/// The targets of this crate.
pub const TARGETS: [Target; 5] = [
    Target { name: "spec", run: spec, samples: specs, memory: MEMORY },
    Target { name: "worker_message", run: worker_message, samples: said, memory: MEMORY },
    Target { name: "coordinator_message", run: coordinator_message, samples: told, memory: MEMORY },
    Target { name: "status_reply", run: status_reply, samples: replies, memory: MEMORY },
    Target { name: "held", run: held, samples: memories, memory: MEMORY },
];

/// A run spec, as it comes in a file or in a Welcome.
fn spec(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(spec) = Spec::parse("a spec", text, &[]) else { return false };
    // As it travels to workers.
    let there = Spec::parse("the coordinator's spec", &spec.to_toml(), &[]);
    let there = there.expect("a spec that was read once is read again");
    assert_eq!(there.trajectory_digest(), spec.trajectory_digest());
    let total = spec.total_steps();
    assert_ne!(total, Step(0));
    assert!(spec.model.parameters() > 0);
    for step in [Step(0), Step(1), Step(total.0 / 2), total, total.next(), Step(u64::MAX)] {
        let inside = (1..=total.0).contains(&step.0);
        assert_eq!(spec.position(step).is_some(), inside, "step {step} of {total}");
        assert_eq!(spec.slots_of(step) > 0, inside);
        assert_eq!(spec.tokens_of(step) > 0, inside);
        assert!(spec.learning_rate(step).is_finite());
        assert!(spec.tokens_after(step) >= spec.tokens_of(step));
        assert!(spec.cursor_after(step).stage < spec.stages.len());
    }
    for (index, stage) in spec.stages.iter().enumerate() {
        let mixture = spec.mixture(index);
        assert!(!mixture.is_empty() && mixture.iter().all(|part| part.0 < spec.datasets.len()));
        assert!(operations_per_token(&spec.model, stage) > 0.0);
    }
    true
}

fn specs() -> Vec<Vec<u8>> {
    let tiny = include_str!("../../examples/tiny.toml");
    let large = include_str!("../../examples/ouro-1.4b.toml");
    let spec = Spec::parse("tiny", tiny, &[]).expect("the example is a spec");
    [tiny.to_owned(), large.to_owned(), spec.to_toml()].map(String::into_bytes).into()
}

/// Whether bytes are a message, which is then the same on a second way over the wire.
fn message<M: Message + Default + Debug>(bytes: &[u8]) -> bool {
    let Ok(message) = M::decode(bytes) else { return false };
    let wire = message.encode_to_vec();
    assert_eq!(wire.len(), message.encoded_len());
    // Floats that are no numbers are unequal to themselves.
    let again = M::decode(wire.as_slice()).expect("what was encoded can be decoded");
    assert_eq!(again.encode_to_vec(), wire);
    true
}

/// What a worker says.
fn worker_message(bytes: &[u8]) -> bool {
    message::<v1::WorkerMessage>(bytes)
}

/// What a coordinator says; among it the `Form` that is written by hand.
fn coordinator_message(bytes: &[u8]) -> bool {
    message::<v1::CoordinatorMessage>(bytes)
}

/// What a coordinator answers to `looptrain status`.
fn status_reply(bytes: &[u8]) -> bool {
    message::<v1::StatusReply>(bytes)
}

/// What a worker leaves beside a checkpoint.
fn held(bytes: &[u8]) -> bool {
    let Ok(held) = v1::Held::from_bytes(bytes) else { return false };
    assert!(v1::Held::from_bytes(&held.to_bytes()).is_ok());
    message::<v1::Held>(bytes)
}

fn vote() -> v1::Prepared {
    let statistics = v1::StepStatistics {
        loss: 3.5,
        loss_per_loop: vec![4.0, 3.0],
        exit_pdf: vec![0.5, 0.5],
        tokens: 512,
        ..v1::StepStatistics::default()
    };
    let sections = Some(v1::Sections { compute: 0.5, ..v1::Sections::default() });
    let (digest, detail) = (vec![7; 32], String::new());
    let statistics = Some(statistics);
    v1::Prepared { generation: 3, step: 5, digest, statistics, sections, computed_slots: 2, detail }
}

fn memory() -> v1::Held {
    let (recent, lineage) = (vec![vote(), vote()], vec![9; 32]);
    v1::Held { generation: 3, world: 2, step: 4, prepared: Some(5), recent, lineage }
}

fn memories() -> Vec<Vec<u8>> {
    vec![memory().to_bytes(), v1::Held { step: 4, ..v1::Held::default() }.to_bytes()]
}

fn said() -> Vec<Vec<u8>> {
    use v1::worker_message::Kind;
    let join = v1::Join {
        protocol_version: crate::PROTOCOL_VERSION,
        name: "w0".into(),
        peer_address: "127.0.0.1:7401".into(),
        numerics: "avx2".into(),
        held: Some(memory()),
        ..v1::Join::default()
    };
    let saved = v1::PartSaved {
        step: 4,
        parts: 2,
        file: "state-0000-of-0002.safetensors".into(),
        bytes: 1000,
        digest: vec![1; 32],
        weights_digest: vec![2; 32],
        tensors: 7,
        stall_seconds: 0.25,
        ..v1::PartSaved::default()
    };
    let kinds = [
        Kind::Join(join),
        Kind::Heartbeat(v1::Heartbeat {}),
        Kind::Ready(v1::Ready { generation: 3, step: 4, weights_digest: vec![1; 32] }),
        Kind::Prepared(vote()),
        Kind::Evaluated(v1::Evaluated {
            generation: 3,
            step: 5,
            sums: vec![1 << 33; 6],
            tokens: 9,
        }),
        Kind::PartSaved(saved),
        Kind::Failed(v1::Failed { detail: "no ring".into(), cause: 1, ..v1::Failed::default() }),
        Kind::Fetched(v1::Fetched { step: 4, error: String::new() }),
        Kind::Leaving(v1::Leaving { reason: "told to".into() }),
        Kind::Leave(v1::Leave { reason: "told to".into() }),
    ];
    kinds.map(|kind| v1::WorkerMessage { kind: Some(kind) }.encode_to_vec()).into()
}

fn told() -> Vec<Vec<u8>> {
    use v1::coordinator_message::Kind;
    let member = |index: u32| v1::Member {
        name: format!("w{index}"),
        peer_address: format!("127.0.0.1:{}", 7401 + index),
    };
    let members: Vec<v1::Member> = (0..3).map(member).collect();
    let tiny = String::from_utf8_lossy(&specs()[0]).into_owned();
    let welcome = v1::Welcome { spec: tiny, incarnation: 1, worker_id: 1, ..Default::default() };
    let members_of = members.clone().into();
    let form = v1::Form { generation: 3, members: members_of, rank: 1, step: 4, collective: 1 };
    let kinds = [
        Kind::Welcome(welcome),
        Kind::Refused(v1::Refused { reason: "no".into(), for_now: true }),
        Kind::Form(form),
        Kind::Plan(v1::Plan { generation: 3, step: 5, slot_begin: 1, slot_end: 3, trend: None }),
        Kind::Commit(v1::Commit { generation: 3, step: 5 }),
        Kind::Evaluate(v1::Evaluate { generation: 3, step: 5, begin: 0, end: 9 }),
        Kind::Save(v1::Save { generation: 3, step: 5, part: 1, parts: 2 }),
        Kind::Offer(v1::Offer { generation: 3, step: 5 }),
        Kind::Withdraw(v1::Withdraw { keep_updates: true }),
        Kind::Fetch(v1::Fetch { step: 5, sources: members }),
        Kind::Drain(v1::Drain { reason: "an operator asked for it".into() }),
        Kind::Finish(v1::Finish { reason: "done".into(), expelled: false }),
    ];
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let message =
        |kind| v1::CoordinatorMessage { traceparent: traceparent.into(), kind: Some(kind) };
    kinds.map(|kind| message(kind).encode_to_vec()).into()
}

fn replies() -> Vec<Vec<u8>> {
    let worker = v1::WorkerStatus { name: "w0".into(), rank: Some(0), ..Default::default() };
    let reply = v1::StatusReply {
        run: "r".into(),
        phase: "training".into(),
        workers: vec![worker.clone(), v1::WorkerStatus { rank: None, warm: true, ..worker }],
        statistics: vote().statistics,
        goodput: vec![v1::CategorySeconds { category: "productive".into(), seconds: 2.0 }],
        events: vec![v1::StatusEvent { text: "w0 joined".into(), ..Default::default() }],
        losses: vec![3.5, 3.25],
        ..v1::StatusReply::default()
    };
    vec![reply.encode_to_vec()]
}
