//! The session: directives in, votes out.
//!
//! One task runs the loop. At most one [`Activity`] (forming, a step, an evaluation, a fetch) is
//! under way; commits are queued on the compute thread and not waited for; saves upload beside
//! everything. A `Form` abandons the activity at once: its future is dropped, and with it the ring,
//! so that the neighbours notice too; its computation is told to stop at the next slot. The
//! committed state and a prepared update survive that, on the compute thread.

mod duties;
mod failure;
mod link;
mod orphan;
mod rendezvous;
mod work;

#[cfg(test)]
mod tests;

use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use looptrain_proto::v1::coordinator_message::Kind as Directive;
use looptrain_proto::v1::worker_message::Kind as Vote;
use looptrain_proto::v1::{self, PartSaved, failed::Cause};
use looptrain_proto::{Generation, Incarnation, Rank, Step};
use opentelemetry::Context;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::Instrument;

pub(crate) use self::duties::brought;
pub use self::duties::{Duties, Holding, Membership};
pub use self::failure::Failure;
use self::failure::failed;
pub use self::link::Dial;
pub(crate) use self::link::{Link, Tcp};
pub use self::rendezvous::Rendezvous;
pub(crate) use self::work::Work;
use crate::reduce::tcp::{Peer, RingId};
use crate::waits::Lasting;
use crate::{Finished, Moment, Stop, WorkerError, trace};

/// How long a leaving worker waits for the coordinator to take notice.
const FAREWELL: Duration = Duration::from_secs(2);

/// How often the coordinator is told that this worker still waits for the store.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What an activity gives back: the collective, if it still works, and the answer.
type Outcome<C> = (Option<C>, Result<Vote, Failure>);

/// The directive that is being carried out.
struct Activity<C> {
    future: BoxFuture<'static, Outcome<C>>,
    cancelled: Arc<AtomicBool>,
    step: Step,
    /// Others wait for the result of this one: do not leave in the middle.
    is_step: bool,
}

impl<C> Drop for Activity<C> {
    fn drop(&mut self) {
        // The compute thread cannot be dropped; it looks at this between slots.
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A queued commit, with its step.
type Committing = BoxFuture<'static, (Step, Result<(), Failure>)>;

/// One worker's membership in a run, from the welcome to the end.
pub(crate) struct Session<W: Duties> {
    link: Link,
    work: Arc<W>,
    incarnation: Incarnation,
    generation: Generation,
    collective: Option<W::Collective>,
    activity: Option<Activity<W::Collective>>,
    /// Who forms a generation and waits for what rank 0 passes on.
    awaits_communicator: Option<oneshot::Sender<Vec<u8>>>,
    /// A step was prepared and nothing has been heard of it since.
    owes_commit: bool,
    commits: FuturesUnordered<Committing>,
    saves: JoinSet<PartSaved>,
    /// What this worker last reported in the generation, unless it was a neighbour's fault.
    reported: Option<String>,
    /// Why this worker is to leave.
    leaving: Option<String>,
    /// The coordinator has said that it may.
    released: bool,
    /// The span of the coordinator's that the newest message belongs to.
    parent: Context,
}

impl<W: Duties> Session<W> {
    pub(crate) fn new(link: Link, work: Arc<W>, incarnation: Incarnation) -> Self {
        Self {
            link,
            work,
            incarnation,
            generation: Generation(0),
            collective: None,
            activity: None,
            awaits_communicator: None,
            owes_commit: false,
            commits: FuturesUnordered::new(),
            saves: JoinSet::new(),
            reported: None,
            leaving: None,
            released: false,
            parent: Context::new(),
        }
    }

    /// Carries out directives until the run is over or `stop` says to leave.
    pub(crate) async fn run(mut self, stop: &Stop) -> Result<Finished, WorkerError> {
        let mut tell = interval(TELL_EVERY);
        tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some(reason) = self.leaving.clone().filter(|_| self.may_leave()) {
                self.link.send(Vote::Leave(v1::Leave { reason: reason.clone() }))?;
                self.link.close(FAREWELL).await;
                return Ok(Finished { reason });
            }
            tokio::select! {
                // A new generation comes before what it makes pointless.
                biased;
                message = self.link.receive() => {
                    let v1::CoordinatorMessage { traceparent, kind } = message?;
                    self.parent = trace::parent(traceparent);
                    match kind {
                        Some(Directive::Finish(finish)) => return self.finish(finish),
                        Some(directive) => self.obey(directive, stop)?,
                        None => tracing::warn!("ignored a message of an unknown kind"),
                    }
                },
                outcome = ended(&mut self.activity) => self.ended(outcome)?,
                Some((step, result)) = self.commits.next() => {
                    if let Err(failure) = result {
                        self.fail(step, failure)?;
                    }
                }
                Some(saved) = self.saves.join_next() => match saved {
                    Ok(saved) => self.link.send(Vote::PartSaved(saved))?,
                    Err(error) if error.is_cancelled() => {}
                    // Not by a panic of the save itself, which has an answer.
                    Err(error) => tracing::error!(%error, "a save ended unexpectedly"),
                },
                reason = stop.told(), if self.leaving.is_none() => self.leave(reason.to_owned())?,
                _ = tell.tick() => self.tell_what_it_waits_for()?,
            }
        }
    }

    fn tell_what_it_waits_for(&self) -> Result<(), WorkerError> {
        match self.work.waits_for().filter(|_| self.activity.is_some()) {
            Some(Lasting { detail, failed }) => {
                let generation = self.generation.0;
                self.link.send(Vote::Waiting(v1::Waiting { generation, detail, failed }))
            }
            None => Ok(()),
        }
    }

    /// Asks the coordinator, which may want what this worker holds to be saved first.
    fn leave(&mut self, reason: String) -> Result<(), WorkerError> {
        tracing::info!(reason, "leaving at the next safe moment");
        self.leaving = Some(reason.clone());
        self.link.send(Vote::Leaving(v1::Leaving { reason }))
    }

    /// Nobody waits for anything of this worker but its next step.
    fn may_leave(&self) -> bool {
        if !self.released {
            return false;
        }
        // While the store fails it, the step cannot end; without it others may have the tokens.
        let starved = || self.work.waits_for().is_some_and(|wait| wait.failed);
        let in_step = self.activity.as_ref().is_some_and(|it| it.is_step) && !starved();
        !in_step && !self.owes_commit && self.saves.is_empty()
    }

    fn finish(self, finish: v1::Finish) -> Result<Finished, WorkerError> {
        let v1::Finish { reason, expelled } = finish;
        match self.reported {
            Some(detail) => Err(WorkerError::Dropped { reason, detail }),
            None if expelled => Err(WorkerError::SentAway { reason }),
            None => Ok(Finished { reason }),
        }
    }

    fn obey(&mut self, directive: Directive, stop: &Stop) -> Result<(), WorkerError> {
        match directive {
            Directive::Form(form) => self.form(form),
            Directive::Plan(plan) => {
                let (generation, step) = (plan.generation, Step(plan.step));
                self.if_current(generation, step, |session| session.plan(plan))
            }
            Directive::Commit(commit) => {
                let (generation, step) = (commit.generation, Step(commit.step));
                self.if_current(generation, step, |session| {
                    session.commit(step);
                    Ok(())
                })
            }
            Directive::Evaluate(order) => {
                let (generation, step) = (order.generation, Step(order.step));
                self.if_current(generation, step, |session| session.evaluate(order))
            }
            Directive::Save(order) => {
                let (step, part) = (order.step, order.part);
                let span = self.span(tracing::info_span!("save", step, part));
                // There is one checkpoint in the making at most: another one has been given up, and
                // what it copied goes with it.
                self.saves.abort_all();
                let save = span.in_scope(|| self.work.save(order));
                self.saves.spawn(save.instrument(span));
                Ok(())
            }
            Directive::Offer(offer) => {
                let (generation, step) = (offer.generation, Step(offer.step));
                self.if_current(generation, step, |session| {
                    session.work.offer(step);
                    Ok(())
                })
            }
            Directive::Communicator(v1::Communicator { generation, id }) => {
                let current = generation == self.generation.0;
                if let Some(waits) = self.awaits_communicator.take_if(|_| current) {
                    // It may have given up by now.
                    let _ = waits.send(id);
                }
                Ok(())
            }
            Directive::Withdraw(withdraw) => {
                self.work.withdraw(withdraw.keep_updates);
                Ok(())
            }
            Directive::Drain(drain) => {
                tracing::info!(reason = drain.reason, "leaving when nobody waits for this worker");
                // Also should the session break before.
                stop.tell(drain.reason.clone());
                self.leaving.get_or_insert(drain.reason);
                self.released = true;
                Ok(())
            }
            Directive::Rejected(rejected) => {
                tracing::info!(
                    reason = rejected.reason,
                    "the coordinator did not act on a message"
                );
                Ok(())
            }
            Directive::Fetch(fetch) => {
                self.fetch(fetch);
                Ok(())
            }
            Directive::Welcome(_) | Directive::Refused(_) | Directive::Finish(_) => {
                tracing::warn!("ignored a message that has no place in the middle of a session");
                Ok(())
            }
        }
    }

    /// Carries out a directive of this generation; one of another is of no interest any more.
    fn if_current(
        &mut self,
        generation: u64,
        step: Step,
        directive: impl FnOnce(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), WorkerError> {
        if generation != self.generation.0 {
            tracing::debug!(generation, current = %self.generation, "ignored an old directive");
            return Ok(());
        }
        directive(self).or_else(|failure| self.fail(step, failure))
    }

    fn form(&mut self, form: v1::Form) -> Result<(), WorkerError> {
        let (generation, step) = (Generation(form.generation), Step(form.step));
        if generation <= self.generation {
            tracing::warn!(%generation, current = %self.generation, "ignored an old generation");
            return Ok(());
        }
        self.span(tracing::info_span!("abort")).in_scope(|| self.abandon());
        self.generation = generation;
        self.reported = None;
        // Those that were to stay behind may be gone; the coordinator says so again if not.
        self.released = false;
        let rank = Rank(form.rank);
        if form.rank as usize >= form.members.len() {
            let world = form.members.len();
            let detail = format!("rank {rank} is no rank of generation {generation} of {world}");
            return self.fail(step, Failure::senseless(detail));
        }
        let ring = RingId { incarnation: self.incarnation, generation };
        let over_nccl = form.collective() == v1::Collective::Nccl;
        let (hear, heard) = oneshot::channel();
        self.awaits_communicator = Some(hear);
        let mut rendezvous = self.link.rendezvous(generation, heard);
        self.work.memory().remember_generation(generation, rank, form.members.len());
        let members = peers(form.members.to_vec());
        let membership = Membership { ring, rank, members, step, over_nccl };
        let world = membership.members.len();
        tracing::info!(%generation, %rank, world, %step, over_nccl, "forming");
        let work = Arc::clone(&self.work);
        let span = self.span(tracing::info_span!("join generation", %generation, %step));
        self.begin(step, false, move |_| {
            async move {
                match work.form(&membership, &mut rendezvous).await {
                    Ok((collective, ready)) => (Some(collective), Ok(Vote::Ready(ready))),
                    Err(failure) => (None, Err(failure)),
                }
            }
            .instrument(span)
        });
        Ok(())
    }

    fn plan(&mut self, plan: v1::Plan) -> Result<(), Failure> {
        let step = Step(plan.step);
        let at = self
            .work
            .spec()
            .position(step)
            .ok_or_else(|| Failure::senseless(format!("step {step} is no step of the spec")))?;
        let slots = at.slots;
        if plan.slot_begin > plan.slot_end || plan.slot_end > slots {
            let (begin, end) = (plan.slot_begin, plan.slot_end);
            let detail = format!("slots {begin}..{end} of step {step} are not among its {slots}");
            return Err(Failure::senseless(detail));
        }
        let mut collective = self.idle_collective("a plan")?;
        // A retry of a prepared step supersedes it.
        self.owes_commit = false;
        let work = Arc::clone(&self.work);
        let generation = plan.generation;
        let span = self.span(tracing::info_span!("work", %step, generation));
        self.begin(step, true, move |cancelled| {
            async move {
                match work.step(plan, &mut collective, cancelled).await {
                    Ok(prepared) => (Some(collective), Ok(Vote::Prepared(prepared))),
                    // Dropped, so that the neighbours do not wait for this rank.
                    Err(failure) => (None, Err(failure)),
                }
            }
            .instrument(span)
        });
        Ok(())
    }

    fn commit(&mut self, step: Step) {
        self.owes_commit = false;
        self.work.at(Moment::Commit(step));
        let span = self.span(tracing::info_span!("commit", %step));
        let committed = span.in_scope(|| self.work.commit(step));
        let committed = async move { (step, committed.await) };
        self.commits.push(Box::pin(committed.instrument(span)));
    }

    /// Fetches the members' state, to be let into a generation later.
    fn fetch(&mut self, order: v1::Fetch) {
        let step = Step(order.step);
        let (work, sources) = (Arc::clone(&self.work), peers(order.sources));
        // Should the coordinator die, the next one has to know that others hold the state, too.
        work.memory().remember_world(sources.len());
        let span = self.span(tracing::info_span!("fetch", %step, sources = sources.len()));
        self.begin(step, false, move |_| {
            async move { (None, work.fetch(step, sources).await.map(Vote::Fetched)) }
                .instrument(span)
        });
    }

    /// Goes on from the fetched state as the members do, until there is a place.
    fn follow(&mut self, step: Step) {
        let work = Arc::clone(&self.work);
        // For as long as there is no place, so that no trace holds it.
        self.begin(step, false, move |_| async move {
            (None, work.follow(step).await.map(Vote::Fetched))
        });
    }

    fn evaluate(&mut self, order: v1::Evaluate) -> Result<(), Failure> {
        let collective = self.idle_collective("an evaluation")?;
        let step = Step(order.step);
        let work = Arc::clone(&self.work);
        let span = self.span(tracing::info_span!("evaluate", %step));
        self.begin(step, false, move |cancelled| {
            async move {
                let result = work.evaluate(order, cancelled).await;
                (Some(collective), result.map(Vote::Evaluated))
            }
            .instrument(span)
        });
        Ok(())
    }

    /// A span of this worker, below that of the message that it is about.
    fn span(&self, span: tracing::Span) -> tracing::Span {
        trace::below(span, &self.parent)
    }

    /// The collective of a formed generation in which nothing else is going on.
    fn idle_collective(&mut self, what: &str) -> Result<W::Collective, Failure> {
        self.collective.take().ok_or_else(|| {
            let state = match &self.activity {
                Some(activity) => format!("is still busy with step {}", activity.step),
                None => "has no ring".to_owned(),
            };
            Failure::senseless(format!("{what} came while this worker {state}"))
        })
    }

    fn begin<F>(&mut self, step: Step, is_step: bool, start: impl FnOnce(Arc<AtomicBool>) -> F)
    where
        F: Future<Output = Outcome<W::Collective>> + Send + 'static,
    {
        let cancelled = Arc::new(AtomicBool::new(false));
        let future = Box::pin(start(Arc::clone(&cancelled)));
        self.activity = Some(Activity { future, cancelled, step, is_step });
    }

    fn abandon(&mut self) {
        if let Some(activity) = self.activity.take() {
            tracing::debug!(step = %activity.step, "abandoned what was under way");
        }
        self.collective = None;
        self.owes_commit = false;
    }

    fn ended(
        &mut self,
        (step, (collective, result)): (Step, Outcome<W::Collective>),
    ) -> Result<(), WorkerError> {
        self.activity = None;
        self.collective = collective;
        match result {
            Ok(vote) => {
                match &vote {
                    Vote::Prepared(vote) => {
                        self.work.memory().remember_vote(vote.clone());
                        self.owes_commit = true;
                    }
                    Vote::Fetched(fetched) if fetched.error.is_empty() => {
                        self.follow(Step(fetched.step));
                    }
                    _ => {}
                }
                self.link.send(vote)?;
                if self.owes_commit {
                    self.work.at(Moment::Prepared(step));
                }
                Ok(())
            }
            Err(failure) => self.fail(step, failure),
        }
    }

    /// Tells the coordinator what went wrong, unless this worker cannot go on at all.
    fn fail(&mut self, step: Step, failure: Failure) -> Result<(), WorkerError> {
        let (cause, detail) = match failure {
            Failure::Abandoned => return Ok(()),
            Failure::Told(cause, detail) => (cause, detail),
            Failure::Behind(held, error) => {
                tracing::warn!(%held, "cannot catch up with the members: {error}");
                return self.link.send(Vote::Fetched(v1::Fetched { step: held.0, error }));
            }
            Failure::Fatal(error) => {
                let detail = error.to_string();
                // Best effort: the session may be what broke.
                let _ = self.link.report(failed(self.generation, step, Cause::Internal, detail));
                return Err(error);
            }
        };
        tracing::warn!(generation = %self.generation, %step, ?cause, "{detail}");
        if cause != Cause::Peer {
            self.reported = Some(detail.clone());
        }
        self.link.report(failed(self.generation, step, cause, detail))
    }
}

/// Members in rank order as the ring and the transfer know them.
fn peers(members: Vec<v1::Member>) -> Vec<Peer> {
    let peer = |(rank, member): (u32, v1::Member)| Peer {
        rank: Rank(rank),
        name: member.name,
        address: member.peer_address,
    };
    (0..).zip(members).map(peer).collect()
}

/// Waits for the activity; for ever when there is none.
async fn ended<C>(activity: &mut Option<Activity<C>>) -> (Step, Outcome<C>) {
    match activity {
        Some(activity) => (activity.step, (&mut activity.future).await),
        None => pending().await,
    }
}

/// Answers a welcome that this worker cannot follow. The coordinator may already count on it: a
/// generation that is formed in the meantime is answered too.
pub(crate) async fn decline(mut link: Link, error: &WorkerError) {
    let answer = |generation, step| failed(generation, step, Cause::Store, error.to_string());
    let farewell = async {
        link.report(answer(Generation(0), Step(0)))?;
        loop {
            match link.receive().await?.kind {
                Some(Directive::Form(form)) => {
                    link.report(answer(Generation(form.generation), Step(form.step)))?;
                }
                Some(Directive::Finish(_)) => return Ok::<_, WorkerError>(()),
                _ => {}
            }
        }
    };
    // However the farewell goes, this worker ends with the error that led here.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    link.close(FAREWELL).await;
}
