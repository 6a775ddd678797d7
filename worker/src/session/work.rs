//! What the directives do: futures that may be dropped at any await.
//!
//! Each owns what it uses up (the collective, while a step runs) and shares the rest through
//! [`Work`]. State changes happen on the compute thread, each as one job, so that dropping a future
//! never leaves half of one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use looptrain_proto::v1::{self, Evaluated, PartSaved, Prepared, Ready, Sections};
use looptrain_proto::{Digest, Generation, Rank, Spec, Step};
use looptrain_storage::Checkpoints;
use tracing::Instrument;

use super::failure::Failure;
use crate::WorkerError;
use crate::compute::{Bench, Compute, ComputeError, Part};
use crate::feed::Feed;
use crate::reduce::Collective;
use crate::reduce::tcp::{Peer, Peers, Ring, RingId};
use crate::state::{self, StateError};

/// How long a ring may take to form; the coordinator gives up earlier when a member is dead.
const FORM_TIME: Duration = Duration::from_secs(30);

/// What all directives use.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) spec: Arc<Spec>,
    pub(crate) feed: Feed,
    pub(crate) compute: Compute,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) peers: Peers,
}

/// A generation as this worker sees it.
#[derive(Clone, Debug)]
pub(super) struct Membership {
    pub(super) ring: RingId,
    pub(super) rank: Rank,
    pub(super) members: Vec<Peer>,
    pub(super) step: Step,
}

impl Work {
    /// Forms the ring and gets the state, at the same time.
    pub(super) async fn form(
        &self,
        membership: &Membership,
    ) -> Result<(Collective, Ready), Failure> {
        let Membership { ring, rank, members, step } = membership;
        let ring_formed = async {
            Ok::<_, Failure>(Ring::form(&self.peers, *ring, *rank, members, FORM_TIME).await?)
        };
        let (collective, digest) = tokio::try_join!(ring_formed, self.reach(*step))?;
        let generation = ring.generation.0;
        let weights_digest = digest.to_vec();
        Ok((collective, Ready { generation, step: step.0, weights_digest }))
    }

    /// Makes the committed state of `step` the held one.
    async fn reach(&self, step: Step) -> Result<Digest, Failure> {
        if !self.compute.submit(move |bench| bench.reach(step)).await? {
            if step == Step(0) {
                self.compute.submit(Bench::initialise).await?;
            } else {
                self.load(step).instrument(tracing::info_span!("load", %step)).await?;
            }
        }
        Ok(self.compute.submit(move |bench| bench.weights_digest(step)).await??)
    }

    async fn load(&self, step: Step) -> Result<(), Failure> {
        let start = Instant::now();
        let (manifest, tensors) = self.checkpoints.load(step).await?;
        let (theirs, ours) = (manifest.trajectory, self.spec.trajectory_digest());
        if theirs != ours {
            return Err(StateError::OtherTrajectory { step, theirs, ours }.into());
        }
        let adopted = self.compute.submit(move |bench| {
            bench.adopt(state::from_tensors(bench.layout(), step, tensors)?);
            Ok::<_, StateError>(())
        });
        adopted.await??;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(%step, seconds, "loaded the checkpoint");
        Ok(())
    }

    /// Computes this rank's slots, reduces and prepares.
    pub(super) async fn step(
        &self,
        plan: v1::Plan,
        collective: &mut Collective,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Prepared, Failure> {
        let step = Step(plan.step);
        let start = Instant::now();
        let slots = plan.slot_begin..plan.slot_end;
        let batches =
            self.feed.slots(step, slots).instrument(tracing::info_span!("data wait")).await?;
        let data_wait = start.elapsed().as_secs_f64();

        let computed = tracing::info_span!("compute").in_scope(|| {
            self.compute
                .submit(move |bench| bench.contribute(step, plan.slot_begin, batches, &cancelled))
        });
        let contribution = computed.await??;

        let start = Instant::now();
        let mut sums = contribution.sums;
        let span = tracing::info_span!("reduce", world = collective.world());
        collective.all_reduce(step.0, &mut sums).instrument(span).await?;
        let reduce = start.elapsed().as_secs_f64();

        let report = self.compute.submit(move |bench| bench.prepare(step, sums)).await??;
        Ok(Prepared {
            generation: plan.generation,
            step: plan.step,
            digest: report.digest.to_vec(),
            statistics: Some(report.statistics),
            sections: Some(Sections {
                data_wait,
                compute: contribution.seconds,
                reduce,
                optimizer: report.optimizer_seconds,
            }),
        })
    }

    /// This rank's share of the validation loss.
    pub(super) async fn evaluate(
        &self,
        order: v1::Evaluate,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Evaluated, Failure> {
        let step = Step(order.step);
        let batches = self.feed.data().validation(step, order.begin..order.end).await?;
        let evaluated =
            self.compute.submit(move |bench| bench.evaluate(step, &batches, &cancelled));
        let (sums, tokens) = evaluated.await??;
        Ok(Evaluated { generation: order.generation, step: order.step, sums, tokens })
    }

    /// Queues the copy of this rank's part, then uploads it; the future needs no further attention
    /// of the session. What goes wrong is in the answer: a failed save stops nobody's training.
    pub(super) fn save(
        self: &Arc<Self>,
        order: v1::Save,
    ) -> impl Future<Output = PartSaved> + Send + use<> {
        let (part, parts) = (order.part as usize, order.parts as usize);
        let step = Step(order.step);
        let valid = part < parts;
        let copied = self.compute.submit(move |bench| {
            let _span = tracing::info_span!("copy for save").entered();
            let none = ComputeError::WrongStep { held: bench.held(), action: "save", step };
            if valid { bench.snapshot(step, part, parts) } else { Err(none) }
        });
        let work = Arc::clone(self);
        async move {
            let empty = PartSaved {
                step: order.step,
                part: order.part,
                parts: order.parts,
                ..PartSaved::default()
            };
            match work.upload(step, part, parts, Generation(order.generation), copied).await {
                Ok(saved) => PartSaved {
                    file: saved.0.file,
                    bytes: saved.0.bytes,
                    digest: saved.0.digest.to_vec(),
                    tensors: saved.0.tensors,
                    weights_digest: saved.1.to_vec(),
                    ..empty
                },
                Err(error) => PartSaved { error, ..empty },
            }
        }
        .instrument(tracing::info_span!("save", %step, part))
    }

    async fn upload(
        &self,
        step: Step,
        part: usize,
        parts: usize,
        generation: Generation,
        copied: impl Future<Output = Result<Result<Part, ComputeError>, WorkerError>>,
    ) -> Result<(looptrain_storage::PartEntry, Digest), String> {
        let start = Instant::now();
        let copied = copied.await.map_err(|error| error.to_string())?;
        let Part { tensors, weights, layout } = copied.map_err(|error| error.to_string())?;
        let hash = tokio::task::spawn_blocking(move || state::digest(&layout, &weights));
        let metadata = BTreeMap::from([
            ("run".to_owned(), self.spec.run.name.clone()),
            ("step".to_owned(), step.to_string()),
            ("generation".to_owned(), generation.to_string()),
            ("trajectory".to_owned(), self.spec.trajectory_digest().to_string()),
        ]);
        let saved = self.checkpoints.save_part(step, part, parts, &tensors, &metadata).await;
        let entry = saved.map_err(|error| error.to_string())?;
        let digest = hash.await.map_err(|error| format!("hashing the weights: {error}"))?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(bytes = entry.bytes, seconds, "saved a part of the checkpoint");
        Ok((entry, digest))
    }
}
