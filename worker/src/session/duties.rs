//! What a session asks of whoever does the work: the seam between what a worker says to its
//! coordinator and what it does about it. [`super::Work`] is what does it; a simulation of the
//! protocol has one that computes nothing.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::future::BoxFuture;
use looptrain_proto::v1::{self, Evaluated, Fetched, Held, PartSaved, Prepared, Ready};
use looptrain_proto::{Incarnation, Rank, Spec, Step};

use super::failure::Failure;
use super::rendezvous::Rendezvous;
use crate::memory::Memory;
use crate::reduce::tcp::{Peer, RingId};
use crate::waits::Lasting;
use crate::{Moment, WorkerError};

/// A generation as its members see it.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Which ring to form.
    pub ring: RingId,
    /// This worker's place in it.
    pub rank: Rank,
    /// All members in rank order.
    pub members: Vec<Peer>,
    /// The committed step whose state every member needs.
    pub step: Step,
    /// Whether all of them reduce over NCCL.
    pub over_nccl: bool,
}

/// What a worker has of the run's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// The committed step whose state it holds.
    pub held: Option<Step>,
    /// The step whose reduced gradient it keeps until it hears of its commit.
    pub prepared: Option<Step>,
}

/// Carries out directives. Futures may be dropped at any await, when something newer takes their
/// place; what they have changed by then has to be whole.
pub trait Duties: Send + Sync + 'static {
    /// The all-reduce of one generation. When it is dropped, its neighbours notice.
    type Collective: Send + 'static;

    /// What the run is.
    fn spec(&self) -> &Spec;

    /// Of the run that this worker was welcomed to.
    fn lineage(&self) -> &[u8];

    /// What is told to the next coordinator of the time with the last one.
    fn memory(&self) -> &Memory;

    /// The next coordinator has this spec, in which what does not decide the weights may have
    /// changed: how many streams a ring has, which all its ranks must agree on.
    fn welcomed_back(&self, _spec: &Spec) {}

    /// The worker is at this moment, which a test may want to know.
    fn at(&self, _moment: Moment) {}

    /// What it has waited for from the store for a while, and what the store says.
    fn waits_for(&self) -> Option<Lasting> {
        None
    }

    /// What there is when all that was asked before is done.
    fn holding(&self) -> impl Future<Output = Result<Holding, WorkerError>> + Send;

    /// Forms the ring and gets the state. A prepared step that the generation starts from is
    /// committed; one that it starts before is forgotten when its step is tried again.
    fn form(
        &self,
        membership: &Membership,
        rendezvous: &mut Rendezvous,
    ) -> impl Future<Output = Result<(Self::Collective, Ready), Failure>> + Send;

    /// Computes this rank's slots, reduces and prepares.
    fn step(
        &self,
        plan: v1::Plan,
        collective: &mut Self::Collective,
        cancelled: Arc<AtomicBool>,
    ) -> impl Future<Output = Result<Prepared, Failure>> + Send;

    /// Queues the commit of the prepared step at once, ahead of all that is asked later.
    fn commit(&self, step: Step) -> BoxFuture<'static, Result<(), Failure>>;

    /// This rank's share of the validation loss.
    fn evaluate(
        &self,
        order: v1::Evaluate,
        cancelled: Arc<AtomicBool>,
    ) -> impl Future<Output = Result<Evaluated, Failure>> + Send;

    /// Queues the copy of this rank's part of the state at once; the future writes it. What goes
    /// wrong is in the answer.
    fn save(self: &Arc<Self>, order: v1::Save) -> BoxFuture<'static, PartSaved>;

    /// Gets the state of a step from the members that offer it, and the updates that they have
    /// committed meanwhile.
    fn fetch(
        &self,
        step: Step,
        sources: Vec<Peer>,
    ) -> impl Future<Output = Result<Fetched, Failure>> + Send;

    /// Puts the committed state where joiners can fetch it, behind the commits queued before.
    fn offer(&self, step: Step);

    /// Frees what was offered, or all but the newest updates.
    fn withdraw(&self, keep_updates: bool);

    /// Goes on from the fetched state as the members commit, for as long as one of them has the
    /// updates; then says how far it came.
    fn follow(&self, held: Step) -> impl Future<Output = Result<Fetched, Failure>> + Send;

    /// Saves the committed state that this worker holds, for its coordinator does not come back;
    /// unless it has been saved, or the run has been begun anew since incarnation `known`. Tells
    /// how that went, in words.
    fn save_without_coordinator(&self, known: Incarnation) -> impl Future<Output = String> + Send;
}

/// What a worker brings to another session; `None` when it holds no state yet.
pub(crate) async fn brought(work: &impl Duties) -> Result<Option<Held>, WorkerError> {
    let Holding { held, prepared } = work.holding().await?;
    Ok(held.map(|step| work.memory().held(step, prepared, work.lineage())))
}
