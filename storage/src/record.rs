//! The run record: what is true about a run when no process of it is alive.
//!
//! Records form a chain `runs/<run>/record/00000000000000000007.json`; the highest number is the
//! truth. A record is only ever added, with put-if-absent, by who has read the one before it; so of
//! two coordinators that write at the same time one wins and the other learns it.
//!
//! Fencing: [`Register::claim`] adds a record with the next incarnation. From then on every
//! [`Register::update`] of an older incarnation fails with [`Error::Fenced`], because the number it
//! would write is taken. Records are never removed, or that would stop being true.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use looptrain_proto::{Digest, Incarnation, Step};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Store, run_prefix};

/// One record of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The coordinator that wrote it; stamped by the register.
    pub incarnation: Incarnation,
    /// The coordinator that began the run, or began it anew; 0 in older records.
    #[serde(default)]
    pub begun: Incarnation,
    /// What decides the weights: `Spec::trajectory_digest`.
    pub trajectory: Digest,
    /// The spec of the last start, as TOML.
    pub spec: String,
    /// The datasets the run trains on, by name: [`crate::Dataset::digest`]. Empty in records that
    /// were written before datasets were pinned.
    #[serde(default)]
    pub datasets: BTreeMap<String, Digest>,
    /// What the workers' arithmetic depends on, pinned by the first ones.
    pub numerics: Option<String>,
    /// Why an operator has the run hold; it does so under later coordinators as well.
    #[serde(default)]
    pub paused: Option<String>,
    /// The newest committed checkpoint.
    pub last_checkpoint: Option<Step>,
    /// Set when the run has reached its last step.
    pub finished: Option<Finished>,
    /// When it was written, in milliseconds since 1970; stamped by the register.
    pub updated_unix_ms: u64,
    /// Tells records of two writers apart; stamped by the register.
    pub writer: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// The last step.
    pub step: Step,
    /// Digest of the weights after it.
    pub weights_digest: Digest,
    /// Training loss of the last step.
    pub loss: f64,
}

impl RunRecord {
    /// The record of a run that begins, on `datasets` (name, digest).
    #[must_use]
    pub fn new(trajectory: Digest, spec: String, datasets: &[(String, Digest)]) -> Self {
        Self {
            incarnation: Incarnation(0),
            begun: Incarnation(1),
            trajectory,
            spec,
            datasets: datasets.iter().cloned().collect(),
            numerics: None,
            paused: None,
            last_checkpoint: None,
            finished: None,
            updated_unix_ms: 0,
            writer: 0,
        }
    }

    /// Whether the datasets `given` (name, digest) are those of the record. What the record does
    /// not name is not compared: it is for the caller to pin.
    ///
    /// # Errors
    /// One line with the first dataset that is missing or has changed, and what to do.
    pub fn check_datasets(&self, given: &[(String, Digest)]) -> std::result::Result<(), String> {
        const REMEDY: &str =
            "restore it, or begin another run: under another run.name or with --fresh";
        for (name, recorded) in &self.datasets {
            match given.iter().find(|(given, _)| given == name) {
                Some((_, digest)) if digest == recorded => {}
                Some((_, digest)) => {
                    return Err(format!(
                        "dataset `{name}` is not the one that the run trains on: it is {digest}, the run began with {recorded}; {REMEDY}"
                    ));
                }
                None => {
                    return Err(format!(
                        "dataset `{name}`, which the run trains on, is not there; {REMEDY}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The right to write a run's record, until a higher incarnation takes it.
#[derive(Debug)]
pub struct Register {
    store: Store,
    run: String,
    number: u64,
    current: RunRecord,
}

impl Register {
    /// Takes the record of `run` over. `decide` sees the newest record, `None` at the first start,
    /// and gives the one to write or the reason not to; it is asked again when somebody else was
    /// faster.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason of `decide`; also when the store fails or the newest
    /// record cannot be read.
    pub async fn claim(
        store: &Store,
        run: &str,
        mut decide: impl FnMut(Option<&RunRecord>) -> std::result::Result<RunRecord, String>,
    ) -> Result<Self> {
        loop {
            let newest = newest(store, run).await?;
            let refused = |reason| Error::Refused { run: run.to_owned(), reason };
            let mut record = decide(newest.as_ref().map(|(_, record)| record)).map_err(refused)?;
            let (number, incarnation) = match &newest {
                Some((number, record)) => (number + 1, record.incarnation.next()),
                None => (1, Incarnation(1)),
            };
            record.incarnation = incarnation;
            record.writer = unique();
            if let Some(current) = add(store, run, number, record).await? {
                return Ok(Self { store: store.clone(), run: run.to_owned(), number, current });
            }
            tracing::debug!(run, number, "another coordinator was faster; reading again");
        }
    }

    /// The record as last written.
    #[must_use]
    pub fn current(&self) -> &RunRecord {
        &self.current
    }

    /// This coordinator's number.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.current.incarnation
    }

    /// Whether nobody else has written since: a read, for what has to be true before something is
    /// done that the record's own chain does not guard.
    ///
    /// # Errors
    /// As [`Register::update`].
    pub async fn still_mine(&self) -> Result<()> {
        self.witness().still_mine().await
    }

    /// A second pair of eyes, for another task of this coordinator.
    #[must_use]
    pub fn witness(&self) -> Witness {
        let (store, run) = (self.store.clone(), self.run.clone());
        Witness { store, run, next: self.number + 1, writer: self.current.writer }
    }

    /// Writes a changed record.
    ///
    /// # Errors
    /// [`Error::Fenced`] when a higher incarnation has written: this coordinator must stop. When
    /// the store fails the record is as before, and the update may be tried again.
    pub async fn update(&mut self, change: impl FnOnce(&mut RunRecord)) -> Result<()> {
        let mut record = self.current.clone();
        change(&mut record);
        record.incarnation = self.current.incarnation;
        record.writer = self.current.writer;
        let mut number = self.number + 1;
        loop {
            if let Some(written) = add(&self.store, &self.run, number, record.clone()).await? {
                (self.number, self.current) = (number, written);
                return Ok(());
            }
            // Taken. A write of our own may have gone through although its answer was an error, and
            // then been followed by this other one: go past it. All else is a newer incarnation.
            let there = read(&self.store, &self.run, number).await?;
            if there.writer != record.writer {
                return Err(Error::Fenced { run: self.run.clone(), by: there.incarnation });
            }
            number += 1;
        }
    }
}

/// Sees whether a coordinator has been replaced.
#[derive(Debug)]
pub struct Witness {
    store: Store,
    run: String,
    /// The first record that has not been seen.
    next: u64,
    writer: u64,
}

impl Witness {
    /// As [`Register::still_mine`].
    ///
    /// # Errors
    /// As [`Register::update`].
    pub async fn still_mine(&mut self) -> Result<()> {
        while let Some(there) = read_opt(&self.store, &self.run, self.next).await? {
            // The coordinator's own, or one whose answer was an error.
            if there.writer != self.writer {
                return Err(Error::Fenced { run: self.run.clone(), by: there.incarnation });
            }
            self.next += 1;
        }
        Ok(())
    }
}

/// The newest record of `run`; `None` when it was never started.
///
/// # Errors
/// When the store fails or the record cannot be read.
pub async fn read_record(store: &Store, run: &str) -> Result<Option<RunRecord>> {
    Ok(newest(store, run).await?.map(|(_, record)| record))
}

/// Neither records nor incarnations are counted so far.
const LAST: u64 = u64::MAX - 1;

fn key(run: &str, number: u64) -> String {
    format!("{}/record/{number:020}.json", run_prefix(run))
}

async fn newest(store: &Store, run: &str) -> Result<Option<(u64, RunRecord)>> {
    let objects = store.list(&format!("{}/record", run_prefix(run))).await?;
    let number = |key: &str| key.rsplit('/').next()?.strip_suffix(".json")?.parse::<u64>().ok();
    // A number that no record has a next one to was not written by any coordinator.
    let number = |key: &str| number(key).filter(|number| *number < LAST);
    let listed = objects.iter().filter_map(|object| number(&object.key)).max();
    let mut newest = match listed {
        Some(number) => Some((number, read(store, run, number).await?)),
        None => None,
    };
    // A listing may lack what was written a moment ago; a read does not.
    let mut next = listed.unwrap_or(0) + 1;
    while let Some(record) = read_opt(store, run, next).await? {
        newest = Some((next, record));
        next += 1;
    }
    Ok(newest)
}

async fn read(store: &Store, run: &str, number: u64) -> Result<RunRecord> {
    let missing = || Error::NotFound { place: store.place(&key(run, number)) };
    read_opt(store, run, number).await?.ok_or_else(missing)
}

async fn read_opt(store: &Store, run: &str, number: u64) -> Result<Option<RunRecord>> {
    let key = key(run, number);
    let Some(bytes) = store.get_opt(&key).await? else { return Ok(None) };
    let malformed = |reason: String| Error::Malformed { place: store.place(&key), reason };
    let record: RunRecord =
        serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    match record.incarnation.0 < LAST {
        true => Ok(Some(record)),
        // The next one would be below it, and fenced by all before.
        false => Err(malformed(format!("there is no incarnation after {}", record.incarnation))),
    }
}

/// Adds record `number`; `None` when somebody else's is there.
async fn add(
    store: &Store,
    run: &str,
    number: u64,
    mut record: RunRecord,
) -> Result<Option<RunRecord>> {
    record.updated_unix_ms = now_unix_ms();
    let key = key(run, number);
    let json = serde_json::to_vec_pretty(&record).map_err(|error| Error::Malformed {
        place: store.place(&key),
        reason: error.to_string(),
    })?;
    if store.put_if_absent(&key, json).await? || read(store, run, number).await? == record {
        // The second case: the write went through, its answer got lost, and the client's retry
        // found its own record in the way.
        return Ok(Some(record));
    }
    Ok(None)
}

fn now_unix_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// A number that no other writer has, on this machine or another.
pub(crate) fn unique() -> u64 {
    // The standard library seeds a new hasher from the system's random source.
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_u64(now_unix_ms());
    hasher.finish()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fresh() -> RunRecord {
        let datasets = [("text", b"a"), ("prose", b"b")];
        let datasets = datasets.map(|(name, bytes)| (name.to_owned(), Digest::of(bytes)));
        RunRecord::new(Digest::of(b"spec"), "[run]".into(), &datasets)
    }

    async fn claim(store: &Store) -> Register {
        Register::claim(store, "r", |newest| Ok(newest.cloned().unwrap_or_else(fresh)))
            .await
            .unwrap()
    }

    #[test]
    fn a_dataset_that_changed_or_is_gone_is_named_with_the_remedy() {
        let record = fresh();
        let mut given = [("text", b"a"), ("prose", b"b"), ("new", b"c")]
            .map(|(name, bytes)| (name.to_owned(), Digest::of(bytes)));
        assert_eq!(record.check_datasets(&given), Ok(()));
        given[1].1 = Digest::of(b"edited");
        let changed = record.check_datasets(&given).unwrap_err();
        let (is, was) = (Digest::of(b"edited").to_string(), Digest::of(b"b").to_string());
        for part in ["`prose`", &is, &was, "restore", "run.name", "--fresh"] {
            assert!(changed.contains(part), "`{part}` is missing in: {changed}");
        }
        let gone = record.check_datasets(&given[..1]).unwrap_err();
        assert!(gone.contains("`prose`") && gone.contains("not there"), "{gone}");
    }

    #[test]
    fn a_record_from_before_datasets_were_pinned_fits_any() {
        let mut json = serde_json::to_value(fresh()).unwrap();
        assert!(json.as_object_mut().unwrap().remove("datasets").is_some());
        let old: RunRecord = serde_json::from_value(json).unwrap();
        assert_eq!(old.check_datasets(&[("text".into(), Digest::of(b"other"))]), Ok(()));
    }

    #[tokio::test]
    async fn a_record_that_none_can_follow_is_refused_and_a_number_that_none_can_follow_is_no_record()
     {
        let store = Store::open("memory://").unwrap();
        let far = "runs/r/record/18446744073709551615.json";
        store.put(far, "{}").await.unwrap();
        assert_eq!(read_record(&store, "r").await.unwrap(), None);
        let last = RunRecord { incarnation: Incarnation(u64::MAX), ..fresh() };
        store.put(&key("r", 3), serde_json::to_vec(&last).unwrap()).await.unwrap();
        let error = read_record(&store, "r").await.unwrap_err().to_string();
        assert!(error.contains("no incarnation after"), "{error}");
    }

    #[tokio::test]
    async fn a_record_outlives_its_coordinator() {
        let store = Store::open("memory://").unwrap();
        assert_eq!(read_record(&store, "r").await.unwrap(), None);
        let mut first = claim(&store).await;
        assert_eq!(first.incarnation(), Incarnation(1));
        first.update(|record| record.numerics = Some("avx2".into())).await.unwrap();
        first.update(|record| record.last_checkpoint = Some(Step(100))).await.unwrap();
        assert_eq!(read_record(&store, "r").await.unwrap().as_ref(), Some(first.current()));

        let second = claim(&store).await;
        assert_eq!(second.incarnation(), Incarnation(2));
        assert_eq!(second.current().numerics.as_deref(), Some("avx2"));
        assert_eq!(second.current().last_checkpoint, Some(Step(100)));
        assert!(second.current().updated_unix_ms > 1_600_000_000_000);
    }

    #[tokio::test]
    async fn a_higher_incarnation_fences_a_lower_one() {
        let store = Store::open("memory://").unwrap();
        let mut first = claim(&store).await;
        first.still_mine().await.unwrap();
        let mut witness = first.witness();
        first.update(|record| record.last_checkpoint = None).await.unwrap();
        witness.still_mine().await.unwrap();
        let mut second = claim(&store).await;
        second.still_mine().await.unwrap();
        assert!(witness.still_mine().await.is_err());
        let error = first.still_mine().await.unwrap_err();
        assert!(matches!(&error, Error::Fenced { by: Incarnation(2), .. }), "{error}");
        let error =
            first.update(|record| record.last_checkpoint = Some(Step(1))).await.unwrap_err();
        assert!(matches!(&error, Error::Fenced { by: Incarnation(2), .. }), "{error}");
        assert_eq!(first.current().last_checkpoint, None);
        second.update(|record| record.last_checkpoint = Some(Step(2))).await.unwrap();
        let record = read_record(&store, "r").await.unwrap().unwrap();
        assert_eq!(record.last_checkpoint, Some(Step(2)));
    }

    #[tokio::test]
    async fn a_claim_that_is_declined_writes_nothing() {
        let store = Store::open("memory://").unwrap();
        claim(&store).await;
        let mut seen = None;
        let error = Register::claim(&store, "r", |newest| {
            seen = newest.cloned();
            Err("started with another spec".into())
        });
        assert_eq!(error.await.unwrap_err().to_string(), "started with another spec");
        assert_eq!(seen, read_record(&store, "r").await.unwrap());
        assert_eq!(store.list("runs/r/record").await.unwrap().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn racing_claims_get_incarnations_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        for url in [format!("file://{}", directory.path().display()), "memory://".into()] {
            let store = Store::open(&url).unwrap();
            let claims = (0..8).map(|_| {
                let store = store.clone();
                tokio::spawn(async move { claim(&store).await.incarnation().0 })
            });
            let mut taken: Vec<u64> =
                futures::future::join_all(claims).await.into_iter().map(|i| i.unwrap()).collect();
            taken.sort_unstable();
            assert_eq!(taken, (1..=8).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn an_update_whose_answer_got_lost_is_no_fence() {
        let store = Store::open("memory://").unwrap();
        let mut register = claim(&store).await;
        // As if an update had been written, but the caller was told of an error and tries another.
        let mut lost = register.current().clone();
        lost.last_checkpoint = Some(Step(1));
        store.put(&key("r", 2), serde_json::to_vec(&lost).unwrap()).await.unwrap();
        register.still_mine().await.unwrap();
        register.update(|record| record.last_checkpoint = Some(Step(2))).await.unwrap();
        let record = read_record(&store, "r").await.unwrap().unwrap();
        assert_eq!(record.last_checkpoint, Some(Step(2)));
    }

    #[tokio::test]
    async fn an_unreadable_record_is_named() {
        let store = Store::open("memory://").unwrap();
        store.put(&key("r", 7), "{").await.unwrap();
        let error = read_record(&store, "r").await.unwrap_err().to_string();
        assert!(error.contains("record/00000000000000000007.json"), "{error}");
    }

    #[tokio::test]
    async fn records_that_a_listing_lacks_are_found_and_fence_all_the_same() {
        let store = Store::open("memory://").unwrap();
        let mut first = claim(&store).await;
        first.update(|record| record.last_checkpoint = Some(Step(1))).await.unwrap();
        let stale = store.with_stale_lists();
        assert!(stale.list("runs/r/record").await.unwrap().is_empty());
        let read = read_record(&stale, "r").await.unwrap().unwrap();
        assert_eq!(read.last_checkpoint, Some(Step(1)));
        assert_eq!(claim(&stale).await.incarnation(), Incarnation(2));
        let error = first.update(|record| record.last_checkpoint = None).await.unwrap_err();
        assert!(matches!(error, Error::Fenced { .. }), "{error}");
    }
}
