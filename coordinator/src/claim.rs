//! What the store says about a run, and the right to go on with it: is it a run of this spec on
//! this data, is it over, where does it go on. [`Claim::take`] and [`Claim::take_anew`] fence every
//! older coordinator of the run; nothing is written before them.

use std::collections::BTreeMap;

use looptrain_proto::{Digest, Incarnation, Spec, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Error as StoreError, Register, RunRecord, Store, read_record,
    run_prefix,
};

use crate::error::CoordinatorError;
use crate::history::read_evaluation;
use crate::journal::chronicle_key;
use crate::records::Outcome;

/// Who wants the run, and what it would train.
pub(crate) struct Claim<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) store: &'a Store,
    pub(crate) trajectory: Digest,
    /// Name and digest of each dataset.
    pub(crate) datasets: &'a [(String, Digest)],
}

/// The checkpoint to go on from, and the newer ones that are not usable.
pub(crate) type Past = (Option<CheckpointManifest>, Vec<(Step, String)>);

/// What earlier coordinators have left of the run.
pub(crate) enum Found {
    /// It is over.
    Finished(Outcome),
    /// It goes on.
    Past(Past),
}

impl Claim<'_> {
    /// Reads what is there of the run, and checks that it is this one.
    pub(crate) async fn look_back(&self) -> Result<Found, CoordinatorError> {
        let run = &self.spec.run.name;
        if let Some(record) = read_record(self.store, run).await? {
            self.check_record(&record)?;
            if let Some(outcome) = self.finished(&record).await? {
                return Ok(Found::Finished(outcome));
            }
        }
        let newest = Checkpoints::new(self.store, run).newest_good().await?;
        let Some((manifest, skipped)) = newest else {
            return Ok(Found::Past(Past::default()));
        };
        self.check_manifest(&manifest)?;
        let skipped = skipped.into_iter().map(|skipped| (skipped.step, skipped.reason)).collect();
        Ok(Found::Past((Some(manifest), skipped)))
    }

    /// Whether more has happened to the run than was seen when it was looked back at.
    pub(crate) fn is_outdated(&self, seen: Option<&CheckpointManifest>, now: &RunRecord) -> bool {
        let newest = seen.map(|manifest| manifest.step);
        now.finished.is_some() || now.last_checkpoint > newest
    }

    /// Takes the run over to go on with it.
    pub(crate) async fn take(&self) -> Result<Register, CoordinatorError> {
        // Another coordinator may have come first since the record was read.
        let mut other = None;
        let claimed = Register::claim(self.store, &self.spec.run.name, |record| match record {
            None => Ok(self.new_record()),
            Some(record) => match self.check_record(record) {
                Ok(()) => Ok(self.next_record(record)),
                Err(error) => {
                    let reason = error.to_string();
                    other = Some(error);
                    Err(reason)
                }
            },
        })
        .await;
        match (claimed, other) {
            (Err(StoreError::Refused { .. }), Some(error)) => Err(error),
            (claimed, _) => Ok(claimed?),
        }
    }

    /// Takes the run over, whatever it was, and removes what there is of it. The claim comes first:
    /// from then on an older coordinator cannot make a checkpoint of the run any more. Checkpoints
    /// go first: without them the rest says nothing, should this be interrupted.
    pub(crate) async fn take_anew(&self) -> Result<Register, CoordinatorError> {
        let run = &self.spec.run.name;
        let register = Register::claim(self.store, run, |record| {
            let begun = record.map_or(Incarnation(1), |record| record.incarnation.next());
            Ok(RunRecord { begun, ..self.new_record() })
        })
        .await?;
        for part in ["checkpoints", "metrics", "evaluations", "audit"] {
            self.store.delete_prefix(&format!("{}/{part}", run_prefix(run))).await?;
        }
        self.store.delete(&chronicle_key(run)).await?;
        Ok(register)
    }

    /// Tells this run from every other, and from what it was before it was begun anew.
    pub(crate) fn lineage(&self, record: &RunRecord) -> Digest {
        let (name, store) = (&self.spec.run.name, &self.spec.run.store);
        let text = format!("{name}\n{store}\n{}\n{}", self.trajectory, record.begun);
        Digest::of(text.as_bytes())
    }

    fn new_record(&self) -> RunRecord {
        RunRecord::new(self.trajectory, self.spec.to_toml(), self.datasets)
    }

    /// The record of a run that goes on; datasets that it does not name yet are pinned now.
    fn next_record(&self, record: &RunRecord) -> RunRecord {
        let mut datasets: BTreeMap<String, Digest> = self.datasets.iter().cloned().collect();
        datasets.extend(record.datasets.clone());
        RunRecord { spec: self.spec.to_toml(), datasets, ..record.clone() }
    }

    fn check_record(&self, record: &RunRecord) -> Result<(), CoordinatorError> {
        let (run, store) = (self.spec.run.name.clone(), self.store.url().to_owned());
        if record.trajectory != self.trajectory {
            let differences = self.differences(record);
            return Err(CoordinatorError::OtherSpec { run, store, differences });
        }
        let other = |reason| CoordinatorError::OtherData { run, store, reason };
        record.check_datasets(self.datasets).map_err(other)
    }

    /// What tells the spec from that of the record.
    fn differences(&self, record: &RunRecord) -> String {
        let before = Spec::parse("the run record", &record.spec, &[]);
        let told = before.map(|before| before.differences(self.spec)).unwrap_or_default();
        match told.is_empty() {
            true => format!("trajectory {}, now {}", record.trajectory, self.trajectory),
            false => told.join(", "),
        }
    }

    fn check_manifest(&self, manifest: &CheckpointManifest) -> Result<(), CoordinatorError> {
        if manifest.trajectory == self.trajectory {
            return Ok(());
        }
        Err(CoordinatorError::OtherCheckpoint {
            run: self.spec.run.name.clone(),
            store: self.store.url().to_owned(),
            step: manifest.step,
            found: manifest.trajectory,
            expected: self.trajectory,
        })
    }

    /// The outcome of a run that is over, from its record.
    async fn finished(&self, record: &RunRecord) -> Result<Option<Outcome>, CoordinatorError> {
        let total = self.spec.total_steps();
        let Some(finished) = record.finished.as_ref().filter(|finished| finished.step == total)
        else {
            return Ok(None);
        };
        let evaluation = read_evaluation(self.store, &self.spec.run.name, total).await?;
        Ok(Some(Outcome {
            step: total,
            tokens: self.spec.tokens_after(total),
            loss: Some(finished.loss),
            weights_digest: Some(finished.weights_digest),
            stopped: false,
            evaluation,
        }))
    }
}
