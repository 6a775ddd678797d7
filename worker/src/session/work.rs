//! What the directives do: futures that may be dropped at any await.
//!
//! Each owns what it uses up (the collective, while a step runs) and shares the rest through
//! [`Work`]. State changes happen on the compute thread, each as one job, so that dropping a future
//! never leaves half of one.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use looptrain_model::{Layout, TrainState};
use looptrain_proto::spec::Initial;
use looptrain_proto::v1::failed::Cause;
use looptrain_proto::v1::{self, Evaluated, Fetched, PartSaved, Prepared, Ready, Sections};
use looptrain_proto::{Digest, Incarnation, Spec, Step};
use looptrain_storage::{Checkpoints, Error, Store};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use super::duties::{Duties, Holding, Membership};
use super::failure::Failure;
use super::rendezvous::Rendezvous;
use crate::audit::Audit;
use crate::compute::{Bench, Compute, ComputeError};
use crate::data::DataError;
use crate::feed::Feed;
use crate::memory::Memory;
#[cfg(feature = "cuda")]
use crate::reduce::nccl::{self, Library, Nccl};
use crate::reduce::tcp::{Peer, Peers, Ring};
use crate::reduce::{Collective, Reduced};
use crate::state::{self, Part, StateError};
use crate::transfer::{self, FetchError, Item};
use crate::waits::{Lasting, Waits};
use crate::{Moment, Moments, WorkerError};

/// How long a ring may take to form; the coordinator gives up earlier when a member is dead.
const FORM_TIME: Duration = Duration::from_secs(30);

/// How long a joiner waits for the state that the members were told to offer: they copy it behind what
/// they do at the same boundary, a save's copy perhaps.
const STATE_TIME: Duration = Duration::from_secs(60);

/// How long it waits for an update.
const OFFER_TIME: Duration = Duration::from_secs(10);

/// How long a follower waits for one update before it asks again.
const FOLLOW_TIME: Duration = Duration::from_secs(5);

/// Sources that are asked for an update: enough to notice that one of them is wrong.
const UPDATE_SOURCES: usize = 3;

/// What all directives use.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) spec: Arc<Spec>,
    pub(crate) feed: Feed,
    /// For the store.
    pub(crate) waits: Waits,
    /// In an audited run.
    pub(crate) audit: Option<Audit>,
    pub(crate) compute: Compute,
    pub(crate) store: Store,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) peers: Peers,
    /// Of the next ring, to each neighbour.
    pub(crate) streams: AtomicU32,
    /// Sequences of an evaluation, as the coordinator counts them.
    pub(crate) evaluated: AtomicU64,
    /// When it is there, and the state on a device.
    #[cfg(feature = "cuda")]
    pub(crate) nccl: Option<Arc<Nccl>>,
    /// From whom the held state was fetched: they have the updates that it lacks.
    pub(crate) sources: Mutex<Vec<Peer>>,
    pub(crate) memory: Memory,
    /// Of the run that this worker was welcomed to.
    pub(crate) lineage: Vec<u8>,
    pub(crate) moments: Moments,
}

/// How far a worker came with the members' updates.
enum Caught {
    /// To the committed step.
    Up,
    /// It holds this state, for this reason.
    Behind(Step, String),
    /// It holds nothing that was fetched.
    Unrelated,
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

impl Work {
    /// Makes the committed state of `step` the held one.
    async fn reach(&self, step: Step) -> Result<Digest, Failure> {
        if !self.compute.submit(move |bench| bench.reach(step)).await?? {
            match &self.spec.initial {
                Some(initial) if step == Step(0) => self.load_initial(initial).await?,
                None if step == Step(0) => self.compute.submit(Bench::initialise).await??,
                _ => self.reach_from_elsewhere(step).await?,
            }
        }
        Ok(self.compute.submit(move |bench| bench.weights_digest(step)).await??)
    }

    /// The same, which can reduce over NCCL.
    #[cfg(feature = "cuda")]
    pub(crate) async fn reducing_over(self, library: Arc<Library>) -> Result<Self, WorkerError> {
        let exchange = self.compute.submit(|bench| bench.exchange(nccl::ROOM)).await??;
        let nccl = exchange.map(|exchange| Arc::new(Nccl::new(library, exchange)));
        Ok(Self { nccl, ..self })
    }

    /// Waits until NCCL has let go of the device.
    #[cfg(feature = "cuda")]
    async fn let_go(&self, within: Duration) -> Result<(), Failure> {
        match &self.nccl {
            Some(nccl) => Ok(nccl.let_go(within).await?),
            None => Ok(()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    async fn let_go(&self, _: Duration) -> Result<(), Failure> {
        Ok(())
    }

    #[cfg(feature = "cuda")]
    async fn form_over_nccl(
        &self,
        membership: &Membership,
        rendezvous: &mut Rendezvous,
    ) -> Result<Collective, Failure> {
        let Membership { ring, rank, members, .. } = membership;
        // Whoever still connects for an older ring is told that it is.
        self.peers.advance(*ring);
        match &self.nccl {
            Some(nccl) => Ok(nccl.form(*ring, *rank, members, rendezvous, FORM_TIME).await?),
            None => {
                Err(Failure::senseless("this worker cannot reduce over NCCL, and did not say so"))
            }
        }
    }

    #[cfg(not(feature = "cuda"))]
    async fn form_over_nccl(
        &self,
        _: &Membership,
        _: &mut Rendezvous,
    ) -> Result<Collective, Failure> {
        Err(Failure::senseless("this worker was built without GPUs, and cannot reduce over NCCL"))
    }

    async fn fetch_state(&self, step: Step, sources: &mut Vec<Peer>) -> Result<(), Fault> {
        let parameters = Layout::new(&self.spec.model).parameters();
        let (item, lengths) = (Item::State(step), [parameters; 3]);
        let fetched = transfer::fetch(&self.peers, sources, item, &lengths, STATE_TIME).await?;
        let transfer::Fetched { buffers, votes } =
            fetched.ok_or(FetchError::NotOffered { item })?;
        let [weights, first_moment, second_moment] =
            <[_; 3]>::try_from(buffers).map_err(|_| FetchError::NotOffered { item })?;
        let state = TrainState { step, weights, first_moment, second_moment };
        self.remember(votes);
        Ok(self.compute.submit(move |bench| bench.adopt(state)).await??)
    }

    /// What was told of the steps that led to what this worker is about to take over: before it does, for
    /// a session that breaks lets go of whoever waits, and not of what is computed.
    fn remember(&self, votes: Vec<Prepared>) {
        votes.into_iter().for_each(|vote| self.memory.remember_vote(vote));
    }

    /// Fetches and applies the update to `step`; false when no member has committed it yet.
    async fn fetch_update(&self, step: Step, wait: Duration) -> Result<bool, Fault> {
        let sources = || self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let objective = self.spec.stages[self.spec.stage_of(step)].objective;
        let elements = Layout::new(&self.spec.model).trained(objective).len();
        let item = Item::Update(step);
        let fetched = loop {
            let mut asked = sources().clone();
            let mut others = asked.split_off(asked.len().min(UPDATE_SOURCES));
            let fetched = transfer::fetch(&self.peers, &mut asked, item, &[elements], wait).await;
            let more = !others.is_empty();
            asked.append(&mut others);
            *sources() = asked;
            match fetched {
                // Those that were asked are gone.
                Err(FetchError::NoSource { .. }) if more => {}
                fetched => break fetched,
            }
        };
        let Some(transfer::Fetched { mut buffers, votes }) = fetched? else { return Ok(false) };
        let gradient = buffers.pop().ok_or(FetchError::NotOffered { item })?;
        self.remember(votes);
        self.compute.submit(move |bench| bench.update(step, gradient)).await??;
        Ok(true)
    }

    /// From the members' updates, or from a checkpoint.
    async fn reach_from_elsewhere(&self, step: Step) -> Result<(), Failure> {
        let caught = self.catch_up_to(step).await?;
        if matches!(caught, Caught::Up) {
            return Ok(());
        }
        // Who has another way does not wait for the store.
        let patient = matches!(caught, Caught::Unrelated);
        let loaded = self.load(step, patient).instrument(tracing::info_span!("load", %step)).await;
        match (caught, loaded) {
            // There is no such checkpoint; but what is held may be of use.
            (Caught::Behind(held, why), Err(Failure::Told(Cause::Store, _))) => {
                Err(Failure::Behind(held, why))
            }
            (_, loaded) => loaded,
        }
    }

    /// Goes from a fetched state to the committed one.
    async fn catch_up_to(&self, step: Step) -> Result<Caught, Failure> {
        let held = self.compute.submit(|bench| bench.held()).await?;
        let none = self.sources.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let Some(mut held) = held.filter(|_| !none) else { return Ok(Caught::Unrelated) };
        if held > step {
            return Ok(Caught::Behind(held, format!("it is beyond step {step} already")));
        }
        while held < step {
            match self.fetch_update(held.next(), OFFER_TIME).await {
                Ok(true) => held = held.next(),
                Ok(false) => {
                    let why = FetchError::NotOffered { item: Item::Update(held.next()) };
                    return Ok(Caught::Behind(held, why.to_string()));
                }
                Err(Fault::Fetch(error)) => return Ok(Caught::Behind(held, error.to_string())),
                Err(Fault::Own(failure)) => return Err(failure),
            }
        }
        Ok(Caught::Up)
    }

    /// Takes the weights that the run begins from.
    async fn load_initial(&self, initial: &Initial) -> Result<(), Failure> {
        let models = Checkpoints::of_model(self.checkpoints.store(), &initial.model);
        let what = format!("the weights of {}", initial.model);
        let read = || models.weights(Step(0));
        let (manifest, tensors) = self.waits.until_answered(what, Error::may_pass, read).await?;
        let (theirs, ours) = (manifest.weights_digest, initial.weights);
        if theirs != ours {
            let model = initial.model.clone();
            return Err(StateError::OtherInitial { model, theirs, ours }.into());
        }
        let model = initial.model.clone();
        let adopted = self.compute.submit(move |bench| {
            bench.adopt(state::from_weights(bench.layout(), &model, tensors)?)?;
            Ok::<_, Failure>(())
        });
        adopted.await??;
        tracing::info!(model = initial.model, "loaded the initial weights");
        Ok(())
    }

    /// From a checkpoint; if need be, as soon as the store is there.
    async fn load(&self, step: Step, patient: bool) -> Result<(), Failure> {
        let start = Instant::now();
        let what = format!("the checkpoint of step {step}");
        let passes = |error: &Error| patient && error.may_pass();
        let read = || self.checkpoints.load(step);
        let (manifest, tensors) = self.waits.until_answered(what, passes, read).await?;
        let (theirs, ours) = (manifest.trajectory, self.spec.trajectory_digest());
        if theirs != ours {
            return Err(StateError::OtherTrajectory { step, theirs, ours }.into());
        }
        let adopted = self.compute.submit(move |bench| {
            bench.adopt(state::from_tensors(bench.layout(), step, tensors)?)?;
            Ok::<_, Failure>(())
        });
        adopted.await??;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(%step, seconds, "loaded the checkpoint");
        Ok(())
    }

    pub(super) async fn upload(
        &self,
        step: Step,
        part: usize,
        parts: usize,
        copied: impl Future<Output = Result<Result<Part, ComputeError>, WorkerError>>,
    ) -> Result<(looptrain_storage::PartEntry, Digest), String> {
        let start = Instant::now();
        let copied = copied.await.map_err(|error| error.to_string())?;
        let copied = copied.map_err(|error| error.to_string())?;
        let metadata = BTreeMap::from([
            ("run".to_owned(), self.spec.run.name.clone()),
            ("step".to_owned(), step.to_string()),
            ("trajectory".to_owned(), self.spec.trajectory_digest().to_string()),
        ]);
        let saved = copied.save(&self.checkpoints, step, part, parts, metadata);
        let saved = saved.instrument(tracing::info_span!("upload")).await;
        let (entry, digest) = saved.map_err(|error| error.to_string())?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(bytes = entry.bytes, seconds, "saved a part of the checkpoint");
        Ok((entry, digest))
    }
}

impl Duties for Work {
    type Collective = Collective;

    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn lineage(&self) -> &[u8] {
        &self.lineage
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn welcomed_back(&self, spec: &Spec) {
        self.streams.store(spec.cluster.streams, Ordering::Relaxed);
        self.evaluated.store(spec.evaluation.sequences, Ordering::Relaxed);
        if spec.run.audit && self.audit.is_none() {
            tracing::warn!("run.audit is on now, and this worker writes none: start it anew");
        }
    }

    fn at(&self, moment: Moment) {
        self.moments.at(moment);
    }

    fn waits_for(&self) -> Option<Lasting> {
        self.waits.lasting()
    }

    async fn holding(&self) -> Result<Holding, WorkerError> {
        let holding =
            |bench: &mut Bench| Holding { held: bench.held(), prepared: bench.prepared() };
        self.compute.submit(holding).await
    }

    async fn form(
        &self,
        membership: &Membership,
        rendezvous: &mut Rendezvous,
    ) -> Result<(Collective, Ready), Failure> {
        let Membership { ring, rank, members, step, over_nccl } = membership;
        let streams = self.streams.load(Ordering::Relaxed);
        // Whatever comes next, also without NCCL, has the device to itself.
        self.let_go(FORM_TIME).await?;
        let formed = async {
            if *over_nccl {
                return self.form_over_nccl(membership, rendezvous).await;
            }
            let formed = Ring::form(&self.peers, *ring, *rank, members, streams, FORM_TIME);
            Ok::<_, Failure>(formed.await?)
        };
        let formed = formed.instrument(tracing::info_span!("ring", streams, over_nccl));
        let reached = self.reach(*step).instrument(tracing::info_span!("reach state", %step));
        let (collective, digest) = tokio::try_join!(formed, reached)?;
        if let Some(audit) = &self.audit {
            audit.take_place(*ring, *rank);
        }
        let generation = ring.generation.0;
        let weights_digest = digest.to_vec();
        Ok((collective, Ready { generation, step: step.0, weights_digest }))
    }

    async fn step(
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

        // What is complete is reduced while the rest is computed.
        let route = collective.route();
        let (sender, ready) = mpsc::unbounded_channel();
        let compute = tracing::info_span!("compute", slots = batches.len());
        let computed = compute.in_scope(|| {
            let (first, cancelled) = (plan.slot_begin, Arc::clone(&cancelled));
            self.compute.submit(move |bench| {
                bench.contribute(step, first, batches, route, &cancelled, &sender)
            })
        });
        let computed = async {
            let contribution = computed.await??;
            let end = Instant::now();
            if let Some(audit) = &self.audit {
                audit.write(step, &contribution.used).await;
            }
            Ok::<_, Failure>((contribution, end))
        };
        let computed = computed.instrument(compute);
        let span = tracing::info_span!("reduce", world = collective.world());
        let moments = self.moments.clone();
        let under_way = move || moments.at(Moment::Reduce(step));
        let reduced = async {
            let reduced = collective.all_reduce_as_ready(step.0, ready, under_way).await?;
            Ok((reduced, Instant::now()))
        };
        let ((contribution, computed_at), (reduced, reduced_at)) =
            tokio::try_join!(computed, reduced.instrument(span))?;
        // A contribution has all buckets.
        let Reduced { sums, blocked } = reduced.ok_or(Failure::Abandoned)?;
        let reduce = reduced_at.saturating_duration_since(computed_at);

        let trend = plan.trend;
        let prepared = self.compute.submit(move |bench| bench.prepare(step, sums, trend));
        let report = prepared.instrument(tracing::info_span!("vote")).await??;
        Ok(Prepared {
            generation: plan.generation,
            step: plan.step,
            digest: report.digest.to_vec(),
            statistics: Some(report.statistics),
            sections: Some(Sections {
                data_wait,
                compute: contribution.seconds,
                reduce: reduce.as_secs_f64(),
                optimizer: report.optimizer_seconds,
                // A next rank that comes to its last slot later takes nothing before that.
                send: blocked.min(reduce).as_secs_f64(),
            }),
            computed_slots: contribution.computed as u32,
            detail: match contribution.detail.is_empty() {
                true => report.detail,
                false => contribution.detail,
            },
        })
    }

    fn commit(&self, step: Step) -> BoxFuture<'static, Result<(), Failure>> {
        let committed = self.compute.submit(move |bench| bench.commit(step));
        async move { Ok(committed.await??) }.boxed()
    }

    async fn evaluate(
        &self,
        order: v1::Evaluate,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Evaluated, Failure> {
        let step = Step(order.step);
        let what = format!("the tokens to evaluate step {step} with");
        let all = self.evaluated.load(Ordering::Relaxed);
        let read = || self.feed.data().validation(step, order.begin..order.end, all);
        let batches = self.waits.until_answered(what, DataError::may_pass, read).await?;
        let evaluated =
            self.compute.submit(move |bench| bench.evaluate(step, &batches, &cancelled));
        let (sums, tokens) = evaluated.await??;
        Ok(Evaluated { generation: order.generation, step: order.step, sums, tokens })
    }

    fn save(self: &Arc<Self>, order: v1::Save) -> BoxFuture<'static, PartSaved> {
        let (part, parts) = (order.part as usize, order.parts as usize);
        let step = Step(order.step);
        let valid = part < parts;
        let (tell, stall) = oneshot::channel();
        let copied = self.compute.submit(move |bench| {
            let start = Instant::now();
            let _span = tracing::info_span!("copy").entered();
            let none = ComputeError::WrongStep { held: bench.held(), action: "save", step };
            let copied = if valid { bench.snapshot(step, part, parts) } else { Err(none) };
            // Nobody listens when the save has been given up.
            let _ = tell.send(start.elapsed());
            copied
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
                    stall_seconds: stall.await.unwrap_or_default().as_secs_f64(),
                    ..empty
                },
                Err(error) => PartSaved { error, ..empty },
            }
        }
        .boxed()
    }

    async fn fetch(&self, step: Step, mut sources: Vec<Peer>) -> Result<Fetched, Failure> {
        let start = Instant::now();
        let fetched = async {
            self.fetch_state(step, &mut sources).await?;
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

    async fn follow(&self, mut held: Step) -> Result<Fetched, Failure> {
        loop {
            match self.fetch_update(held.next(), FOLLOW_TIME).await {
                Ok(true) => {
                    held = held.next();
                    self.moments.at(Moment::Followed(held));
                }
                Ok(false) => {}
                Err(Fault::Fetch(error)) => {
                    return Ok(Fetched { step: held.0, error: error.to_string() });
                }
                Err(Fault::Own(failure)) => return Err(failure),
            }
        }
    }

    fn offer(&self, step: Step) {
        // A job of its own in the queue, behind the commit of the step; nobody waits for it.
        drop(self.compute.submit(move |bench| {
            let _span = tracing::info_span!("offer", %step).entered();
            if let Err(error) = bench.offer(step) {
                tracing::warn!(%error, "cannot offer the state to a joiner");
            }
        }));
    }

    fn withdraw(&self, keep_updates: bool) {
        drop(self.compute.submit(move |bench| bench.withdraw(keep_updates)));
    }

    async fn save_without_coordinator(&self, known: Incarnation) -> String {
        self.save_orphaned(known).await
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
