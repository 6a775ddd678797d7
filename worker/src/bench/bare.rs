//! Steps without a coordinator: what the computation alone takes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use looptrain_model::{Device, SlotBatch, Trainer};
use looptrain_proto::{Spec, Step};
use looptrain_storage::{Reading, Store};
use tokio::sync::mpsc;

use crate::compute::{Bench, Compute, ComputeError};
use crate::data::{Data, DataError, Slot};
use crate::machine::memory_of;
use crate::reduce::{Route, Sums};
use crate::{Moments, WorkerError};

/// What a step took.
#[derive(Clone, Copy, Debug)]
pub struct BareStep {
    /// Forward and backward of all slots, into their sum.
    pub compute: Duration,
    /// From the reduced sums to the gradient, their digest and statistics.
    pub prepare: Duration,
    /// Clip, optimizer, and the new weights in the model.
    pub update: Duration,
    /// Mean loss over the step's tokens, before its update.
    pub loss: f64,
}

impl BareStep {
    /// All of it.
    #[must_use]
    pub fn whole(&self) -> Duration {
        self.compute + self.prepare + self.update
    }
}

/// Why steps could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum BareError {
    /// The worker's parts cannot be had: data, store, compute thread.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The computation has no result.
    #[error("{reason}")]
    Step {
        /// In its words.
        reason: String,
    },
}

impl From<ComputeError> for BareError {
    fn from(error: ComputeError) -> Self {
        Self::Step { reason: error.to_string() }
    }
}

/// Runs the first `steps` steps of the spec from its initial weights on `threads` threads, and
/// returns how long each took, one after the other on the compute thread. The tokens are read
/// before, from the store that the spec names.
///
/// # Errors
/// When data cannot be read, the spec has fewer steps, or a value leaves the fixed-point range.
pub async fn bare_steps(
    spec: Spec,
    threads: usize,
    steps: u64,
) -> Result<Vec<BareStep>, BareError> {
    let spec = Arc::new(spec);
    let store = Store::open(&spec.run.store).map_err(WorkerError::from)?;
    let reading = Reading::default();
    let data = Data::open(Arc::clone(&spec), &store, &reading).await.map_err(WorkerError::from)?;
    let mut work = Vec::new();
    for step in (1..=steps).map(Step) {
        let at = spec.position(step).ok_or(DataError::NoSuchStep(step));
        let slots = at.map_err(WorkerError::from)?.slots;
        let mut batches = Vec::new();
        for slot in 0..slots {
            batches.push(data.slot(step, slot).await.map_err(WorkerError::from)?);
        }
        work.push((step, batches));
    }
    let memory = memory_of(None, &spec);
    let trainer = Trainer::new(Device::Cpu, &spec.model, threads).map_err(WorkerError::from)?;
    let compute = Compute::start(spec, trainer, memory, Moments::default())?;
    let steps = compute.submit(move |bench| {
        bench.initialise()?;
        take(bench, work)
    });
    Ok(steps.await??)
}

/// Steps on one and the same batch.
#[derive(Clone, Debug)]
pub struct FixedSteps {
    /// One after the other, with those of the warm-up in front.
    pub steps: Vec<BareStep>,
    /// The time that went into each section of the engine after the warm-up, added up over threads.
    pub sections: Vec<(&'static str, Duration)>,
    /// Most bytes taken from the device, if it is not the CPU.
    pub device_bytes: Option<u64>,
}

/// Runs all steps of the spec from its initial weights with a trainer, each on the slots given, of
/// which the first `warm_up` steps do not count for the sections. Neither store nor datasets of
/// the spec are used. On a device one more step follows, for the sections: its kernels run one after
/// the other, so that each has its time.
///
/// # Errors
/// When a value leaves the fixed-point range, or the device fails.
///
/// # Panics
/// When there are not as many slots as the spec says, or they are not of the size that it says.
pub async fn fixed_steps(
    spec: Spec,
    trainer: Trainer,
    slots: &[SlotBatch],
    warm_up: u64,
) -> Result<FixedSteps, BareError> {
    let fits = |batch: &SlotBatch| {
        (batch.sequences, batch.sequence_length)
            == (spec.stages[0].slot_sequences, spec.stages[0].sequence_length)
    };
    assert!(slots.len() == spec.stages[0].slots as usize && slots.iter().all(fits));
    let slot = |batch: &SlotBatch| Slot { batch: batch.clone(), sequences: Vec::new() };
    let slots: Vec<Slot> = slots.iter().map(slot).collect();
    let last = spec.total_steps().0;
    let memory = memory_of(None, &spec);
    let compute = Compute::start(Arc::new(spec), trainer, memory, Moments::default())?;
    let steps = compute.submit(move |bench| {
        bench.initialise()?;
        let work = |steps: std::ops::RangeInclusive<u64>| {
            steps.map(|step| (Step(step), slots.clone())).collect()
        };
        let mut steps = take(bench, work(1..=warm_up))?;
        bench.take_sections();
        steps.extend(take(bench, work(warm_up + 1..=last))?);
        let device_bytes = bench.device_bytes();
        if device_bytes.is_some() {
            // Once more, for the sections.
            bench.measure(true);
            take(bench, work(last + 1..=last + 1))?;
        }
        Ok::<_, ComputeError>(FixedSteps { steps, sections: bench.take_sections(), device_bytes })
    });
    Ok(steps.await??)
}

/// Takes step after step as the only rank.
fn take(bench: &mut Bench, work: Vec<(Step, Vec<Slot>)>) -> Result<Vec<BareStep>, ComputeError> {
    let never = AtomicBool::new(false);
    let mut steps = Vec::new();
    for (step, slots) in work {
        let start = Instant::now();
        let (sender, ready) = mpsc::unbounded_channel();
        bench.contribute(step, 0, slots, Route::Stay, &never, &sender)?;
        let sums = Sums::from_ready(ready).expect("a contribution has all buckets");
        let computed = Instant::now();
        let loss = bench.prepare(step, sums, None)?.statistics.loss;
        let prepared = Instant::now();
        bench.commit(step)?;
        steps.push(BareStep {
            compute: computed - start,
            prepare: prepared - computed,
            update: prepared.elapsed(),
            loss,
        });
    }
    Ok(steps)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{tiny_spec, tiny_store};

    #[tokio::test]
    async fn every_step_of_the_spec_is_taken_and_no_more() {
        let (spec, _store) = tiny_store().await;
        let times = bare_steps(Spec::clone(&spec), 1, 4).await.unwrap();
        assert!(times.len() == 4 && times.iter().all(|step| step.compute < step.whole()));
        let error = bare_steps(Spec::clone(&spec), 1, 5).await.unwrap_err();
        assert_eq!(error.to_string(), "the spec has no step 5");
    }

    #[tokio::test]
    async fn a_batch_that_stays_the_same_is_learnt() {
        for device in [Device::Cpu, Device::Emulated] {
            learn_on(device).await;
        }
    }

    async fn learn_on(device: Device) {
        let mut spec = tiny_spec("memory://not-there");
        if device == Device::Emulated {
            (spec.model.hidden_size, spec.model.num_attention_heads) = (32, 2);
            (spec.model.intermediate_size, spec.model.vocab_size) = (40, 304);
        }
        let stage = &spec.stages[0];
        let (sequences, length) = (stage.slot_sequences, stage.sequence_length);
        let slots: Vec<SlotBatch> = (0..stage.slots)
            .map(|slot| {
                let tokens = (0..(sequences * (length + 1)) as u32).map(|i| (i * 7 + slot) % 300);
                SlotBatch {
                    tokens: tokens.collect(),
                    sequences,
                    sequence_length: length,
                    ..SlotBatch::default()
                }
            })
            .collect();
        let trainer = Trainer::new(device, &spec.model, 2).unwrap();
        let steps = fixed_steps(spec, trainer, &slots, 1).await.unwrap().steps;
        assert_eq!(steps.len(), 4);
        assert!(steps.windows(2).all(|pair| pair[1].loss < pair[0].loss), "{steps:?}");
    }
}
