//! Parsers of what lies in a store, for fuzzing; see `looptrain_proto::fuzzing`.

use std::sync::Arc;

use looptrain_proto::fuzzing::{MEMORY, Target};
use looptrain_proto::{Digest, Incarnation, Step};
use object_store::memory::InMemory;
use tokio::runtime::{Builder, Runtime};

use crate::audit::Attempt;
use crate::{
    Checkpoints, MetricsLog, Register, RunRecord, SlotUse, Store, read_audit, read_metrics,
    read_newest_metrics, read_record,
};
use crate::{checkpoint, dataset};

/// The targets of this crate.
#[must_use]
pub fn targets() -> Vec<Target> {
    let own = [
        Target { name: "record", run: record, samples: records, memory: MEMORY },
        Target { name: "metrics", run: metrics, samples: logs, memory: MEMORY },
        Target { name: "audit", run: audit, samples: uses, memory: MEMORY },
        Target { name: "keys", run: keys, samples: all_keys, memory: MEMORY },
    ];
    [&own[..], &checkpoint::fuzzing::TARGETS, &dataset::fuzzing::TARGETS].concat()
}

thread_local! {
    static RUNTIME: Runtime =
        Builder::new_current_thread().enable_all().build().expect("a runtime of one thread");
}

/// Waits for what a store does.
pub(crate) fn wait<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// What reads of stores run on.
pub(crate) fn handle() -> tokio::runtime::Handle {
    RUNTIME.with(|runtime| runtime.handle().clone())
}

/// An empty store in memory.
pub(crate) fn store() -> Store {
    Store::simulated(Arc::new(InMemory::new()), "memory://")
}

/// A store with these objects.
pub(crate) fn store_of<B: Into<bytes::Bytes>>(
    objects: impl IntoIterator<Item = (String, B)>,
) -> Store {
    let store = store();
    for (key, bytes) in objects {
        wait(store.put(&key, bytes)).expect("a store in memory takes everything");
    }
    store
}

fn record_key(number: u64) -> String {
    format!("runs/r/record/{number:020}.json")
}

/// The record of a run, which a coordinator takes over.
fn record(bytes: &[u8]) -> bool {
    let store = store_of([(record_key(7), bytes.to_vec())]);
    let read = wait(read_record(&store, "r"));
    let claimed = wait(Register::claim(&store, "r", |newest| {
        newest.cloned().ok_or_else(|| "it is gone".to_owned())
    }));
    let (Ok(Some(read)), Ok(mut register)) = (read, claimed) else { return false };
    assert!(register.incarnation() > read.incarnation);
    let _ = read.check_datasets(&[("text".to_owned(), Digest::of(b"a"))]);
    wait(register.update(|record| record.last_checkpoint = Some(Step(3)))).expect("it is ours");
    true
}

fn records() -> Vec<Vec<u8>> {
    let store = store();
    let fresh = RunRecord::new(
        Digest::of(b"spec"),
        "[run]\nname = \"r\"\n".into(),
        &[("text".to_owned(), Digest::of(b"a"))],
    );
    let mut register = wait(Register::claim(&store, "r", |_| Ok(fresh.clone()))).expect("claimed");
    let finished =
        crate::Finished { step: Step(9), weights_digest: Digest::of(b"weights"), loss: 3.5 };
    let change = |record: &mut RunRecord| {
        (record.numerics, record.last_checkpoint) = (Some("avx2".into()), Some(Step(8)));
        record.finished = Some(finished);
    };
    wait(register.update(change)).expect("it is ours");
    (1..=2).map(|number| wait(store.get(&record_key(number))).expect("written").to_vec()).collect()
}

/// A segment of the metrics log, which a coordinator goes on with.
fn metrics(bytes: &[u8]) -> bool {
    let key = |first: u64| format!("runs/r/metrics/steps-{first:010}.jsonl");
    let next = b"{\"step\":6}\n".to_vec();
    let store = store_of([(key(1), bytes.to_vec()), (key(6), next)]);
    let all = wait(read_metrics(&store, "r")).expect("a line that is none is passed over");
    let newest = wait(read_newest_metrics(&store, "r", 2)).expect("as it is here");
    assert!(all.ends_with(&newest) && newest.len() <= 2);
    let mut log = wait(MetricsLog::open(&store, "r", Step(3))).expect("as it is here");
    log.append(&serde_json::json!({ "step": 4 })).expect("it has a step");
    wait(log.flush()).expect("a store in memory takes everything");
    all.len() > 1
}

fn logs() -> Vec<Vec<u8>> {
    let line =
        |step: u64| format!("{{\"step\":{step},\"generation\":1,\"world\":2,\"loss\":3.5}}\n");
    vec![(1..=5).map(line).collect::<String>().into_bytes(), b"{\"step\": 1}\n\n[]\n".to_vec()]
}

/// The lines of the audit of a step.
fn audit(bytes: &[u8]) -> bool {
    let (step, incarnation) = (Step(1), Incarnation(1));
    let attempt = Attempt {
        step,
        incarnation,
        generation: looptrain_proto::Generation(1),
        rank: looptrain_proto::Rank(0),
    };
    let line = b"{\"step\":1,\"generation\":1,\"world\":1}\n".to_vec();
    let store = store_of([
        (attempt.key("r"), bytes.to_vec()),
        ("runs/r/metrics/steps-0000000001.jsonl".to_owned(), line),
    ]);
    let Ok(used) = wait(read_audit(&store, "r", Step(0))) else { return false };
    assert_eq!((used.len(), used[0].step), (1, step));
    dataset::fuzzing::check_audit(&used)
}

fn uses() -> Vec<Vec<u8>> {
    let slots = dataset::fuzzing::first_step();
    let line = |slot: &SlotUse| serde_json::to_string(slot).expect("it has a JSON form") + "\n";
    vec![slots.iter().map(line).collect::<String>().into_bytes()]
}

/// The key of an object of a run, of which readers take numbers and names.
fn keys(bytes: &[u8]) -> bool {
    let Ok(key) = std::str::from_utf8(bytes) else { return false };
    let store = store();
    if wait(store.put(&format!("runs/r/{key}"), "{}")).is_err() {
        return false;
    }
    let _ = wait(read_record(&store, "r"));
    let _ = wait(Register::claim(&store, "r", |_| Err("it is only looked at".to_owned())));
    let _ = wait(read_audit(&store, "r", Step(0)));
    let _ = wait(read_metrics(&store, "r"));
    let _ = wait(read_newest_metrics(&store, "r", 5));
    let _ = wait(MetricsLog::open(&store, "r", Step(3)));
    let checkpoints = Checkpoints::new(&store, "r");
    let _ = wait(checkpoints.list());
    let _ = wait(checkpoints.inventory());
    let _ = wait(checkpoints.newest_good());
    checkpoint::fuzzing::prune(&checkpoints);
    true
}

fn all_keys() -> Vec<Vec<u8>> {
    [
        "record/00000000000000000007.json",
        "record/18446744073709551615.json",
        "metrics/steps-0000000001.jsonl",
        "metrics/steps-18446744073709551615.jsonl",
        "audit/step-0000000001/incarnation-1-generation-1-rank-0.jsonl",
        "checkpoints/step-0000000004/manifest.json",
        "checkpoints/step-18446744073709551615/manifest.json",
        "checkpoints/step-0000000004/state-0000-of-0002.safetensors",
        "checkpoints/step-0000000004/memory.binpb",
        "readers/step-0000000004-0123456789abcdef",
        "evaluations/step-0000000004.json",
        "chronicle.json",
    ]
    .map(|key| key.as_bytes().to_vec())
    .into()
}
