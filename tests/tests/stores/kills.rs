//! A process that saves checkpoints is killed at a hundred moments, which a seed decides; after each
//! of them the next one goes on from what was saved last.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use futures::future::try_join_all;
use looptrain_proto::{Cursor, Digest, Generation, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Retention, Store, Tensor, weights_digest,
};
use tempfile::TempDir;

const KILLS: u64 = 100;
const PARTS: usize = 3;

/// Names the store, in the process that saves.
const SAVER: &str = "LOOPTRAIN_TEST_SAVER";

/// Old savers are dead when the next one starts.
const RETENTION: Retention = Retention { keep: 2, keep_every_steps: 0, grace: Duration::ZERO };

/// The state after a step.
fn state(step: Step) -> Vec<Tensor> {
    let tensor = |index: usize| Tensor {
        name: format!("layers.{index}.weight"),
        shape: vec![20_000],
        data: (0..20_000).map(|at| (step.0 as usize * 7 + index * 3 + at) as f32).collect(),
    };
    (0..PARTS).map(tensor).collect()
}

async fn save(checkpoints: &Checkpoints, step: Step) {
    let parts = state(step).into_iter().enumerate().map(|(part, tensor)| {
        checkpoints.save_part(step, part, PARTS, vec![tensor], BTreeMap::new())
    });
    let parts = try_join_all(parts).await.unwrap();
    let manifest = CheckpointManifest {
        version: CheckpointManifest::VERSION,
        run: "r".into(),
        step,
        cursor: Cursor { stage: 0, sequences: step.0 },
        trajectory: Digest::of(b"spec"),
        generation: Generation(1),
        weights_digest: weights_digest(state(step).iter().map(Tensor::view)),
        parts,
        trend: None,
    };
    checkpoints.commit(&manifest).await.unwrap();
    checkpoints.prune(&RETENTION, &[step]).await.unwrap();
}

/// The newest checkpoint, whose state is the right one.
async fn resume(checkpoints: &Checkpoints) -> Step {
    let Some((manifest, skipped)) = checkpoints.newest_good().await.unwrap() else {
        return Step(0);
    };
    assert!(skipped.is_empty(), "what has a manifest is whole: {skipped:?}");
    let (_, tensors) = checkpoints.load(manifest.step).await.unwrap();
    assert!(tensors == state(manifest.step), "the state of step {}", manifest.step);
    manifest.step
}

/// Not a test of its own: what the killed process does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is started, and killed, by the test beside it"]
async fn saver() {
    let Ok(url) = std::env::var(SAVER) else { return };
    let checkpoints = Checkpoints::new(&Store::open(&url).unwrap(), "r");
    let mut step = resume(&checkpoints).await;
    println!("resumed {step}");
    loop {
        step = step.next();
        save(&checkpoints, step).await;
        println!("saved {step}");
    }
}

/// Starts a saver and kills it so many microseconds after it has begun to save, or has saved once;
/// where it began.
fn killed_after(url: &str, microseconds: u64, saved_once: bool) -> Step {
    let mut saver = Command::new(std::env::current_exe().unwrap())
        .args(["kills::saver", "--exact", "--ignored", "--nocapture"])
        .env(SAVER, url)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(saver.stdout.take().unwrap()).lines();
    let mut after = |word| lines.find_map(|line| line.unwrap().split_once(word)?.1.parse().ok());
    let resumed = after("resumed ");
    if saved_once {
        after("saved ").expect("it saves");
    }
    std::thread::sleep(Duration::from_micros(microseconds));
    saver.kill().unwrap();
    assert_eq!(saver.wait().unwrap().code(), None, "it was at work until it was killed");
    Step(resumed.expect("a saver starts, whatever the one before has left"))
}

#[test]
fn after_each_of_100_kills_in_the_middle_of_saving_the_next_process_goes_on_from_what_was_saved() {
    let directory = TempDir::new().unwrap();
    let url = format!("file://{}", directory.path().display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = Store::open(&url).unwrap();
    let checkpoints = Checkpoints::new(&store, "r");
    let begin = std::time::Instant::now();
    runtime.block_on(save(&checkpoints, Step(1)));
    // Two or three saves long, on whatever disk.
    let longest = (begin.elapsed().as_micros() as u64 * 3).max(60_000);
    let (mut newest, mut seed, mut torn) = (Step(1), 20_261_125_u64, 0);
    for kill in 0..KILLS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // On a disk that has become slow, too, the run gets somewhere.
        let resumed = killed_after(&url, (seed >> 33) % longest, kill % 4 == 3);
        assert_eq!(resumed, newest, "kill {kill}: nothing that was saved is lost");
        newest = runtime.block_on(resume(&checkpoints));
        assert!(newest >= resumed, "kill {kill}");
        // Parts without a manifest, or files that were being written.
        let stored = runtime.block_on(checkpoints.inventory()).unwrap();
        let half_written =
            directory.path().join(format!("runs/r/checkpoints/step-{:010}", newest.next().0));
        torn += u64::from(stored.iter().any(|it| it.manifest.is_none()) || half_written.is_dir());
    }
    assert!(newest.0 > KILLS / 4, "savers get somewhere: {newest}");
    assert!(torn >= KILLS / 4, "only {torn} of {KILLS} kills hit a save in the middle");

    // What they have left is collected.
    runtime.block_on(async {
        save(&checkpoints, newest.next()).await;
        store.sweep("runs/r", Duration::ZERO).await.unwrap();
        let stored = checkpoints.inventory().await.unwrap();
        assert!(stored.len() == 2 && stored.iter().all(|it| it.complete), "{stored:?}");
        let plan = checkpoints.plan(&RETENTION, &[], SystemTime::now()).await.unwrap();
        assert!(plan.checkpoints.is_empty() && plan.orphans.is_empty(), "{plan:?}");
        let named = stored.iter().map(|it| it.files + 1).sum::<usize>();
        assert_eq!(store.list("runs/r").await.unwrap().len(), named);
    });
    let files = files_below(directory.path());
    assert_eq!(files, 2 * (PARTS + 1), "and nothing that is no object");
}

fn files_below(directory: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}
