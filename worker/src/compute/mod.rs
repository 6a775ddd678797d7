//! The compute thread: everything that uses the model or holds the training state.
//!
//! One thread owns a [`Bench`] and takes jobs in the order in which they were submitted. That order
//! is what makes the session simple: a commit is submitted and not waited for, and whatever is
//! submitted after it sees the new weights. A job that is no longer wanted is told so by its
//! cancel flag; its answer is dropped with the future that awaited it.

mod bench;
mod gather;
mod recompute;
mod sums;

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use looptrain_model::Trainer;
use looptrain_proto::Spec;
use tokio::sync::oneshot;

pub(crate) use bench::{Bench, ComputeError};
pub use recompute::worker_bytes;

use crate::transfer::Shelf;
use crate::{Moments, WorkerError};

type Job = Box<dyn FnOnce(&mut Bench) + Send>;

/// A handle to the compute thread, which ends when the handle is dropped.
#[derive(Debug)]
pub(crate) struct Compute {
    jobs: mpsc::Sender<Job>,
    shelf: Shelf,
}

impl Compute {
    /// A thread that computes with a trainer, in so many bytes of memory if it is known.
    pub(crate) fn start(
        spec: Arc<Spec>,
        trainer: Trainer,
        memory: Option<u64>,
        moments: Moments,
    ) -> Result<Self, WorkerError> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let shelf = Shelf::default();
        let filled = shelf.clone();
        thread::Builder::new()
            .name("looptrain-compute".into())
            .spawn(move || {
                let mut bench = Bench::new(spec, trainer, memory, filled, moments);
                for job in queue {
                    job(&mut bench);
                }
            })
            .map_err(|_| WorkerError::Compute)?;
        Ok(Self { jobs, shelf })
    }

    /// What peers may fetch of the state.
    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// Queues a job at once; the future gives its answer.
    pub(crate) fn submit<R, J>(
        &self,
        job: J,
    ) -> impl Future<Output = Result<R, WorkerError>> + Send + use<R, J>
    where
        R: Send + 'static,
        J: FnOnce(&mut Bench) -> R + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let span = tracing::Span::current();
        // If the thread is gone, the answer's other half is dropped here and the future says so.
        let _ = self.jobs.send(Box::new(move |bench| {
            let answered = span.in_scope(|| job(bench));
            // Nobody waits any more: the step was abandoned.
            let _ = answer.send(answered);
        }));
        async move { result.await.map_err(|_| WorkerError::Compute) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_model::Device;

    use super::*;
    use crate::testing::tiny_spec;

    fn start() -> Result<Compute, WorkerError> {
        let spec = Arc::new(tiny_spec("memory://"));
        let trainer = Trainer::new(Device::Cpu, &spec.model, 1)?;
        Compute::start(spec, trainer, None, Moments::default())
    }

    #[tokio::test]
    async fn jobs_run_in_the_order_of_their_submission_even_when_nobody_waits() {
        let compute = start().unwrap();
        drop(compute.submit(Bench::initialise));
        let held = compute.submit(|bench| bench.held()).await.unwrap();
        assert_eq!(held, Some(looptrain_proto::Step(0)));
    }

    #[tokio::test]
    async fn a_panic_on_the_thread_becomes_an_error() {
        let compute = start().unwrap();
        let result = compute.submit(|_| panic!("a panic on purpose")).await;
        assert!(matches!(result, Err::<(), _>(WorkerError::Compute)));
        assert!(compute.submit(|_| ()).await.is_err());
    }
}
