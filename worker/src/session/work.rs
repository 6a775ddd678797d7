//! What the directives do: futures that may be dropped at any await.
//!
//! Each owns what it uses up (the collective, while a step runs) and shares the rest through
//! [`Work`]. State changes happen on the compute thread, each as one job, so that dropping a future
//! never leaves half of one.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use looptrain_model::{Layout, TrainState};
use looptrain_proto::v1::{self, Evaluated, Fetched, Held, PartSaved, Prepared, Ready, Sections};
use looptrain_proto::{Digest, Generation, Rank, Spec, Step};
use looptrain_storage::Checkpoints;
use tracing::Instrument;

use super::failure::Failure;
use crate::compute::{Bench, Compute, ComputeError, Part};
use crate::feed::Feed;
use crate::reduce::Collective;
use crate::reduce::tcp::{Peer, Peers, Ring, RingId};
use crate::state::{self, StateError};
use crate::transfer::{self, FetchError, Item};
use crate::{Moment, Moments, WorkerError};

/// How long a ring may take to form; the coordinator gives up earlier when a member is dead.
const FORM_TIME: Duration = Duration::from_secs(30);

/// How long a joiner waits for what the members were told to offer.
const OFFER_TIME: Duration = Duration::from_secs(10);

/// What all directives use.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) spec: Arc<Spec>,
    pub(crate) feed: Feed,
    pub(crate) compute: Compute,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) peers: Peers,
    /// From whom the held state was fetched: they have the updates that it lacks.
    pub(crate) sources: Mutex<Vec<Peer>>,
    pub(crate) memory: Mutex<Memory>,
    /// Of the run that this worker was welcomed to.
    pub(crate) lineage: Vec<u8>,
    pub(crate) moments: Moments,
}

/// Votes that a worker remembers: more than a coordinator that dies may have failed to log.
const REMEMBERED: usize = 1024;

/// What a worker can tell the next coordinator of its time with the last one.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    generation: Generation,
    world: u32,
    /// On the latest steps, in order.
    votes: VecDeque<Prepared>,
}

/// Why something could not be fetched.
enum Fault {
    /// For the peers' reasons: the worker may try again, or go another way.
    Fetch(FetchError),
    /// For its own.
    Own(Failure),
}

impl From<FetchError> for Fault {
    fn from(error: FetchError) -> Self {
        Self::Fetch(error)
    }
}

impl From<WorkerError> for Fault {
    fn from(error: WorkerError) -> Self {
        Self::Own(error.into())
    }
}

impl From<ComputeError> for Fault {
    fn from(error: ComputeError) -> Self {
        Self::Own(error.into())
    }
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
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Every change is one call that cannot panic half-way.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn remember_generation(&self, generation: Generation, world: usize) {
        let mut memory = self.memory();
        (memory.generation, memory.world) = (generation, world as u32);
    }

    pub(super) fn remember_vote(&self, vote: &Prepared) {
        let votes = &mut self.memory().votes;
        // A step that is tried again was not committed before.
        while votes.back().is_some_and(|last| last.step >= vote.step) {
            votes.pop_back();
        }
        votes.push_back(vote.clone());
        if votes.len() > REMEMBERED {
            votes.pop_front();
        }
    }

    /// What this worker brings to another session; `None` when it holds no state yet.
    pub(crate) async fn held(&self) -> Result<Option<Held>, WorkerError> {
        let state = self.compute.submit(|bench| (bench.held(), bench.prepared()));
        let (held, prepared) = state.await?;
        let memory = self.memory();
        Ok(held.map(|step| Held {
            generation: memory.generation.0,
            world: memory.world,
            step: step.0,
            prepared: prepared.map(|step| step.0),
            recent: memory.votes.iter().cloned().collect(),
            lineage: self.lineage.clone(),
        }))
    }

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
            } else if !self.catch_up_to(step).await? {
                self.load(step).instrument(tracing::info_span!("load", %step)).await?;
            }
        }
        Ok(self.compute.submit(move |bench| bench.weights_digest(step)).await??)
    }

    /// Fetches the state of a step from the members that offer it, and the updates that they
    /// have committed meanwhile.
    pub(super) async fn fetch(
        &self,
        step: Step,
        mut sources: Vec<Peer>,
    ) -> Result<Fetched, Failure> {
        let (start, members) = (Instant::now(), sources.len());
        let fetched = async {
            self.fetch_state(step, &mut sources).await?;
            // Should the coordinator die, the next one has to know that others hold this, too.
            self.memory().world = members as u32;
            *self.sources.lock().unwrap_or_else(PoisonError::into_inner) = sources;
            self.moments.at(Moment::Fetched(step));
            let mut held = step;
            while self.fetch_update(held.next(), Duration::ZERO).await? {
                held = held.next();
            }
            Ok(held)
        };
        let (step, error) = match fetched.await {
            Ok(held) => {
                let seconds = start.elapsed().as_secs_f64();
                tracing::info!(state = %step, %held, seconds, "fetched the state from the members");
                (held, String::new())
            }
            Err(Fault::Fetch(error)) => (step, error.to_string()),
            Err(Fault::Own(failure)) => return Err(failure),
        };
        Ok(Fetched { step: step.0, error })
    }

    async fn fetch_state(&self, step: Step, sources: &mut Vec<Peer>) -> Result<(), Fault> {
        let parameters = Layout::new(&self.spec.model).parameters();
        let (item, lengths) = (Item::State(step), [parameters; 3]);
        let fetched = transfer::fetch(&self.peers, sources, item, &lengths, OFFER_TIME).await?;
        let buffers = fetched.ok_or(FetchError::NotOffered { step })?;
        let [weights, first_moment, second_moment] =
            <[_; 3]>::try_from(buffers).map_err(|_| FetchError::NotOffered { step })?;
        let state = TrainState { step, weights, first_moment, second_moment };
        Ok(self.compute.submit(move |bench| bench.adopt(state)).await?)
    }

    /// Fetches and applies the update to `step`; false when no member has committed it yet.
    async fn fetch_update(&self, step: Step, wait: Duration) -> Result<bool, Fault> {
        let sources = || self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut asked = sources().clone();
        let parameters = Layout::new(&self.spec.model).parameters();
        let item = Item::Update(step);
        let fetched = transfer::fetch(&self.peers, &mut asked, item, &[parameters], wait).await;
        *sources() = asked;
        let Some(gradient) = fetched?.and_then(|mut buffers| buffers.pop()) else {
            return Ok(false);
        };
        self.compute.submit(move |bench| bench.update(step, gradient)).await??;
        Ok(true)
    }

    /// Goes from a fetched state to the committed one; false when there is no such way.
    async fn catch_up_to(&self, step: Step) -> Result<bool, Failure> {
        let held = self.compute.submit(|bench| bench.held()).await?;
        let none = self.sources.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let Some(mut held) = held.filter(|held| *held < step && !none) else { return Ok(false) };
        while held < step {
            match self.fetch_update(held.next(), OFFER_TIME).await {
                Ok(true) => held = held.next(),
                Ok(false) => return Ok(false),
                Err(Fault::Fetch(error)) => {
                    tracing::warn!(%error, "cannot catch up with the members");
                    return Ok(false);
                }
                Err(Fault::Own(failure)) => return Err(failure),
            }
        }
        Ok(true)
    }

    /// Puts the committed state where joiners can fetch it.
    pub(super) fn offer(&self, step: Step) {
        // A job of its own in the queue, behind the commit of the step; nobody waits for it.
        drop(self.compute.submit(move |bench| {
            let _span = tracing::info_span!("offer", %step).entered();
            if let Err(error) = bench.offer(step) {
                tracing::warn!(%error, "cannot offer the state to a joiner");
            }
        }));
    }

    /// Frees what was offered.
    pub(crate) fn withdraw(&self) {
        drop(self.compute.submit(|bench| bench.withdraw()));
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
        let under_way = || self.moments.at(Moment::Reduce(step));
        collective.all_reduce_watched(step.0, &mut sums, &under_way).instrument(span).await?;
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
            match answered(work.upload(step, part, parts, copied)).await {
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
        copied: impl Future<Output = Result<Result<Part, ComputeError>, WorkerError>>,
    ) -> Result<(looptrain_storage::PartEntry, Digest), String> {
        let start = Instant::now();
        let copied = copied.await.map_err(|error| error.to_string())?;
        let Part { tensors, weights, layout } = copied.map_err(|error| error.to_string())?;
        let hash = tokio::task::spawn_blocking(move || state::digest(&layout, &weights));
        let metadata = BTreeMap::from([
            ("run".to_owned(), self.spec.run.name.clone()),
            ("step".to_owned(), step.to_string()),
            ("trajectory".to_owned(), self.spec.trajectory_digest().to_string()),
        ]);
        let saved = self.checkpoints.save_part(step, part, parts, tensors, metadata).await;
        let entry = saved.map_err(|error| error.to_string())?;
        let digest = hash.await.map_err(|error| format!("hashing the weights: {error}"))?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(bytes = entry.bytes, seconds, "saved a part of the checkpoint");
        Ok((entry, digest))
    }
}

/// The answer of a save, also when it panics: the coordinator waits for one.
async fn answered<T>(save: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    // What a panic leaves half-done is dropped with the future.
    AssertUnwindSafe(save).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(format!("the save panicked: {}", text.unwrap_or_else(|| "no message".into())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_save_that_panics_is_answered_with_its_message() {
        let panics = answered(async { panic!("part {} of {}", 1, 2) });
        assert_eq!(panics.await, Err::<(), _>("the save panicked: part 1 of 2".to_owned()));
        let plain = answered(async { panic!("on purpose") });
        assert_eq!(plain.await, Err::<(), _>("the save panicked: on purpose".to_owned()));
        assert_eq!(answered(async { Ok(3) }).await, Ok(3));
        assert_eq!(answered(async { Err::<(), _>("full".into()) }).await, Err("full".to_owned()));
    }
}
