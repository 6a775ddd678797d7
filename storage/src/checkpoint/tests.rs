//! Checkpoints end to end, in memory.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use looptrain_proto::{Cursor, Digest, Generation, Step};

use std::time::{Duration, SystemTime};

use super::{CheckpointManifest, Checkpoints, Retention, Tensor, split_tensors, weights_digest};
use crate::{Error, Store};

/// The newest so many, and what dead writers left goes at once.
fn newest(keep: usize) -> Retention {
    Retention { keep, keep_every_steps: 0, grace: Duration::ZERO }
}

fn state(seed: f32) -> Vec<Tensor> {
    let tensor = |prefix: &str, layer: usize| Tensor {
        name: format!("{prefix}layers.{layer}.weight"),
        shape: vec![3, 4],
        data: (0..12).map(|i| seed + (layer * 100 + i) as f32).collect(),
    };
    let weights = (0..5).map(|layer| tensor("", layer));
    let first = (0..5).map(|layer| tensor(super::FIRST_MOMENT, layer));
    weights.chain(first).collect()
}

/// Saves `tensors` as `parts` ranks would, without committing.
async fn saved(
    checkpoints: &Checkpoints,
    step: u64,
    parts: usize,
    tensors: &[Tensor],
) -> CheckpointManifest {
    let sizes: Vec<u64> = tensors.iter().map(|tensor| 4 * tensor.data.len() as u64).collect();
    let mut entries = Vec::new();
    for (part, range) in split_tensors(&sizes, parts).into_iter().enumerate() {
        let metadata = BTreeMap::from([("step".to_owned(), step.to_string())]);
        let tensors = tensors[range].to_vec();
        let entry = checkpoints.save_part(Step(step), part, parts, tensors, metadata).await;
        entries.push(entry.unwrap());
    }
    CheckpointManifest {
        version: CheckpointManifest::VERSION,
        run: "r".into(),
        step: Step(step),
        cursor: Cursor { stage: 0, sequences: step * 12 },
        trajectory: Digest::of(b"spec"),
        generation: Generation(1),
        weights_digest: weights_digest(tensors.iter().map(Tensor::view)),
        parts: entries,
        trend: None,
    }
}

async fn committed(checkpoints: &Checkpoints, step: u64) -> CheckpointManifest {
    let manifest = saved(checkpoints, step, 3, &state(step as f32)).await;
    checkpoints.commit(&manifest).await.unwrap();
    manifest
}

fn fresh() -> (Store, Checkpoints) {
    let store = Store::open("memory://").unwrap();
    let checkpoints = Checkpoints::new(&store, "r");
    (store, checkpoints)
}

fn part(step: u64, part: usize) -> String {
    format!("runs/r/checkpoints/step-{step:010}/state-{part:04}-of-0003.safetensors")
}

async fn damage(store: &Store, key: &str) {
    let mut bytes = store.get(key).await.unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    store.put(key, bytes).await.unwrap();
}

#[tokio::test]
async fn any_number_of_parts_loads_to_the_same_state() {
    let mut expected = state(0.5);
    expected.sort_by(|a, b| a.name.cmp(&b.name));
    for parts in [1, 2, 3, 7, 20] {
        let (_, checkpoints) = fresh();
        let manifest = saved(&checkpoints, 10, parts, &state(0.5)).await;
        assert_eq!(manifest.parts.len(), parts);
        checkpoints.commit(&manifest).await.unwrap();
        let (read, tensors) = checkpoints.load(Step(10)).await.unwrap();
        assert_eq!(read, manifest);
        assert_eq!(tensors, expected);
    }
}

#[tokio::test]
async fn weights_are_read_one_after_another_and_damage_shows_at_the_end() {
    for parts in [1, 2, 7] {
        let (store, checkpoints) = fresh();
        let manifest = saved(&checkpoints, 10, parts, &state(0.5)).await;
        checkpoints.commit(&manifest).await.unwrap();
        let (_, tensors) = checkpoints.weights(Step(10)).await.unwrap();
        let (manifest, stored) = checkpoints.stored_weights(Step(10)).await.unwrap();
        let mut values = vec![Vec::new(); stored.len()];
        let mut take = |index: usize, bytes: &[u8]| {
            values[index].extend_from_slice(bytes);
            Ok::<(), Error>(())
        };
        checkpoints.read_weights(&manifest, &stored, &mut take).await.unwrap();
        for ((stored, values), tensor) in stored.iter().zip(&values).zip(&tensors) {
            assert_eq!((&stored.name, &stored.shape), (&tensor.name, &tensor.shape));
            assert_eq!(values[..], super::codec::little_endian(&tensor.data)[..]);
        }
        assert_eq!((stored.len(), tensors.len()), (5, 5));

        // The weights come before the moments in the order of names: this is one of them.
        let key = checkpoints.part_key(Step(10), &manifest.parts[0].file);
        let mut bytes = store.get(&key).await.unwrap().to_vec();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header] ^= 1;
        store.put(&key, bytes).await.unwrap();
        let (manifest, stored) = checkpoints.stored_weights(Step(10)).await.unwrap();
        let read = checkpoints.read_weights(&manifest, &stored, |_, _| Ok::<(), Error>(())).await;
        let error = read.unwrap_err().to_string();
        assert!(error.contains("step-0000000010") && error.contains("weights of its"), "{error}");
        store.put(&key, "no part").await.unwrap();
        let error = checkpoints.stored_weights(Step(10)).await.unwrap_err().to_string();
        assert!(error.contains(&manifest.parts[0].file), "{error}");
    }
}

#[tokio::test]
async fn a_checkpoint_is_there_once_its_manifest_is() {
    let (_, checkpoints) = fresh();
    committed(&checkpoints, 20).await;
    committed(&checkpoints, 3).await;
    let manifest = saved(&checkpoints, 100, 2, &state(1.0)).await;
    assert_eq!(checkpoints.list().await.unwrap(), [Step(3), Step(20)]);
    assert!(matches!(checkpoints.load(Step(100)).await, Err(Error::NotFound { .. })));
    checkpoints.commit(&manifest).await.unwrap();
    assert_eq!(checkpoints.list().await.unwrap(), [Step(3), Step(20), Step(100)]);
}

#[tokio::test]
async fn the_newest_one_that_verifies_is_chosen_and_the_others_are_explained() {
    let (store, checkpoints) = fresh();
    assert_eq!(checkpoints.newest_good().await.unwrap(), None);
    let good = committed(&checkpoints, 10).await;
    committed(&checkpoints, 20).await;
    committed(&checkpoints, 30).await;
    committed(&checkpoints, 40).await;
    damage(&store, &part(20, 1)).await;
    store.delete(&part(30, 2)).await.unwrap();
    store.put(&part(40, 0), "short").await.unwrap();

    let (manifest, skipped) = checkpoints.newest_good().await.unwrap().unwrap();
    assert_eq!(manifest, good);
    let steps: Vec<u64> = skipped.iter().map(|skipped| skipped.step.0).collect();
    assert_eq!(steps, [40, 30, 20]);
    for (skipped, (key, said)) in skipped.iter().zip([
        (part(40, 0), "it has 5 bytes"),
        (part(30, 2), "does not exist"),
        (part(20, 1), "is damaged"),
    ]) {
        assert!(skipped.reason.contains(&key) && skipped.reason.contains(said), "{skipped:?}");
        assert!(!skipped.reason.contains('\n'));
    }
}

#[tokio::test]
async fn a_manifest_that_names_more_bytes_than_there_can_be_is_passed_over() {
    let (store, checkpoints) = fresh();
    let good = committed(&checkpoints, 10).await;
    let mut odd = committed(&checkpoints, 20).await;
    odd.parts[0].bytes = u64::MAX;
    let key = "runs/r/checkpoints/step-0000000020/manifest.json";
    store.put(key, serde_json::to_vec(&odd).unwrap()).await.unwrap();
    let (manifest, skipped) = checkpoints.newest_good().await.unwrap().unwrap();
    assert_eq!(manifest, good);
    assert!(skipped[0].reason.contains("the manifest says 18446744073709551615"), "{skipped:?}");
}

#[tokio::test]
async fn when_no_checkpoint_is_good_a_person_decides() {
    let (store, checkpoints) = fresh();
    for step in [10, 20] {
        committed(&checkpoints, step).await;
        damage(&store, &part(step, 0)).await;
    }
    let error = checkpoints.newest_good().await.unwrap_err();
    assert!(matches!(error, Error::NoGoodCheckpoint { step: Step(20), count: 2, .. }), "{error}");
    assert!(error.to_string().contains("--fresh"), "{error}");
}

#[tokio::test]
async fn a_load_names_the_damaged_part() {
    let (store, checkpoints) = fresh();
    committed(&checkpoints, 10).await;
    damage(&store, &part(10, 2)).await;
    let error = checkpoints.load(Step(10)).await.unwrap_err().to_string();
    assert!(error.contains(&part(10, 2)), "{error}");
}

#[tokio::test]
async fn a_tensor_in_two_parts_is_refused() {
    let (_, checkpoints) = fresh();
    let mut manifest = saved(&checkpoints, 10, 2, &state(0.0)).await;
    let tensors = state(0.0)[3..].to_vec();
    let again = checkpoints.save_part(Step(10), 1, 2, tensors, BTreeMap::new()).await;
    manifest.parts[1] = again.unwrap();
    checkpoints.commit(&manifest).await.unwrap();
    for error in [
        checkpoints.load(Step(10)).await.unwrap_err().to_string(),
        checkpoints.verify(Step(10)).await.unwrap_err().to_string(),
        checkpoints.weights(Step(10)).await.unwrap_err().to_string(),
    ] {
        assert!(error.contains("is in two parts"), "{error}");
    }
}

#[tokio::test]
async fn parts_of_other_weights_than_the_manifest_says_are_refused() {
    let (_, checkpoints) = fresh();
    let mut manifest = saved(&checkpoints, 10, 2, &state(0.0)).await;
    manifest.weights_digest = Digest::of(b"others");
    checkpoints.commit(&manifest).await.unwrap();
    for error in [
        checkpoints.load(Step(10)).await.unwrap_err().to_string(),
        checkpoints.verify(Step(10)).await.unwrap_err().to_string(),
    ] {
        assert!(error.contains("manifest.json") && error.contains("weights"), "{error}");
    }
}

#[tokio::test]
async fn parts_that_are_missing_or_of_another_size_make_no_checkpoint() {
    let (store, checkpoints) = fresh();
    for (step, fault) in [(10, "does not exist"), (20, "it has 4 bytes")] {
        let manifest = saved(&checkpoints, step, 3, &state(0.0)).await;
        match step {
            10 => store.delete(&part(step, 1)).await.unwrap(),
            _ => store.put(&part(step, 1), "torn").await.unwrap(),
        }
        let error = checkpoints.commit(&manifest).await.unwrap_err().to_string();
        assert!(error.contains(&part(step, 1)) && error.contains(fault), "{error}");
    }
    assert!(checkpoints.list().await.unwrap().is_empty());
}

#[test]
fn a_part_is_encoded_off_the_async_thread() {
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build();
    runtime.unwrap().block_on(async {
        let (_, checkpoints) = fresh();
        // The only thread for such work is busy, so nothing can be found wrong with the part yet.
        let (free, busy) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || busy.recv());
        let wrong = Tensor { data: Vec::new(), ..state(0.0).remove(0) };
        let save = checkpoints.save_part(Step(1), 0, 1, vec![wrong], BTreeMap::new());
        let mut save = std::pin::pin!(save);
        assert!(futures::poll!(&mut save).is_pending());
        free.send(()).unwrap();
        assert!(matches!(save.await, Err(Error::Malformed { .. })));
    });
}

#[tokio::test]
async fn the_same_weights_may_be_committed_again_and_heal_the_checkpoint() {
    let (store, checkpoints) = fresh();
    let first = committed(&checkpoints, 10).await;
    checkpoints.commit(&first).await.unwrap();
    damage(&store, &part(10, 1)).await;
    assert!(checkpoints.distrust(Step(10)));

    let mut again = saved(&checkpoints, 10, 2, &state(10.0)).await;
    again.generation = Generation(5);
    checkpoints.commit(&again).await.unwrap();
    assert!(checkpoints.damaged().is_empty());
    assert_eq!(checkpoints.load(Step(10)).await.unwrap().0, again);
}

#[tokio::test]
async fn other_weights_for_a_committed_step_are_a_conflict() {
    let (_, checkpoints) = fresh();
    let first = committed(&checkpoints, 10).await;
    let other = saved(&checkpoints, 10, 1, &state(11.0)).await;
    let error = checkpoints.commit(&other).await.unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    assert_eq!(checkpoints.load(Step(10)).await.unwrap().0, first);
}

#[tokio::test]
async fn a_manifest_of_another_run_or_version_is_refused() {
    let (store, checkpoints) = fresh();
    let mut manifest = committed(&checkpoints, 10).await;
    manifest.version = 9;
    let key = "runs/r/checkpoints/step-0000000010/manifest.json";
    store.put(key, serde_json::to_vec(&manifest).unwrap()).await.unwrap();
    let error = checkpoints.manifest(Step(10)).await.unwrap_err().to_string();
    assert!(error.contains(key) && error.contains("version 9"), "{error}");

    store.put(&key.replace("runs/r", "runs/q"), store.get(key).await.unwrap()).await.unwrap();
    manifest.version = CheckpointManifest::VERSION;
    store
        .put(&key.replace("runs/r", "runs/q"), serde_json::to_vec(&manifest).unwrap())
        .await
        .unwrap();
    let error = Checkpoints::new(&store, "q").manifest(Step(10)).await.unwrap_err().to_string();
    assert!(error.contains("of the run `r`"), "{error}");
}

#[tokio::test]
async fn pruning_keeps_the_newest_and_those_in_use() {
    let (store, checkpoints) = fresh();
    for step in [10, 20, 30, 40, 50] {
        committed(&checkpoints, step).await;
    }
    saved(&checkpoints, 60, 2, &state(1.0)).await;
    let removed = checkpoints.prune(&newest(2), &[Step(20)]).await.unwrap();
    assert_eq!(removed, [Step(10), Step(30)]);
    assert_eq!(checkpoints.list().await.unwrap(), [Step(20), Step(40), Step(50)]);
    assert!(store.list("runs/r/checkpoints/step-0000000010").await.unwrap().is_empty());
    let uncommitted = store.list("runs/r/checkpoints/step-0000000060").await.unwrap();
    assert_eq!(uncommitted.len(), 2, "a save under way is left alone");
    assert_eq!(checkpoints.prune(&newest(0), &[]).await.unwrap(), [Step(20), Step(40)]);
    checkpoints.load(Step(50)).await.unwrap();
}

#[tokio::test]
async fn pruning_removes_what_dead_writers_left_but_never_what_may_be_in_the_making() {
    let (store, checkpoints) = fresh();
    for step in [15, 25, 35, 45] {
        saved(&checkpoints, step, 2, &state(1.0)).await;
    }
    let left = async || {
        let objects = store.list("runs/r/checkpoints").await.unwrap();
        let steps = objects.iter().filter_map(|object| checkpoints.split_key(&object.key));
        let steps: std::collections::BTreeSet<u64> = steps.map(|(step, _)| step.0).collect();
        steps.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(checkpoints.prune(&newest(2), &[]).await.unwrap(), []);
    assert_eq!(left().await, [15, 25, 35, 45], "nothing is committed: any may be in the making");

    // A run that went on from 20, because 40 is damaged, and may be writing 25 or 35 now.
    committed(&checkpoints, 20).await;
    committed(&checkpoints, 40).await;
    assert_eq!(checkpoints.prune(&newest(2), &[Step(20)]).await.unwrap(), []);
    assert_eq!(left().await, [20, 25, 35, 40, 45]);

    assert_eq!(checkpoints.prune(&newest(2), &[]).await.unwrap(), []);
    assert_eq!(left().await, [20, 40, 45]);
}

#[tokio::test]
async fn pruning_never_removes_the_last_whole_checkpoint() {
    let (store, checkpoints) = fresh();
    for step in [10, 20, 30, 40] {
        committed(&checkpoints, step).await;
    }
    store.delete(&part(40, 1)).await.unwrap();
    store.put(&part(30, 1), "torn").await.unwrap();
    assert_eq!(checkpoints.prune(&newest(1), &[]).await.unwrap(), [Step(10), Step(30)]);
    assert_eq!(checkpoints.newest_good().await.unwrap().unwrap().0.step, Step(20));
}

#[tokio::test]
async fn every_mth_checkpoint_stays_for_good() {
    let (_, checkpoints) = fresh();
    for step in [10, 20, 30, 40, 50, 60] {
        committed(&checkpoints, step).await;
    }
    let retention = Retention { keep_every_steps: 20, ..newest(1) };
    assert_eq!(checkpoints.prune(&retention, &[]).await.unwrap(), [Step(10), Step(30), Step(50)]);
    assert_eq!(checkpoints.list().await.unwrap(), [Step(20), Step(40), Step(60)]);
}

#[tokio::test]
async fn the_newest_checkpoint_that_verifies_stays_though_newer_ones_are_as_large() {
    let (store, checkpoints) = fresh();
    for step in [10, 20, 30, 40] {
        committed(&checkpoints, step).await;
    }
    for step in [30, 40] {
        damage(&store, &part(step, 1)).await;
    }
    // 30 is no use to anybody; 20 is what the run would go back to.
    assert_eq!(checkpoints.prune(&newest(1), &[]).await.unwrap(), [Step(10), Step(30)]);
    assert_eq!(checkpoints.list().await.unwrap(), [Step(20), Step(40)]);
    assert_eq!(checkpoints.newest_good().await.unwrap().unwrap().0.step, Step(20));
}

#[tokio::test]
async fn a_checkpoint_that_is_read_stays_until_its_reader_lets_it_go() {
    let (store, checkpoints) = fresh();
    for step in [10, 20, 30] {
        committed(&checkpoints, step).await;
    }
    let hold = checkpoints.hold(Step(10)).await;
    assert_eq!(checkpoints.prune(&newest(1), &[]).await.unwrap(), [Step(20)]);
    // A reader that has not let go in so long is dead.
    let late = SystemTime::now() + Duration::from_secs(7 * 3600);
    let plan = checkpoints.plan(&newest(1), &[], late).await.unwrap();
    assert_eq!(plan.checkpoints, [Step(10)]);
    hold.release().await;
    assert_eq!(checkpoints.prune(&newest(1), &[]).await.unwrap(), [Step(10)]);
    assert!(store.list("runs/r/readers").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_checkpoint_that_a_reader_begins_with_after_the_plan_is_not_removed() {
    let (_, checkpoints) = fresh();
    for step in [10, 20, 30] {
        committed(&checkpoints, step).await;
    }
    let plan = checkpoints.plan(&newest(1), &[], SystemTime::now()).await.unwrap();
    assert_eq!(plan.checkpoints, [Step(10), Step(20)]);
    let hold = checkpoints.hold(Step(10)).await;
    assert_eq!(checkpoints.remove(&plan).await.unwrap(), [Step(20)]);
    checkpoints.load(Step(10)).await.unwrap();
    hold.release().await;
}

#[tokio::test]
async fn who_reads_the_newest_weights_lets_them_go_again() {
    let (store, checkpoints) = fresh();
    assert!(checkpoints.newest_weights().await.unwrap().is_none());
    for step in [10, 20] {
        committed(&checkpoints, step).await;
    }
    // The last part has moments alone, and the first one weights.
    damage(&store, &part(20, 2)).await;
    let ((manifest, tensors), skipped) = checkpoints.newest_weights().await.unwrap().unwrap();
    assert_eq!((manifest.step, skipped.len()), (Step(20), 0), "nobody reads moments");
    assert_eq!(tensors, state(20.0)[..5]);
    damage(&store, &part(20, 0)).await;
    let ((manifest, tensors), skipped) = checkpoints.newest_weights().await.unwrap().unwrap();
    assert_eq!((manifest.step, skipped[0].step), (Step(10), Step(20)));
    assert!(skipped[0].reason.contains("the weights of its parts are"), "{skipped:?}");
    assert_eq!(tensors, state(10.0)[..5]);
    assert!(store.list("runs/r/readers").await.unwrap().is_empty());
}

#[tokio::test]
async fn weights_are_read_without_moments_and_say_nothing_of_them() {
    let (store, checkpoints) = fresh();
    let mut tensors = state(0.5);
    tensors.insert(2, Tensor { name: "empty".into(), shape: vec![0, 7], data: Vec::new() });
    let manifest = saved(&checkpoints, 10, 3, &tensors).await;
    checkpoints.commit(&manifest).await.unwrap();
    tensors.retain(|tensor| super::digest::is_weight(&tensor.name));
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let (found, weights) = checkpoints.weights(Step(10)).await.unwrap();
    assert_eq!((found, weights), (manifest, tensors));
    assert_eq!(checkpoints.verified(), None, "a run could not go on from weights alone");

    store.put(&part(10, 2), "torn").await.unwrap();
    let error = checkpoints.weights(Step(10)).await.unwrap_err().to_string();
    assert!(error.contains(&part(10, 2)) && error.contains("it has 4 bytes"), "{error}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_says_nothing_of_a_checkpoint() {
    let (store, checkpoints) = fresh();
    for step in [10, 20] {
        committed(&checkpoints, step).await;
    }
    let silent = Checkpoints::new(&store.refusing(&part(20, 1)), "r");
    for error in
        [silent.newest_good().await.unwrap_err(), silent.prune(&newest(1), &[]).await.unwrap_err()]
    {
        let Error::Operation { operation: "look at", place, .. } = error else { panic!("{error}") };
        assert!(place.contains("step-0000000020/state-0001"), "{place}");
    }
    assert_eq!(checkpoints.list().await.unwrap(), [Step(10), Step(20)]);
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_the_fault_of_its_checkpoint() {
    let directory = tempfile::TempDir::new().unwrap();
    let store = Store::open(&format!("file://{}", directory.path().display())).unwrap();
    for step in [10, 20, 30] {
        committed(&Checkpoints::new(&store, "r"), step).await;
    }
    let checkpoints = Checkpoints::new(&store.refusing(&part(30, 1)), "r");
    let (manifest, skipped) = checkpoints.newest_good().await.unwrap().unwrap();
    assert_eq!((manifest.step, skipped[0].step), (Step(20), Step(30)));
    let pruner = Checkpoints::new(&store.refusing(&part(30, 1)), "r");
    assert_eq!(pruner.prune(&newest(1), &[]).await.unwrap(), [Step(10)]);
}

#[tokio::test]
async fn what_dead_writers_left_stays_for_a_grace_period() {
    let (store, checkpoints) = fresh();
    saved(&checkpoints, 15, 2, &state(1.0)).await;
    committed(&checkpoints, 20).await;
    // Of another try of the same step, in other parts.
    saved(&checkpoints, 20, 2, &state(20.0)).await;
    let retention = Retention { grace: Duration::from_secs(60), ..newest(1) };
    let now = SystemTime::now();
    let plan = checkpoints.plan(&retention, &[], now).await.unwrap();
    assert!(plan.orphans.is_empty() && plan.checkpoints.is_empty(), "{plan:?}");
    let later = now + Duration::from_secs(61);
    let plan = checkpoints.plan(&retention, &[], later).await.unwrap();
    let steps: Vec<u64> = plan.orphans.iter().map(|(step, _)| step.0).collect();
    assert_eq!((steps, &plan.checkpoints[..]), (vec![15, 15, 20, 20], &[][..]));
    checkpoints.remove(&plan).await.unwrap();
    assert_eq!(store.list("runs/r/checkpoints").await.unwrap().len(), 4);
    checkpoints.load(Step(20)).await.unwrap();
}

#[tokio::test]
async fn half_written_files_of_earlier_steps_go_with_what_is_old_and_newer_ones_stay() {
    let directory = tempfile::TempDir::new().unwrap();
    let store = Store::open(&format!("file://{}", directory.path().display())).unwrap();
    let checkpoints = Checkpoints::new(&store, "r");
    committed(&checkpoints, 20).await;
    let half_written = |step| directory.path().join(format!("{}#1", part(step, 0)));
    for step in [10, 20, 30] {
        std::fs::create_dir_all(half_written(step).parent().unwrap()).unwrap();
        std::fs::write(half_written(step), "half").unwrap();
    }
    let patient = Retention { grace: Duration::from_secs(3600), ..newest(1) };
    checkpoints.prune(&patient, &[]).await.unwrap();
    assert_eq!([10, 20, 30].map(|step| half_written(step).exists()), [true; 3]);
    checkpoints.prune(&newest(1), &[]).await.unwrap();
    assert_eq!([10, 20, 30].map(|step| half_written(step).exists()), [false, true, true]);
}

#[tokio::test]
async fn the_inventory_tells_whole_checkpoints_from_torn_and_unfinished_ones() {
    let (store, checkpoints) = fresh();
    committed(&checkpoints, 10).await;
    committed(&checkpoints, 20).await;
    store.put(&part(20, 1), "torn").await.unwrap();
    saved(&checkpoints, 30, 2, &state(1.0)).await;
    let stored = checkpoints.inventory().await.unwrap();
    let seen: Vec<(u64, usize, bool, bool)> = (stored.iter())
        .map(|it| (it.step.0, it.files, it.manifest.is_some(), it.complete))
        .collect();
    assert_eq!(seen, [(10, 3, true, true), (20, 3, true, false), (30, 2, false, false)]);
    assert!(stored[0].bytes > 480 && stored[1].bytes < stored[0].bytes, "{stored:?}");
}

#[tokio::test]
async fn a_checkpoint_that_a_listing_lacks_is_made_found_and_never_taken_for_an_orphan() {
    let (store, checkpoints) = fresh();
    committed(&checkpoints, 10).await;
    let fresh = crate::RunRecord::new(Digest::of(b"spec"), String::new(), &[]);
    let register = crate::Register::claim(&store, "r", |_| Ok(fresh.clone())).await;
    register.unwrap().update(|record| record.last_checkpoint = Some(Step(10))).await.unwrap();
    // Its listings lack all that was written in the last seconds.
    let stale = Checkpoints::new(&store.with_stale_lists(), "r");
    assert!(stale.list().await.unwrap().is_empty());
    let manifest = saved(&stale, 20, 3, &state(20.0)).await;
    stale.commit(&manifest).await.unwrap();
    let (found, skipped) = stale.newest_good().await.unwrap().unwrap();
    assert_eq!((found.step, skipped.len()), (Step(10), 0), "the one that the record names");
    assert_eq!(stale.prune(&newest(1), &[]).await.unwrap(), []);
    assert_eq!(checkpoints.list().await.unwrap(), [Step(10), Step(20)]);
}
