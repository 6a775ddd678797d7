//! The begin of a run that goes on from a checkpoint of another one: that, the log of the steps up to it
//! and their evaluations are copied, so that the run stands by itself from then on.
//!
//! The checkpoint comes last. Interrupted before, the run has none, and begins again in the same way.

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::spec::Branch;
use looptrain_proto::{Spec, Step};
use looptrain_storage::{CheckpointManifest, Checkpoints, Register, Result, Store, copy_metrics};

use crate::error::CoordinatorError;
use crate::journal::{evaluation_key, evaluations_prefix};
use crate::records::EvaluationRecord;

/// Evaluations that are copied at a time.
const COPIERS: usize = 16;

/// The checkpoint that a spec's run branches off from; `None` of a run that does not.
///
/// # Errors
/// When there is no such checkpoint, or it has other weights than the spec says; the error says which there
/// are.
pub async fn find_branch(
    store: &Store,
    spec: &Spec,
) -> std::result::Result<Option<CheckpointManifest>, CoordinatorError> {
    let Some(Branch { run, step, weights, .. }) = &spec.branch else { return Ok(None) };
    let theirs = Checkpoints::new(store, run);
    let wrong = |key, reason| CoordinatorError::Branch { key, reason };
    let there = theirs.list().await?;
    if !there.contains(&Step(*step)) {
        let url = store.url();
        let steps: Vec<String> = there.iter().map(ToString::to_string).collect();
        return Err(match steps.is_empty() {
            true => wrong("run", format!("run `{run}` has no checkpoint in {url}")),
            false => {
                let steps = steps.join(", ");
                let reason = format!(
                    "run `{run}` in {url} has no checkpoint of step {step}; it has those of {steps}"
                );
                wrong("step", reason)
            }
        });
    }
    let manifest = theirs.manifest(Step(*step)).await?;
    if manifest.weights_digest != *weights {
        let reason = format!(
            "the checkpoint of step {step} of run `{run}` has {}, the spec says {weights}; take what \
             `looptrain checkpoint list` shows",
            manifest.weights_digest
        );
        return Err(wrong("weights", reason));
    }
    // In another stage the other run's count says nothing here.
    let (theirs, ours) = (manifest.cursor, spec.cursor_after(Step(*step)));
    if theirs.stage == ours.stage && theirs.sequences != ours.sequences {
        let (has, counts) = (theirs.sequences, ours.sequences);
        let reason = format!(
            "at step {step} run `{run}` had read {has} sequences of its stage, by this spec it would be \
             {counts}; write branch.sequences = {has}, as `looptrain branch` does"
        );
        return Err(wrong("sequences", reason));
    }
    Ok(Some(manifest))
}

/// Copies what the run of `spec` begins with, and gives the manifest of its first checkpoint.
///
/// # Errors
/// As [`find_branch`]; when the run has another coordinator meanwhile, or the store fails.
pub(crate) async fn begin(
    store: &Store,
    spec: &Spec,
    register: &Register,
) -> std::result::Result<Option<CheckpointManifest>, CoordinatorError> {
    let Some(Branch { run, step, .. }) = &spec.branch else { return Ok(None) };
    let source = Checkpoints::new(store, run);
    // Nobody removes it meanwhile.
    let hold = source.hold(Step(*step)).await;
    let begun = copy(store, spec, register, &source).await;
    hold.release().await;
    begun
}

async fn copy(
    store: &Store,
    spec: &Spec,
    register: &Register,
    source: &Checkpoints,
) -> std::result::Result<Option<CheckpointManifest>, CoordinatorError> {
    let Some(theirs) = find_branch(store, spec).await? else { return Ok(None) };
    let (run, step) = (&spec.run.name, theirs.step);
    let ours = CheckpointManifest {
        run: run.clone(),
        cursor: spec.cursor_after(step),
        trajectory: spec.trajectory_digest(),
        ..theirs.clone()
    };
    let copied = async {
        register.still_mine().await?;
        copy_metrics(store, &theirs.run, run, step).await?;
        register.still_mine().await?;
        copy_evaluations(store, &theirs.run, run, step).await?;
        register.still_mine().await?;
        Checkpoints::new(store, run).adopt(source, &theirs, &ours).await
    };
    copied.await.map_err(CoordinatorError::of_store)?;
    Ok(Some(ours))
}

/// Copies those up to `step`; what does not parse is left, for it is for people.
async fn copy_evaluations(store: &Store, from: &str, to: &str, step: Step) -> Result<()> {
    store.delete_prefix(&evaluations_prefix(to)).await?;
    let listed = store.list(&evaluations_prefix(from)).await?;
    let copies = listed.iter().map(|object| async move {
        let bytes = store.get(&object.key).await?;
        match serde_json::from_slice::<EvaluationRecord>(&bytes) {
            Ok(record) if record.step <= step => {
                store.put(&evaluation_key(to, record.step), bytes).await
            }
            _ => Ok(()),
        }
    });
    futures::stream::iter(copies).buffer_unordered(COPIERS).try_collect().await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::{Cursor, Digest};
    use looptrain_storage::{MetricsLog, RunRecord, read_metrics};

    use super::*;
    use crate::history::read_evaluation;
    use crate::records::example;
    use crate::testing::saved;

    fn spec(step: u64, weights: Digest) -> Spec {
        let overrides = [
            "run.name=b".to_owned(),
            format!(
                "branch={{ run = \"r\", step = {step}, weights = \"{weights}\", skip_steps = 2 }}"
            ),
        ];
        let text = crate::testing::spec(&[]).to_toml();
        Spec::parse("branch", &text, &overrides).unwrap()
    }

    /// Takes run `b` over.
    async fn claimed(store: &Store) -> Register {
        let fresh = || RunRecord::new(Digest::of(b"spec"), String::new(), &[]);
        let claim = |newest: Option<&RunRecord>| Ok(newest.cloned().unwrap_or_else(fresh));
        Register::claim(store, "b", claim).await.unwrap()
    }

    /// A store with a run `r` of eight steps, with checkpoints of two of them.
    async fn store() -> (Store, CheckpointManifest) {
        let store = Store::open("memory://").unwrap();
        let checkpoints = Checkpoints::new(&store, "r");
        let mut manifest = saved(&checkpoints, 4).await;
        manifest.cursor = crate::testing::spec(&[]).cursor_after(Step(4));
        manifest.trend = Some(looptrain_proto::v1::Trend { steps: 4, ..Default::default() });
        checkpoints.commit(&manifest).await.unwrap();
        checkpoints.commit(&saved(&checkpoints, 8).await).await.unwrap();
        let mut log = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        for step in 1..=8 {
            log.append(&example(step, step as f64)).unwrap();
            if step % 3 == 0 {
                log.seal().await.unwrap();
            }
        }
        log.seal().await.unwrap();
        for step in [2, 4, 6] {
            let record = EvaluationRecord::example(step);
            let key = evaluation_key("r", Step(step));
            store.put(&key, serde_json::to_vec(&record).unwrap()).await.unwrap();
        }
        (store, manifest)
    }

    #[tokio::test]
    async fn a_branch_begins_with_the_state_and_the_past_of_its_run_up_to_there() {
        let (store, manifest) = store().await;
        let spec = spec(4, manifest.weights_digest);
        // Of a try that was interrupted.
        let mut log = MetricsLog::open(&store, "b", Step(0)).await.unwrap();
        log.append(&example(7, 0.0)).unwrap();
        log.seal().await.unwrap();
        store.put(&evaluation_key("b", Step(7)), "{}").await.unwrap();

        let trajectory = spec.trajectory_digest();
        let register = claimed(&store).await;
        let ours = begin(&store, &spec, &register).await.unwrap().unwrap();
        assert_eq!((ours.run.as_str(), ours.step, ours.trend), ("b", Step(4), manifest.trend));
        assert_eq!((ours.trajectory, ours.cursor), (trajectory, spec.cursor_after(Step(4))));
        let mine = Checkpoints::new(&store, "b");
        assert_eq!(mine.verify(Step(4)).await.unwrap(), ours);
        assert_eq!(mine.list().await.unwrap(), [Step(4)]);
        let log = read_metrics(&store, "b").await.unwrap();
        let steps: Vec<u64> = log.iter().filter_map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        for (step, there) in [(2, true), (4, true), (6, false), (7, false)] {
            let read = read_evaluation(&store, "b", Step(step)).await.unwrap();
            assert_eq!(read.is_some(), there, "{step}");
        }
        // And stands by itself.
        store.delete_prefix("runs/r").await.unwrap();
        assert!(mine.load(Step(4)).await.is_ok());
    }

    #[tokio::test]
    async fn what_cannot_be_branched_off_from_is_told_with_what_there_is() {
        let (store, manifest) = store().await;
        let error = async |spec: &Spec| find_branch(&store, spec).await.unwrap_err().to_string();
        let told = error(&spec(5, manifest.weights_digest)).await;
        assert!(told.contains("branch.step") && told.contains("those of 4, 8"), "{told}");
        let told = error(&spec(4, Digest::of(b"other"))).await;
        assert!(told.contains("branch.weights") && told.contains("checkpoint list"), "{told}");
        let mut of_another = spec(4, manifest.weights_digest);
        of_another.branch.as_mut().unwrap().run = "q".into();
        let told = error(&of_another).await;
        assert!(told.contains("branch.run: run `q` has no checkpoint"), "{told}");

        // A damaged part is found before there is a checkpoint of it.
        let key = format!("runs/r/checkpoints/step-0000000004/{}", manifest.parts[0].file);
        let mut bytes = store.get(&key).await.unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        store.put(&key, bytes).await.unwrap();
        let spec = spec(4, manifest.weights_digest);
        let register = claimed(&store).await;
        let begun = begin(&store, &spec, &register).await;
        assert!(begun.unwrap_err().to_string().contains(&key));
        assert!(Checkpoints::new(&store, "b").list().await.unwrap().is_empty());

        // Nor does one begin that has been replaced.
        let _newer = claimed(&store).await;
        let begun = begin(&store, &spec, &register).await;
        assert!(matches!(begun, Err(CoordinatorError::Fenced { .. })), "{begun:?}");
    }

    #[tokio::test]
    async fn a_branch_of_a_run_that_has_read_something_else_has_to_say_so() {
        let (store, manifest) = store().await;
        // It had read 13 sequences by step 8, where the spec's steps make up to 80.
        let checkpoints = Checkpoints::new(&store, "r");
        let mut odd = saved(&checkpoints, 9).await;
        odd.cursor = Cursor { stage: 0, sequences: 13 };
        checkpoints.commit(&odd).await.unwrap();
        let told = find_branch(&store, &spec(9, odd.weights_digest)).await.unwrap_err().to_string();
        assert!(told.contains("write branch.sequences = 13"), "{told}");
        let mut says_so = spec(9, odd.weights_digest);
        says_so.branch.as_mut().unwrap().sequences = Some(13);
        assert_eq!(find_branch(&store, &says_so).await.unwrap(), Some(odd));
        assert!(find_branch(&store, &spec(4, manifest.weights_digest)).await.is_ok());
    }
}
