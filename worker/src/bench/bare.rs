//! Steps without a coordinator: what the computation alone takes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use looptrain_proto::{Spec, Step};
use looptrain_storage::{Reading, Store};

use crate::compute::{Compute, ComputeError};
use crate::data::Data;
use crate::machine::memory_of;
use crate::{Moments, WorkerError};

/// What a step took.
#[derive(Clone, Copy, Debug)]
pub struct BareStep {
    /// Forward and backward of all slots, into fixed point.
    pub compute: Duration,
    /// From the reduced sums to the gradient, their digest and statistics.
    pub prepare: Duration,
    /// Clip, optimizer, and the new weights in the model.
    pub update: Duration,
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
        let slots = spec.stages[spec.stage_of(step)].slots;
        let mut batches = Vec::new();
        for slot in 0..slots {
            batches.push(data.slot(step, slot).await.map_err(WorkerError::from)?);
        }
        work.push((step, batches));
    }
    let memory = memory_of(None, &spec);
    let compute = Compute::start(spec, threads, memory, Moments::default())?;
    let times = compute.submit(move |bench| {
        bench.initialise();
        let never = AtomicBool::new(false);
        let mut times = Vec::new();
        for (step, batches) in work {
            let start = Instant::now();
            let sums = bench.contribute(step, 0, batches, &never)?.sums;
            let computed = Instant::now();
            bench.prepare(step, sums)?;
            let prepared = Instant::now();
            bench.commit(step)?;
            times.push(BareStep {
                compute: computed - start,
                prepare: prepared - computed,
                update: prepared.elapsed(),
            });
        }
        Ok::<_, ComputeError>(times)
    });
    Ok(times.await??)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::tiny_store;

    #[tokio::test]
    async fn every_step_of_the_spec_is_taken_and_no_more() {
        let (spec, _store) = tiny_store().await;
        let times = bare_steps(Spec::clone(&spec), 1, 4).await.unwrap();
        assert!(times.len() == 4 && times.iter().all(|step| step.compute < step.whole()));
        let error = bare_steps(Spec::clone(&spec), 1, 5).await.unwrap_err();
        assert_eq!(error.to_string(), "the spec has no step 5");
    }
}
