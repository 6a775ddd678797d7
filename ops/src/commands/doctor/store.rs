//! Whether a run can rest on its store. What is written is deleted again, and so is a directory that was
//! made for it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::BinaryBytes;
use looptrain_proto::Spec;
use looptrain_storage::{Measured, Store};
use tokio::time::timeout;

use super::Finding;
use crate::plan::CHECKPOINT_BYTES;

/// How long the first answer may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// An object like a block of a dataset or a small part of a checkpoint.
const SAMPLE: usize = 1 << 20;

/// An answer that takes longer is from another continent, or from a store that is overloaded.
const SLOW_ANSWER: Duration = Duration::from_millis(300);

/// Bytes a second below which checkpoints take long.
const SLOW_BYTES: f64 = (4 << 20) as f64;

/// The store of the spec, or why there is none to look at.
pub(super) struct Opened {
    store: Result<Store, Finding>,
    /// Directories that were made by opening it, the innermost first.
    made: Vec<PathBuf>,
}

impl Opened {
    pub(super) fn of(spec: Option<&Spec>) -> Self {
        let Some(spec) = spec else {
            let why = Finding::not_checked("reached", "there is no spec that names it");
            return Self { store: Err(why), made: Vec::new() };
        };
        let url = &spec.run.store;
        let path = url.strip_prefix("file://").map(Path::new);
        let made = path.map(missing).unwrap_or_default();
        let remedy = "set run.store to a place that can be reached and written";
        let store = Store::open(url);
        let store = store.map_err(|error| Finding::problem("opened", error.to_string(), remedy));
        Self { store, made }
    }

    /// The store, where there is one that answers.
    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref().ok()
    }

    /// Whether it answers, takes objects as a run needs it, and how fast; and how far its clock is ahead.
    pub(super) async fn check(&mut self, spec: Option<&Spec>) -> (Vec<Finding>, Option<f64>) {
        let store = match &self.store {
            Ok(store) => store.clone(),
            Err(finding) => return (vec![finding.clone()], None),
        };
        let mut findings = vec![reached(&store).await];
        if findings[0].remedy.is_some() {
            // Everything else would wait for it, too.
            self.store = Err(findings[0].clone());
            return (findings, None);
        }
        if let Err(error) = store.check_writable().await {
            findings.push(Finding::error("conditional writes", &error));
            return (findings, None);
        }
        let told = "objects can be written, of 16 that race for one a single one wins, and deleted";
        findings.push(Finding::well("conditional writes", told));
        match store.measure(SAMPLE).await {
            Err(error) => {
                findings.push(Finding::error("speed", &error));
                (findings, None)
            }
            Ok(measured) => {
                let parameters = spec.map_or(0, |spec| spec.model.parameters());
                findings.push(speed(&measured, CHECKPOINT_BYTES * parameters));
                (findings, Some(measured.clock_ahead))
            }
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        for directory in &self.made {
            // One that is not empty was not made for nothing.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// The directory and those above it that are not there, the innermost first.
fn missing(path: &Path) -> Vec<PathBuf> {
    path.ancestors().take_while(|above| !above.exists()).map(Path::to_owned).collect()
}

async fn reached(store: &Store) -> Finding {
    let remedy = match store.is_remote() {
        true => "check the endpoint, the region, the credentials and the way there",
        false => "check the path and its permissions",
    };
    match timeout(PATIENCE, store.check_reachable()).await {
        Ok(Ok(())) => Finding::well("reached", store.url()),
        Ok(Err(error)) => Finding::problem("reached", error.to_string(), remedy),
        Err(_) => {
            let found = format!("{} says nothing for {} s", store.url(), PATIENCE.as_secs());
            Finding::problem("reached", found, remedy)
        }
    }
}

/// What the times of a small object say.
fn speed(measured: &Measured, checkpoint: u64) -> Finding {
    let Measured { round_trip, bytes, write, read, .. } = *measured;
    let rate = |time: Duration| bytes as f64 / time.as_secs_f64().max(1e-6);
    let found = format!(
        "an answer in {:.1} ms; {} written at {}/s, read at {}/s",
        1000.0 * round_trip.as_secs_f64(),
        BinaryBytes(bytes as u64),
        BinaryBytes(rate(write) as u64),
        BinaryBytes(rate(read) as u64),
    );
    if round_trip > SLOW_ANSWER {
        let remedy = "use a store that is nearer, or less busy; steps do not wait for it, starts, joins \
                      and checkpoints do";
        return Finding::warning("speed", found, remedy);
    }
    if rate(write).min(rate(read)) < SLOW_BYTES {
        let seconds = checkpoint as f64 / rate(write);
        let remedy = format!(
            "checkpoints of {} would take {seconds:.0} s for one worker at that rate: use a faster \
             store, or make checkpoint.every_steps larger",
            BinaryBytes(checkpoint)
        );
        return Finding::warning("speed", found, &remedy);
    }
    Finding::well("speed", found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    fn measured(round_trip: u64, write: u64) -> Measured {
        let [round_trip, write] = [round_trip, write].map(Duration::from_millis);
        let read = Duration::from_millis(10);
        Measured { round_trip, bytes: 1 << 20, write, read, clock_ahead: 0.0 }
    }

    #[test]
    fn a_store_is_slow_to_answer_or_slow_to_take() {
        assert_eq!(speed(&measured(2, 10), 0).verdict, Verdict::Well);
        let far = speed(&measured(400, 500), 0);
        assert_eq!(far.verdict, Verdict::Warning);
        assert!(far.found.contains("in 400.0 ms"), "{far:?}");
        let slow = speed(&measured(20, 1000), 120 << 20);
        assert_eq!(slow.verdict, Verdict::Warning);
        assert!(slow.remedy.unwrap().contains("would take 120 s"));
    }

    #[tokio::test]
    async fn a_directory_that_was_not_there_is_not_there_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/store");
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/tiny.toml");
        let store = format!("run.store=file://{}", path.display());
        let spec = Spec::load(Path::new(example), &[store]).unwrap();
        let mut opened = Opened::of(Some(&spec));
        let (findings, clock) = opened.check(Some(&spec)).await;
        assert!(path.exists());
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Well), "{findings:?}");
        assert!(clock.is_some());
        drop(opened);
        assert!(!folder.path().join("deep").exists());
        std::fs::create_dir_all(&path).unwrap();
        drop(Opened::of(Some(&spec)));
        assert!(path.exists(), "it was there");
    }
}
