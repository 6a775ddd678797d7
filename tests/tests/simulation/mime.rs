//! What does a worker's duties in a simulation: it goes through all the motions, and in place of
//! gradients it has hashes ([`crate::arithmetic`]).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use looptrain_proto::v1::failed::Cause;
use looptrain_proto::v1::{
    Evaluate, Evaluated, Fetched, PartSaved, Plan, Prepared, Ready, Save, Sections, StepStatistics,
};
use looptrain_proto::{Digest, EVALUATION_FRACTION_BITS, Incarnation, Spec, Step};
use looptrain_storage::Checkpoints;
use looptrain_worker::WorkerError;
use looptrain_worker::parts::{Duties, Failure, Holding, Membership, Memory, Rendezvous};
use looptrain_worker::reduce::tcp::Peer;
use tokio::time::sleep;

use crate::arithmetic;
use crate::door::{CastVote, Door, Given, Offer, Ring, Shelf};
use crate::shared::Shared;
use crate::witness::Life;

/// A worker process's duties.
pub(crate) struct Mime {
    life: Life,
    shared: Arc<Shared>,
    spec: Arc<Spec>,
    lineage: Vec<u8>,
    memory: Memory,
    checkpoints: Checkpoints,
    door: Door,
    shelf: Shelf,
    state: Mutex<State>,
    sources: Mutex<Vec<Peer>>,
}

#[derive(Debug, Default)]
struct State {
    held: Option<(Step, Digest)>,
    /// A step and its reduced gradient.
    prepared: Option<(Step, Digest)>,
}

impl Mime {
    pub(crate) async fn start(
        life: Life,
        shared: Arc<Shared>,
        spec: Arc<Spec>,
        lineage: Vec<u8>,
    ) -> Result<Self, WorkerError> {
        let shelf = Shelf::default();
        let store = shared.store(&life.to_string());
        let checkpoints = Checkpoints::new(&store, &spec.run.name);
        // Nobody else is on this host; should the port not be free, this life ends here.
        let memory = Memory::default();
        let door = Door::open(life.worker, Arc::clone(&shared), Arc::clone(&shelf), memory.clone())
            .await
            .map_err(|_| WorkerError::Compute)?;
        let (state, sources) = Default::default();
        Ok(Self { life, shared, spec, lineage, memory, checkpoints, door, shelf, state, sources })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> Option<Step> {
        self.state().held.map(|(step, _)| step)
    }

    fn adopt(&self, step: Step, weights: Digest) {
        *self.state() = State { held: Some((step, weights)), prepared: None };
        *self.shelf() = None;
        self.shared.witness().holds(&self.life, step, weights);
    }

    fn shelf(&self) -> MutexGuard<'_, Option<Offer>> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sources(&self) -> MutexGuard<'_, Vec<Peer>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights after `step`, if they are what is held.
    fn weights_of(&self, step: Step, action: &str) -> Result<Digest, Failure> {
        match self.state().held {
            Some((held, weights)) if held == step => Ok(weights),
            held => {
                let held = held.map(|(step, _)| step);
                let detail = format!("this worker holds {held:?}, so it cannot {action} {step}");
                Err(Failure::Told(Cause::Internal, detail))
            }
        }
    }

    /// Applies a gradient; what was prepared is used up or out of date.
    fn update(&self, step: Step, gradient: Digest) -> Result<(), Failure> {
        let before = self.weights_of(Step(step.0 - 1), "update to")?;
        let weights = arithmetic::apply(before, gradient);
        *self.state() = State { held: Some((step, weights)), prepared: None };
        let mut shelf = self.shelf();
        if let Some(offer) = shelf.as_mut() {
            offer.updates.insert(step, gradient);
        }
        self.shared.witness().holds(&self.life, step, weights);
        Ok(())
    }

    /// Applies a fetched gradient, and remembers who voted on it.
    fn update_to(&self, step: Step, given: &Given) -> Result<(), Failure> {
        self.remember(&given.votes);
        self.update(step, given.digest)
    }

    fn remember(&self, votes: &[CastVote]) {
        for vote in votes {
            self.memory.remember_vote(self.vote(*vote));
        }
    }

    fn vote(&self, vote: CastVote) -> Prepared {
        let CastVote { step, generation, digest } = vote;
        let trend = self.shared.witness().truth().trend(Step(step));
        Prepared {
            generation,
            step,
            digest: digest.to_vec(),
            statistics: Some(StepStatistics {
                trend,
                ..arithmetic::statistics(&self.spec, Step(step))
            }),
            ..Prepared::default()
        }
    }

    fn apply_prepared(&self, step: Step) -> Result<(), Failure> {
        let prepared = self.state().prepared.filter(|(prepared, _)| *prepared == step);
        match prepared {
            Some((_, gradient)) => self.update(step, gradient),
            None => {
                let detail = format!("this worker has not prepared step {step} to commit it");
                Err(Failure::Told(Cause::Internal, detail))
            }
        }
    }

    /// Makes the committed state of `step` the held one, as the real one does.
    async fn reach(&self, step: Step) -> Result<Digest, Failure> {
        let prepared = self.state().prepared.is_some_and(|(prepared, _)| prepared == step);
        let there = if prepared {
            self.shared.witness().caught_up += 1;
            self.apply_prepared(step).is_ok()
        } else {
            self.held() == Some(step)
        };
        if !there {
            if step == Step(0) {
                self.adopt(step, arithmetic::initial(&self.spec));
            } else if let Err(behind) = self.catch_up_to(step).await {
                match (self.load(step).await, behind) {
                    (Err(Failure::Told(Cause::Store, _)), Some((held, why))) => {
                        return Err(Failure::Behind(held, why));
                    }
                    (loaded, _) => loaded?,
                }
            }
        }
        self.weights_of(step, "vouch for")
    }

    /// Goes from a fetched state to the committed one; how far it came when there is no such way,
    /// and `None` when nothing was fetched.
    async fn catch_up_to(&self, step: Step) -> Result<(), Option<(Step, String)>> {
        let sources = self.sources().clone();
        let Some(mut held) = self.held().filter(|_| !sources.is_empty()) else {
            return Err(None);
        };
        if held > step {
            return Err(Some((held, format!("it is beyond step {step} already"))));
        }
        while held < step {
            let next = held.next();
            match self.door.ask(&sources, true, next, true).await {
                Ok(Some(given)) if self.update_to(next, &given).is_ok() => held = next,
                Ok(_) => return Err(Some((held, format!("no peer offers the update to {next}")))),
                Err(reason) => return Err(Some((held, reason))),
            }
        }
        Ok(())
    }

    async fn load(&self, step: Step) -> Result<(), Failure> {
        let (_, tensors) = self.checkpoints.load(step).await?;
        let damaged = || Failure::Told(Cause::Store, format!("checkpoint {step} is damaged"));
        self.adopt(step, arithmetic::from_tensors(&tensors).ok_or_else(damaged)?);
        self.shared.witness().loads += 1;
        Ok(())
    }

    async fn upload(&self, order: Save, weights: Digest) -> Result<PartSaved, String> {
        let Save { step, part, parts, .. } = order;
        let tensors = arithmetic::tensors(weights).into_iter().zip(0..);
        let mine = tensors.filter(|(_, index)| index % parts == part).map(|(tensor, _)| tensor);
        let (at, of) = (part as usize, parts as usize);
        let mine: Vec<_> = mine.collect();
        let saved = self.checkpoints.save_part(Step(step), at, of, mine, BTreeMap::new()).await;
        let entry = saved.map_err(|error| error.to_string())?;
        Ok(PartSaved {
            stall_seconds: 0.0,
            step,
            part,
            parts,
            error: String::new(),
            file: entry.file,
            bytes: entry.bytes,
            digest: entry.digest.to_vec(),
            weights_digest: arithmetic::vouch(weights).to_vec(),
            tensors: entry.tensors,
        })
    }

    /// Takes the time that slots take, unless nobody wants them any more.
    async fn toil(&self, slots: u64, cancelled: &AtomicBool) -> Result<Duration, Failure> {
        let mut spent = Duration::ZERO;
        for _ in 0..slots {
            if cancelled.load(Ordering::Relaxed) {
                return Err(Failure::Abandoned);
            }
            let time = self.shared.slot_time(&self.life);
            sleep(time).await;
            spent += time;
        }
        Ok(spent)
    }
}

impl Duties for Mime {
    type Collective = Ring;

    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn lineage(&self) -> &[u8] {
        &self.lineage
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    async fn holding(&self) -> Result<Holding, WorkerError> {
        let state = self.state();
        let held = state.held.map(|(step, _)| step);
        let prepared = state.prepared.map(|(step, _)| step);
        drop(state);
        self.shared.witness().brings(&self.life, held, prepared);
        Ok(Holding { held, prepared })
    }

    async fn form(
        &self,
        membership: &Membership,
        _: &mut Rendezvous,
    ) -> Result<(Ring, Ready), Failure> {
        let Membership { ring, step, .. } = membership;
        self.shared.witness().forms(&self.life, *ring, *step, self.held());
        let (collective, weights) =
            tokio::try_join!(biased; self.door.form(membership), self.reach(*step))?;
        let weights_digest = arithmetic::vouch(weights).to_vec();
        Ok((collective, Ready { generation: ring.generation.0, step: step.0, weights_digest }))
    }

    async fn step(
        &self,
        plan: Plan,
        collective: &mut Ring,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Prepared, Failure> {
        let step = Step(plan.step);
        let before = Step(plan.step - 1);
        let own: Vec<u64> = (plan.slot_begin..plan.slot_end).map(u64::from).collect();
        self.weights_of(before, "compute the step after")?;
        self.shared.witness().planned(&self.life, step, plan.trend);
        let compute = self.toil(own.len() as u64, &cancelled).await?.as_secs_f64();
        let slots = collective.all_reduce(step, &own).await?;
        let weights = self.weights_of(before, "prepare the step after")?;
        let gradient = arithmetic::gradient(weights, step, &slots);
        let guard = self.spec.optimizer.spikes.clone().unwrap_or_default();
        let (stage, before) = (self.spec.stage_of(step), plan.trend.unwrap_or_default());
        let mut statistics = arithmetic::statistics(&self.spec, step);
        statistics.spike = before.spike(&guard, stage, &statistics);
        statistics.trend = Some(before.with(&guard, stage, &statistics));
        let update = if statistics.spike.is_empty() { gradient } else { arithmetic::SKIPPED };
        self.state().prepared = Some((step, update));
        self.shared.witness().prepares(&self.life, step, &slots, gradient);
        let Plan { generation, step, .. } = plan;
        Ok(Prepared {
            sections: Some(Sections { compute, ..Sections::default() }),
            computed_slots: own.len() as u32,
            statistics: Some(statistics),
            ..self.vote(CastVote { step, generation, digest: gradient })
        })
    }

    fn commit(&self, step: Step) -> BoxFuture<'static, Result<(), Failure>> {
        let committed = self.apply_prepared(step);
        self.shared.witness().obeys(&self.life, step);
        async move { committed }.boxed()
    }

    async fn evaluate(
        &self,
        order: Evaluate,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Evaluated, Failure> {
        let step = Step(order.step);
        self.weights_of(step, "evaluate")?;
        self.toil(order.end - order.begin, &cancelled).await?;
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let tokens = (order.end - order.begin) * stage.sequence_length as u64;
        let sums = vec![(tokens as i64) << EVALUATION_FRACTION_BITS; 2 * stage.loops + 2];
        let Evaluate { generation, step, .. } = order;
        Ok(Evaluated { generation, step, sums, tokens })
    }

    fn save(self: &Arc<Self>, order: Save) -> BoxFuture<'static, PartSaved> {
        let copied = self.weights_of(Step(order.step), "save");
        let this = Arc::clone(self);
        async move {
            let saved = match copied {
                Ok(weights) => this.upload(order, weights).await,
                Err(failure) => Err(format!("{failure:?}")),
            };
            let Save { step, part, parts, .. } = order;
            saved.unwrap_or_else(|error| PartSaved {
                step,
                part,
                parts,
                error,
                ..Default::default()
            })
        }
        .boxed()
    }

    async fn fetch(&self, step: Step, sources: Vec<Peer>) -> Result<Fetched, Failure> {
        let given = match self.door.ask(&sources, false, step, true).await {
            Ok(Some(given)) => given,
            Ok(None) => {
                let error = format!("no peer offers the state of step {step} in time");
                return Ok(Fetched { step: step.0, error });
            }
            Err(error) => return Ok(Fetched { step: step.0, error }),
        };
        self.remember(&given.votes);
        self.adopt(step, given.digest);
        self.sources().clone_from(&sources);
        self.shared.witness().fetches += 1;
        let mut held = step;
        loop {
            match self.door.ask(&sources, true, held.next(), false).await {
                Ok(Some(given)) => self.update_to(held.next(), &given)?,
                Ok(None) => return Ok(Fetched { step: held.0, error: String::new() }),
                Err(error) => return Ok(Fetched { step: step.0, error }),
            }
            held = held.next();
        }
    }

    fn offer(&self, step: Step) {
        if let Ok(weights) = self.weights_of(step, "offer") {
            let mut shelf = self.shelf();
            // Those that hold an older state and follow may lack the newest updates.
            let updates = shelf.take().map(|before| before.updates).unwrap_or_default();
            *shelf = Some(Offer { step, weights, updates, only_updates: false });
        }
    }

    fn withdraw(&self, keep_updates: bool) {
        let mut shelf = self.shelf();
        match shelf.as_mut().filter(|_| keep_updates) {
            Some(offer) => offer.only_updates = true,
            None => *shelf = None,
        }
    }

    async fn follow(&self, mut held: Step) -> Result<Fetched, Failure> {
        let sources = self.sources().clone();
        loop {
            match self.door.ask(&sources, true, held.next(), true).await {
                Ok(Some(given)) => self.update_to(held.next(), &given)?,
                Ok(None) => continue,
                Err(error) => return Ok(Fetched { step: held.0, error }),
            }
            held = held.next();
        }
    }

    async fn save_without_coordinator(&self, _known: Incarnation) -> String {
        // The simulation waits for coordinators as long as it takes.
        "nothing was saved".into()
    }
}
